"""Batches that leave the workers as the shards store them, and become what a step learns from on the device.

An image is three bytes a pixel and a map two; they are joined in the workers, pinned, copied one batch ahead, and
decoded and augmented where the step runs, by the code that serves the host: what comes out is what `batches` makes
there, bit for bit before colours are jittered.

Shapes: B images, S region size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.core.codes import CodedLabels, stack
from distill.core.labels import Batch
from distill.shards.codec import Sample
from distill.shards.features import FeatureStore, StackedFeatures, moved, stacked
from distill.training.batches import (
    Group,
    Item,
    Labelled,
    MicroBatch,
    finished,
    groups_of,
    joined,
)
from distill.training.label_choice import meet_labels
from distill.training.loading import Placed, loader_of
from distill.training.sampling import MicroBatchPositions
from distill.training.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """Images of one supervision. images: (b,3,S,S) uint8. labels: by teacher."""

    group: Group
    keys: tuple[str, ...]
    images: Tensor
    labels: dict[str, CodedLabels]

    def tensors(self) -> list[Tensor]:
        """Everything that was copied."""
        return [self.images, *(x for one in self.labels.values() for x in one.tensors())]


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """A micro-batch before it is decoded."""

    groups: tuple[StoredGroup, ...]
    features: StackedFeatures | None = None

    def pin_memory(self) -> StoredBatch:
        """The same in page-locked memory; a DataLoader that pins asks for it."""
        return StoredBatch(
            tuple(
                replace(g, images=g.images.pin_memory(), labels={n: one.pin_memory() for n, one in g.labels.items()})
                for g in self.groups
            ),
            None if self.features is None else tuple((p.pin_memory(), c.pin_memory()) for p, c in self.features),
        )

    def to(self, device: torch.device) -> StoredBatch:
        """The same on a device; copies from pinned memory do not wait."""
        return StoredBatch(
            tuple(
                replace(
                    g,
                    images=g.images.to(device, non_blocking=True),
                    labels={n: one.to(device) for n, one in g.labels.items()},
                )
                for g in self.groups
            ),
            moved(self.features, device),
        )

    def tensors(self) -> list[Tensor]:
        """Everything that was copied."""
        return [x for g in self.groups for x in g.tensors()] + [x for pair in self.features or () for x in pair]

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
) -> Iterator[MicroBatch]:
    """This process's micro-batches on the device, in order; the next one is on its way while a step runs."""
    samples = Placed(dataset, settings, learning=True, coded=True, features=features)
    cuda = device.type == "cuda"
    batches: Iterator[StoredBatch] = loader_of(samples, positions, collate_stored, settings.workers, pinned=cuda)
    if not cuda:
        for batch in batches:
            yield batch.to(device).ready(settings)
        return
    stream: Any = torch.cuda.Stream(device)

    def send(batch: StoredBatch) -> StoredBatch:
        with torch.cuda.stream(stream):
            return batch.to(device)

    ahead = next(batches, None)
    coming = None if ahead is None else send(ahead)
    while coming is not None:
        here = torch.cuda.current_stream(device)
        here.wait_stream(stream)
        for tensor in coming.tensors():
            tensor.record_stream(here)
        micro = coming.ready(settings)
        ahead = next(batches, None)
        coming = None if ahead is None else send(ahead)
        yield micro
