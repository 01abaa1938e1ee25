"""Sends a batch of crops to a teacher and returns its maps: on the CPU synchronously, on a GPU asynchronously.

On a GPU crops are sent as bytes from page-locked memory, maps come back as the codes that the shard stores, and each
direction has its own stream: the asking thread never waits for a copy, only for answers, `IN_FLIGHT` batches later.

Shapes: B crops, S their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.core.codes import CodedMaps, encode_linear
from distill.core.depth import DepthMap, Kind
from distill.core.division import unit_range
from distill.teachers import Teacher

IN_FLIGHT = 2  # batches that are asked before the first answer is taken; bounds the memory


class TeacherFailedError(ValueError):
    """A teacher fails on everything, or breaks its contract; the message names it and its last error."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A teacher's maps of a batch, on the CPU.

    maps: one per crop, of the stored kind. predicted: the network's kind. nan: per crop, the number of NaN pixels that
    the network marked valid.
    """

    maps: Sequence[DepthMap | CodedMaps]
    predicted: Kind
    nan: Sequence[int]


Pending = Callable[[], Answer]


def predict(name: str, teacher: Teacher, images: Tensor, keys: Sequence[str]) -> DepthMap:
    """Calls a teacher once and checks the shape of its answer; its noise, if any, is seeded by the crop's key."""
    with torch.no_grad():
        if getattr(teacher.card, "seeded", False):
            depth = teacher.predict(images, keys=keys)  # type: ignore[call-arg]
        else:
            depth = teacher.predict(images)
    if tuple(depth.values.shape) != (len(images), *images.shape[-2:]):
        raise TeacherFailedError(f"{name} returned maps {tuple(depth.values.shape)} for images {tuple(images.shape)}")
    return depth


@dataclass(slots=True)
class HostAsking:
    """Asks synchronously. store: converts a map to the stored kind."""

    store: Callable[[DepthMap], DepthMap]
    in_flight: int = 0

    def __call__(
        self, name: str, teacher: Teacher, crops: Sequence[Tensor], keys: Sequence[str], *, filled: bool = True
    ) -> Pending:
        """The teacher's maps of crops (3,S,S) uint8. filled: ignored."""
        depth = predict(name, teacher, unit_range(torch.stack(list(crops))), keys).to("cpu")
        nan = (torch.isnan(depth.values) & depth.valid).flatten(1).sum(1).tolist()
        stored = self.store(depth)
        answer = Answer([stored[i : i + 1] for i in range(len(stored))], depth.kind, nan)
        return lambda: answer


class DeviceAsking:
    """Asks asynchronously; taking the answer waits for it.

    coding: the name and the first code of a codec whose codes are linear, to code maps on the device; None returns them
    uncoded. pad_to: batches of fewer crops are padded to this size, so that a compiled network sees one shape only.
    """

    in_flight = IN_FLIGHT

    def __init__(
        self,
        device: torch.device,
        store: Callable[[DepthMap], DepthMap],
        *,
        coding: tuple[str, int] | None,
        pad_to: int = 0,
    ) -> None:
        self.device, self.store, self.coding, self.pad_to = device, store, coding, pad_to
        self.cuda = device.type == "cuda"
        self.up: Any = torch.cuda.Stream(device) if self.cuda else None
        self.down: Any = torch.cuda.Stream(device) if self.cuda else None

    def __call__(
        self, name: str, teacher: Teacher, crops: Sequence[Tensor], keys: Sequence[str], *, filled: bool = True
    ) -> Pending:
        """As HostAsking; the teacher's errors are raised when asking, the device's when taking the answer.

        filled: False disables padding, after a whole batch ran out of memory.
        """
        missing = max(0, self.pad_to - len(crops)) if filled else 0
        padded, padded_keys = [*crops, *[crops[-1]] * missing], [*keys, *[keys[-1]] * missing]
        depth = predict(name, teacher, self._send(padded), padded_keys)[: len(crops)]
        nan = (torch.isnan(depth.values) & depth.valid).flatten(1).sum(1)
        label_maps = self.store(depth)
        coded = None if self.coding is None else encode_linear(label_maps.values, label_maps.valid, self.coding[1])
        host, wait = self._fetch([nan, *(coded or (label_maps.values, label_maps.valid))])
        return lambda: self._take(host, wait, predicted=depth.kind, kind=label_maps.kind)

    def _send(self, crops: Sequence[Tensor]) -> Tensor:
        """(B,3,S,S) float32 in [0,1] on the device."""
        # Channels last, as photographs are decoded: rows are copied in one piece, and the device permutes them.
        host = torch.empty((len(crops), *crops[0].shape[1:], 3), dtype=torch.uint8, pin_memory=self.cuda)
        for row, crop in zip(host, crops, strict=True):
            row.copy_(crop.movedim(0, -1))
        if not self.cuda:
            return unit_range(host.permute(0, 3, 1, 2))
        with torch.cuda.stream(self.up):
            images = host.to(self.device, non_blocking=True)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self.up)
        images.record_stream(stream)
        return unit_range(images.permute(0, 3, 1, 2))

    def _fetch(self, back: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """Starts copying tensors to page-locked memory; returns the copies and a function that waits for them."""
        if not self.cuda:
            return [x.cpu() for x in back], lambda: None
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        host = []
        with torch.cuda.stream(self.down):
            for x in back:
                host.append(torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True))
                x.record_stream(self.down)
            event = self.down.record_event()
        return host, event.synchronize

    def _take(self, host: Sequence[Tensor], wait: Callable[[], None], *, predicted: Kind, kind: Kind) -> Answer:
        wait()
        nan, *tensors = host
        maps: list[Any]
        if self.coding is None:
            values = DepthMap(tensors[0], tensors[1], kind)
            maps = [values[i : i + 1] for i in range(len(nan))]
        else:
            codes, low, high, count = (x.split(1) for x in tensors)
            coded = zip(codes, low, high, count, strict=True)
            maps = [CodedMaps(*parts, self.coding[0], kind) for parts in coded]
        return Answer(maps, predicted, nan.tolist())


def camera_of(teacher: Any, region: Tensor, kind: Kind) -> dict[str, float]:
    """The camera record of a label of a region (3,H,W): the focal length in the region's pixels that the teacher's
    metres hold for, where it assumes a fixed camera for all photos; else {}.
    """
    assumed = getattr(teacher, "assumed_focal", None) if kind.unknown == "metric" else None
    focal = assumed(int(region.shape[-2]), int(region.shape[-1])) if assumed else None
    return {} if focal is None else {"focal": focal}
