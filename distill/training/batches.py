"""From a dataset to the micro-batches a step learns from: read, chosen and augmented in the data workers.

Each sample has the teachers that its source has, and learns from one of them: the step's where it has that one, else
its own draw. A micro-batch may so hold several supervisions; the student sees it whole, in one forward pass, and the
objective is asked for each supervision's images (ours: a step of one source alone would swing between sources, and a
batch statistic with it). Only the labels that are learnt from are read. A sample that cannot be read comes out as its
own one-line error in the training process, not as a worker's traceback.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.core.labels import Batch, Labels
from distill.shards.codec import Sample
from distill.shards.features import Features, StackedFeatures, moved
from distill.training.augment import augment, mirrored
from distill.training.label_choice import AVERAGES, learnt_labels
from distill.training.sampling import SamplePosition
from distill.training.settings import TrainSettings


class Labelled(Protocol):
    """Samples at random access, and who taught on each."""

    @property
    def image_keys(self) -> Sequence[str]:
        """One per sample; samples of one image share it."""
        ...

    @property
    def sources(self) -> Sequence[int]:
        """One per sample: the number of the source that its image came from."""
        ...

    def __len__(self) -> int: ...

    def teachers_of(self, index: int, /) -> Sequence[str]:
        """Whose labels sample `index` can have."""
        ...

    def get(self, index: int, teachers: Sequence[str], /, *, visit: int | None = None) -> Any:
        """Sample `index` with the labels of these teachers alone.

        visit: its place in the training stream, for a dataset whose crops are drawn anew at every visit; None: as
        always. A dataset with `stores_codes` takes two more: patches, a function of their number that says which to
        read, and coded, to leave the maps as codes.
        """
        ...


Collate = Callable[[list[Any]], Batch]


@dataclass(frozen=True, slots=True)
class TaughtRows:
    """The images of a micro-batch that one supervision teaches on: rows (b,), None for all, and their labels."""

    rows: Tensor | None
    labels: Labels
    teacher: str

    def of(self, values: Tensor) -> Tensor:
        """Their rows of `values` (B,...)."""
        return values if self.rows is None else values[self.rows]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one micro-batch of a step learns from: images (B,3,S,S), and who teaches on which of them.

    features: what a frozen encoder sees in the images, float16, where it is stored; else None.
    positions: each image's place in the training stream, which whatever else is drawn for it is a function of; of
    held-out images -1 - their index. mirrored: which of them the augmentation has turned. waited: seconds that the
    training process stood still for its data; None: as long as it took to get it.
    """

    keys: tuple[str, ...]
    images: Tensor
    taught: tuple[TaughtRows, ...]
    positions: tuple[int, ...] = ()
    mirrored: tuple[bool, ...] = ()
    features: StackedFeatures | None = None
    waited: float | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on another device."""
        taught = [
            TaughtRows(None if one.rows is None else one.rows.to(device), one.labels.to(device), one.teacher)
            for one in self.taught
        ]
        return replace(self, images=self.images.to(device), taught=tuple(taught), features=moved(self.features, device))

    def batches(self) -> list[Batch]:
        """A batch for every supervision."""
        rows = [range(len(self.keys)) if one.rows is None else one.rows.tolist() for one in self.taught]
        return [
            Batch(tuple(self.keys[row] for row in mine), one.of(self.images), {one.teacher: one.labels})
            for mine, one in zip(rows, self.taught, strict=True)
        ]


def shares_among(available: Sequence[str], settings: TrainSettings) -> dict[str, float]:
    """How often each teacher of a sample is learnt from; ValueError where nothing says so, or none of them is."""
    if not settings.teacher_shares:
        if len(available) != 1:
            raise ValueError(
                f"the labels come from {', '.join(available)}: say how often each is learnt from, e.g. "
                f"teacher_shares = {{{', '.join(f'{name} = {1 / len(available):.2g}' for name in available)}}}"
            )
        return dict.fromkeys(available, 1.0)
    used = {name: share for name, share in settings.teacher_shares.items() if share > 0 and name in available}
    if not used:
        raise ValueError(
            f"images labelled by {', '.join(available)} alone teach nothing: teacher_shares gives a share to "
            f"{', '.join(name for name, share in settings.teacher_shares.items() if share > 0)}"
        )
    return used


def check_teachers(dataset: Labelled, indices: Sequence[int], settings: TrainSettings) -> None:
    """Raises LookupError for a teacher whose labels nobody has, ValueError for samples that nobody teaches on.

    Before the first step, for the step that needs them may be a day away.
    """
    known = Counter(tuple(dataset.teachers_of(index)) for index in indices)
    every = list(dict.fromkeys(name for names in known for name in names))
    if missing := [name for name, share in settings.teacher_shares.items() if share > 0 and name not in every]:
        raise LookupError(f"there are no labels by {', '.join(missing)}; the labels hold: {', '.join(every)}")
    for available in known:
        shares_among(available, settings)


def labels_to_learn(batch: Batch, settings: TrainSettings, *, teacher: str, among: Mapping[str, float]) -> Batch:
    """The batch with the labels of `teacher` alone ("average": of all), of the kind that the student predicts."""
    s = settings
    learnt = learnt_labels(batch.labels, teachers=among, name=teacher, kind=s.kind, keep_unmet=s.keep_unmet)
    return Batch(batch.keys, batch.images, {teacher: learnt})


@dataclass(frozen=True, slots=True)
class Item:
    """A sample that was read: its place, its teachers' shares, the one to learn from ("" in a held-out batch)."""

    place: SamplePosition
    among: dict[str, float]
    teacher: str
    sample: Any
    features: Features | None = None


def alike(items: Sequence[Item]) -> list[list[int]]:
    """The rows that go together: of the same teachers and, as far as the objective can tell, one supervision."""
    groups: dict[Hashable, list[int]] = {}
    for row, item in enumerate(items):
        key: list[Hashable] = [item.teacher, *item.among] if not item.teacher or item.teacher in AVERAGES else []
        key.append(item.teacher)
        if isinstance(item.sample, Sample):
            for name, labels in item.sample.answers.items():
                key.append((name, labels.supervision.truth, labels.supervision.dense, labels.shared.kind))
        groups.setdefault(tuple(key), []).append(row)
    return list(groups.values())


@dataclass(frozen=True, slots=True)
class Group:
    """Images of a micro-batch that are alike: their rows, their places in the stream, and who of whom teaches."""

    rows: tuple[int, ...]
    positions: tuple[int, ...]
    teacher: str
    among: Mapping[str, float]


def groups_of(items: Sequence[Item]) -> list[Group]:
    """The items by what `alike` says."""
    return [
        Group(tuple(rows), tuple(items[r].place.position for r in rows), items[rows[0]].teacher, items[rows[0]].among)
        for rows in alike(items)
    ]


def finished(group: Group, batch: Batch, settings: TrainSettings) -> Batch:
    """The group's batch as the step sees it: the labels that it learns from, augmented."""
    s, averaged = settings, group.teacher in AVERAGES
    if not averaged:  # before the augmentation, which then has fewer maps to turn; an average has weights
        batch = labels_to_learn(batch, s, teacher=group.teacher, among=group.among)
    batch = augment(
        batch,
        group.positions,
        seed=s.seed,
        hflip=s.hflip,
        color_jitter=s.color_jitter,
        random_resized_crop=s.random_resized_crop,
        rotation=s.rotation,
        canonical=s.canonical_focal > 0,
    )
    return labels_to_learn(batch, s, teacher=group.teacher, among=group.among) if averaged else batch


def is_mirrored(positions: Sequence[int], s: TrainSettings) -> tuple[bool, ...]:
    """Which of the images at these places of the stream the augmentation mirrors."""
    crop = s.random_resized_crop
    return mirrored(positions, seed=s.seed, hflip=s.hflip, random_resized_crop=crop, rotation=s.rotation)


def joined(groups: Sequence[Group], batches: Sequence[Batch], settings: TrainSettings) -> MicroBatch:
    """Finished batches of the groups as one micro-batch, its images in the order of the stream."""
    placed = sorted((row, place) for group in groups for row, place in zip(group.rows, group.positions, strict=True))
    positions = tuple(place for _, place in placed)
    s = settings
    turned = is_mirrored(positions, s)
    if len(groups) == 1:
        [batch], [group] = batches, groups
        taught_all = TaughtRows(None, batch.labels[group.teacher], group.teacher)
        return MicroBatch(batch.keys, batch.images, (taught_all,), positions, turned)
    count = sum(len(group.rows) for group in groups)
    keys, images = [""] * count, batches[0].images.new_empty(count, *batches[0].images.shape[1:])
    taught = []
    for group, batch in zip(groups, batches, strict=True):
        rows = torch.tensor(group.rows).to(images.device, non_blocking=True)
        taught.append(TaughtRows(rows, batch.labels[group.teacher], group.teacher))
        images[rows] = batch.images
        for row, key in zip(group.rows, batch.keys, strict=True):
            keys[row] = key
    return MicroBatch(tuple(keys), images, tuple(taught), positions, turned)
