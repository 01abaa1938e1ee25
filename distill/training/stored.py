"""Batches that workers pass on in the shards' encoding, and that are decoded on the device.

An image is three bytes a pixel and a map two; they are collated in the workers, handed over (handover.py), copied one
batch ahead, and decoded and augmented on the step's device, by the same code as on the host: the result equals that of
`batches` there, bit for bit before colours are jittered (metric depth of a canonical camera to the last bit but one:
codes are scaled by their range, values each).

Shapes: B images, S region size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from distill.core.codes import CodedLabels, stack
from distill.core.division import unit_range
from distill.core.labels import Batch
from distill.shards.codec import Sample, common_teachers
from distill.shards.features import FeatureStore, StackedFeatures, stacked
from distill.training.batches import (
    Group,
    Item,
    Labelled,
    MicroBatch,
    augmented_batch,
    collated,
    groups_of,
    join_groups,
)
from distill.training.handover import Giving, Handed, Handover, handover_for, packed, unpacked
from distill.training.label_choice import convert_labels
from distill.training.loading import StreamSamples, loader_of, readers_of
from distill.training.sampling import MicroBatchPositions
from distill.training.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """Images of one supervision. images: (b,3,S,S) uint8. labels: by teacher."""

    group: Group
    keys: tuple[str, ...]
    images: Tensor
    labels: dict[str, CodedLabels]


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """A micro-batch before it is decoded."""

    groups: tuple[StoredGroup, ...]
    features: StackedFeatures | None = None

    def pin_memory(self) -> StoredBatch:
        """The same in page-locked memory; called by a DataLoader with pin_memory."""
        return self.moved(Tensor.pin_memory)[0]

    def moved(self, move: Callable[[Tensor], Tensor]) -> tuple[StoredBatch, list[Tensor]]:
        """The same with each of its tensors moved, and these."""
        content, tensors = packed(self)
        tensors = [move(tensor) for tensor in tensors]
        return unpacked(content, tensors), tensors

    def ready(self, settings: TrainSettings) -> MicroBatch:
        """The decoded micro-batch of a step, made on the tensors' device."""
        batches = []
        for g in self.groups:
            s = settings
            labels = {name: convert_labels(coded.decode(), s.kind, s.keep_unmet) for name, coded in g.labels.items()}
            batches.append(augmented_batch(g.group, Batch(g.keys, unit_range(g.images), labels), settings))
        micro = join_groups([g.group for g in self.groups], batches)
        return replace(micro, features=self.features)


def collate_stored(items: Sequence[Item | Exception]) -> Any:
    """The StoredBatch of items of a dataset that stores codes, or the error that `collated` returns."""
    return collated(_stored_batch, items)


def _stored_batch(read: list[Item]) -> StoredBatch:
    groups = tuple(_group(group, [read[row].sample for row in group.rows]) for group in groups_of(read))
    return StoredBatch(groups, stacked([item.features for item in read]))


def _group(group: Group, samples: Sequence[Sample]) -> StoredGroup:
    names = common_teachers(samples, [sample.coded for sample in samples])
    images = torch.stack([sample.image for sample in samples])
    labels = {name: stack([sample.coded[name] for sample in samples]) for name in names}
    return StoredGroup(group, tuple(sample.key for sample in samples), images, labels)


def stored_batches(
    dataset: Labelled,
    positions: MicroBatchPositions,
    *,
    settings: TrainSettings,
    device: torch.device,
    features: FeatureStore | None = None,
) -> Generator[MicroBatch, None, None]:
    """This process's micro-batches on the device, in order; the next one is copied while a step runs."""
    samples = StreamSamples(dataset, settings, training=True, coded=True, features=features)
    cuda, collate = device.type == "cuda", collate_stored
    readers = readers_of(samples, positions, collate, settings.workers, measured=cuda)
    if not cuda:
        for batch in loader_of(samples, positions, collate, readers):
            yield batch.ready(settings)
        return
    handover = handover_for(readers.processes, readers.size)
    number = len(positions)
    if handover is None:
        source = loader_of(samples, positions, collate, readers, pinned=True)
        yield from _on_device(source, number, None, settings, device)
        return
    with handover.held():
        started = partial(handover.lock, device, number)
        source = loader_of(samples, positions, Giving(collate, handover), readers, started=started, end=handover.end)
        yield from _on_device(source, number, handover, settings, device)


def _on_device(
    batches: Iterator[StoredBatch | Handed],
    number: int,
    handover: Handover | None,
    settings: TrainSettings,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """Yields `number` batches, each sent to the device during the previous step and decoded there.

    No further batch is requested: at its end a loader waits a second for its processes, before the last step has run.
    """
    batches = islice(batches, number)
    stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
    sent: list[tuple[Handed, Any]] = []

    def send(batch: StoredBatch | Handed) -> tuple[StoredBatch, list[Tensor]]:
        with torch.cuda.stream(stream):
            if handover is None or not isinstance(batch, Handed):
                return cast(StoredBatch, batch).moved(lambda x: x.to(device, non_blocking=True))
            received, memory = handover.take(batch, device)
            sent.append((batch, None if stream is None else stream.record_event()))
            return received, [memory]

    def following() -> tuple[StoredBatch | None, list[Tensor], float]:
        """Sends the next batch; returns it, its memory and the seconds spent waiting for it.

        Frees the slot of the one before.
        """
        for batch, arrival in sent:
            if arrival is not None:
                arrival.synchronize()
            assert handover is not None
            handover.release(batch)
        sent.clear()
        start = time.perf_counter()
        read = next(batches, None)
        waited = time.perf_counter() - start
        return *((None, []) if read is None else send(read)), waited

    next_batch, memory, waited = following()
    while next_batch is not None:
        if stream is not None:
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            for tensor in memory:
                tensor.record_stream(current)
        micro = next_batch.ready(settings)
        next_batch, memory, waited_next = following()
        yield replace(micro, waited=waited + waited_next)
        waited = 0.0
