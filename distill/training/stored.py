"""Batches that leave the workers as the shards store them, and become what a step learns from on the device.

An image is three bytes a pixel and a map two; they are joined in the workers, handed over (handover.py), copied one
batch ahead, and decoded and augmented where the step runs, by the code that serves the host: what comes out is what
`batches` makes there, bit for bit before colours are jittered.

Shapes: B images, S region size.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from distill.core.codes import CodedLabels, stack
from distill.core.labels import Batch
from distill.shards.codec import Sample
from distill.shards.features import FeatureStore, StackedFeatures, stacked
from distill.training.batches import (
    Group,
    Item,
    Labelled,
    MicroBatch,
    finished,
    groups_of,
    joined,
)
from distill.training.handover import Giving, Handed, Handover, handover_for, mapped, tensors_of
from distill.training.label_choice import meet_labels
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
        """The same in page-locked memory; a DataLoader that pins asks for it."""
        pinned: StoredBatch = mapped(self, Tensor, Tensor.pin_memory)
        return pinned

    def ready(self, settings: TrainSettings) -> MicroBatch:
        """What a step learns from, made where the tensors are."""
        batches = []
        for g in self.groups:
            s = settings
            labels = {name: meet_labels(one.decode(), s.kind, s.keep_unmet) for name, one in g.labels.items()}
            batches.append(finished(g.group, Batch(g.keys, g.images.float() / 255.0, labels), settings))
        micro = joined([g.group for g in self.groups], batches, settings)
        return replace(micro, features=self.features)


def collate_stored(items: Sequence[Item | Exception]) -> StoredBatch | Exception:
    """Items of a dataset that stores codes as one batch; the first error among them where there is one."""
    read = [item for item in items if isinstance(item, Item)]
    if len(read) < len(items):
        return next(item for item in items if isinstance(item, Exception))
    try:
        groups = tuple(_group(group, [read[row].sample for row in group.rows]) for group in groups_of(read))
        return StoredBatch(groups, stacked([item.features for item in read]))
    except (ValueError, LookupError, OSError) as error:
        return error


def _group(group: Group, samples: Sequence[Sample]) -> StoredGroup:
    names = list(samples[0].coded)
    for sample in samples:
        if sorted(sample.coded) != sorted(names) or sample.image.shape != samples[0].image.shape:
            raise ValueError(
                f"{sample.key} and {samples[0].key} do not go into one batch: they have labels by "
                f"{', '.join(sample.coded)} and {', '.join(names)}, sizes {tuple(sample.image.shape)} and "
                f"{tuple(samples[0].image.shape)}"
            )
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
    """This process's micro-batches on the device, in order; the next one is on its way while a step runs."""
    samples = StreamSamples(dataset, settings, learning=True, coded=True, features=features)
    cuda, collate = device.type == "cuda", collate_stored
    readers = readers_of(samples, positions, collate, settings.workers, measured=cuda)
    if not cuda:
        for batch in loader_of(samples, positions, collate, readers):
            yield batch.ready(settings)
        return
    handover = handover_for(readers.processes, readers.size)
    number = len(positions)
    if handover is None:
        given = loader_of(samples, positions, collate, readers, pinned=True)
        yield from _on_device(given, number, None, settings, device)
        return
    with handover.held():
        given = loader_of(samples, positions, Giving(collate, handover), readers, end=handover.end)
        yield from _on_device(given, number, handover, settings, device)


def _on_device(
    batches: Iterator[StoredBatch | Handed],
    number: int,
    handover: Handover | None,
    settings: TrainSettings,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """So many batches, each sent while the step before it runs, and decoded where it arrives.

    No more is asked for: at its end a loader waits for its processes, a second, and the last step is still to come.
    """
    batches = islice(batches, number)
    stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
    sent: list[tuple[Handed, Any]] = []

    def send(batch: StoredBatch | Handed) -> StoredBatch:
        with torch.cuda.stream(stream):
            if handover is None or not isinstance(batch, Handed):
                return cast(StoredBatch, mapped(batch, Tensor, lambda x: x.to(device, non_blocking=True)))
            there: StoredBatch = handover.take(batch, device)
            sent.append((batch, None if stream is None else stream.record_event()))
            return there

    def following() -> tuple[StoredBatch | None, float]:
        """The next batch on its way, and seconds that it was waited for. The slot of the one before is free again."""
        for batch, arrival in sent:
            if arrival is not None:
                arrival.synchronize()
            assert handover is not None
            handover.release(batch)
        sent.clear()
        start = time.perf_counter()
        given = next(batches, None)
        waited = time.perf_counter() - start
        return (None if given is None else send(given)), waited

    coming, waited = following()
    while coming is not None:
        if stream is not None:
            here = torch.cuda.current_stream(device)
            here.wait_stream(stream)
            for tensor in tensors_of(coming):
                tensor.record_stream(here)
        micro = coming.ready(settings)
        coming, more = following()
        yield replace(micro, waited=waited + more)
        waited = 0.0
