"""One batch of crops to a teacher and its maps back: on the CPU at once, on a GPU while the next batch is prepared.

On a GPU crops travel as bytes from page-locked memory, maps come back as the codes that the shard stores, and each way
has a stream of its own: the thread that asks never waits for a copy, only, `IN_FLIGHT` batches later, for an answer.

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
from distill.teachers import Teacher

IN_FLIGHT = 2  # batches between the asking and the taking of their answers; bounds the memory


class TeacherFailedError(ValueError):
    """A teacher fails on everything, or breaks its contract; the message names it and its last error."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A teacher's maps of a batch, on the CPU.

    maps: one per crop, of the kind that is stored. predicted: the kind that the network gave. nan: per crop, how many
    pixels that it called valid are NaN.
    """

    maps: Sequence[DepthMap | CodedMaps]
    predicted: Kind
    nan: Sequence[int]


Pending = Callable[[], Answer]


def predict(name: str, teacher: Teacher, images: Tensor, keys: Sequence[str]) -> DepthMap:
    """One call of a teacher, its answer's shape checked; noise, where it draws any, belongs to the crop's key."""
    with torch.no_grad():
        if getattr(teacher.card, "seeded", False):
            depth = teacher.predict(images, keys=keys)  # type: ignore[call-arg]
        else:
            depth = teacher.predict(images)
    if tuple(depth.values.shape) != (len(images), *images.shape[-2:]):
        raise TeacherFailedError(f"{name} gave maps {tuple(depth.values.shape)} for images {tuple(images.shape)}")
    return depth


@dataclass(slots=True)
class HostAsking:
    """Asks and waits. store: brings a map to the kind that is stored."""

    store: Callable[[DepthMap], DepthMap]
    in_flight: int = 0

    def __call__(
        self, name: str, teacher: Teacher, crops: Sequence[Tensor], keys: Sequence[str], *, filled: bool = True
    ) -> Pending:
        """Crops (3,S,S) uint8 as the teacher's maps of them. filled: of no meaning here."""
        depth = predict(name, teacher, torch.stack(list(crops)).float() / 255.0, keys).to("cpu")
        nan = (torch.isnan(depth.values) & depth.valid).flatten(1).sum(1).tolist()
        kept = self.store(depth)
        answer = Answer([kept[i : i + 1] for i in range(len(kept))], depth.kind, nan)
        return lambda: answer


class DeviceAsking:
    """Asks and goes on; the answer is waited for when it is taken.

    coding: the name and the first code of a codec whose codes are linear, to have maps coded on the device; None
    brings them back as they are. pad_to: batches of fewer crops are filled up, so that a compiled network meets one
    shape alone.
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
        """As HostAsking; raises what the teacher raises when asked, and what the device reports when taken.

        filled: False asks about these crops alone, where a whole batch has not enough memory.
        """
        missing = max(0, self.pad_to - len(crops)) if filled else 0
        sent, named = [*crops, *[crops[-1]] * missing], [*keys, *[keys[-1]] * missing]
        depth = predict(name, teacher, self._send(sent), named)[: len(crops)]
        nan = (torch.isnan(depth.values) & depth.valid).flatten(1).sum(1)
        kept = self.store(depth)
        coded = None if self.coding is None else encode_linear(kept.values, kept.valid, self.coding[1])
        host, wait = self._fetch([nan, *(coded or (kept.values, kept.valid))])
        return lambda: self._take(host, wait, predicted=depth.kind, kind=kept.kind)

    def _send(self, crops: Sequence[Tensor]) -> Tensor:
        """(B,3,S,S) float32 in [0,1] on the device."""
        # Channels last, as photographs are decoded: rows are copied whole, and the device turns them.
        host = torch.empty((len(crops), *crops[0].shape[1:], 3), dtype=torch.uint8, pin_memory=self.cuda)
        for row, crop in zip(host, crops, strict=True):
            row.copy_(crop.movedim(0, -1))
        if not self.cuda:
            return host.permute(0, 3, 1, 2).float() / 255.0
        with torch.cuda.stream(self.up):
            images = host.to(self.device, non_blocking=True)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self.up)
        images.record_stream(stream)
        return images.permute(0, 3, 1, 2).float() / 255.0

    def _fetch(self, back: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """Tensors on their way to page-locked memory, and what waits until they are there."""
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
        nan, *rest = host
        maps: list[Any]
        if self.coding is None:
            values = DepthMap(rest[0], rest[1], kind)
            maps = [values[i : i + 1] for i in range(len(nan))]
        else:
            codes, low, high, count = (x.split(1) for x in rest)
            whole = zip(codes, low, high, count, strict=True)
            maps = [CodedMaps(*one, self.coding[0], kind) for one in whole]
        return Answer(maps, predicted, nan.tolist())


def camera_of(teacher: Any, region: Tensor, kind: Kind) -> dict[str, float]:
    """What a label of a region (3,H,W) says of its camera: the focal length that the teacher's metres are for, in the
    region's pixels, where the teacher assumes one of its own whatever the photo.
    """
    assumed = getattr(teacher, "assumed_focal", None) if kind.unknown == "metric" else None
    focal = assumed(int(region.shape[-2]), int(region.shape[-1])) if assumed else None
    return {} if focal is None else {"focal": focal}
