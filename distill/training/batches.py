"""From a dataset to the micro-batches of a step: read, chosen and augmented in the data workers.

Each sample has the teachers of its source and learns from one of them: a random number of the step picks it by their
shares. So a micro-batch whose samples have the same teachers has one supervision, and any other may hold several; the
student sees it in one forward pass, and the objective is called once per supervision (ours: steps of a single source
would make losses and batch statistics swing between sources). Only the labels that are trained on are read. A sample
that cannot be read raises a one-line error in the training process, not a worker's traceback.
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
from distill.training.augment import Draw, augment, draw
from distill.training.label_choice import AVERAGES, learnt_labels
from distill.training.sampling import SamplePosition
from distill.training.settings import TrainSettings


class Labelled(Protocol):
    """Samples with random access, and the teachers of each."""

    @property
    def image_keys(self) -> Sequence[str]:
        """One per sample; samples of one image share it."""
        ...

    @property
    def sources(self) -> Sequence[int]:
        """One per sample: the number of its image's source."""
        ...

    def __len__(self) -> int: ...

    def teachers_of(self, index: int, /) -> Sequence[str]:
        """The teachers that labelled sample `index`."""
        ...

    def get(self, index: int, teachers: Sequence[str], /, *, visit: int | None = None) -> Any:
        """Sample `index` with the labels of these teachers only.

        visit: its position in the training stream, for a dataset that draws new crops at every visit; None: its fixed
        crop. A dataset with `stores_codes` takes two more arguments: patches, a function from the number of patches to
        the indices to read, and coded, to leave the maps as codes.
        """
        ...


Collate = Callable[[list[Any]], Batch]


@dataclass(frozen=True, slots=True)
class TaughtRows:
    """The images of a micro-batch with one supervision: their rows (b,), None for all, and their labels."""

    rows: Tensor | None
    labels: Labels
    teacher: str

    def of(self, values: Tensor) -> Tensor:
        """Their rows of `values` (B,...)."""
        return values if self.rows is None else values[self.rows]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One micro-batch of a step: images (B,3,S,S), and which labels belong to which of them.

    features: a frozen encoder's features of the images, float16, where they are stored; else None.
    positions: each image's position in the training stream, the seed of everything else drawn for it; -1 - index for
    held-out images. mirrored: which images the augmentation flipped. waited: seconds that the training process waited
    for this batch; None: the time that `next` took.
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
            TaughtRows(
                None if taught.rows is None else taught.rows.to(device), taught.labels.to(device), taught.teacher
            )
            for taught in self.taught
        ]
        return replace(self, images=self.images.to(device), taught=tuple(taught), features=moved(self.features, device))

    def batches(self) -> list[Batch]:
        """One batch per supervision."""
        rows = [range(len(self.keys)) if taught.rows is None else taught.rows.tolist() for taught in self.taught]
        return [
            Batch(tuple(self.keys[row] for row in taught_rows), taught.of(self.images), {taught.teacher: taught.labels})
            for taught_rows, taught in zip(rows, self.taught, strict=True)
        ]


def shares_among(available: Sequence[str], settings: TrainSettings) -> dict[str, float]:
    """The share of each of a sample's teachers; raises ValueError where the settings give none of them a share."""
    if not settings.teacher_shares:
        if len(available) != 1:
            raise ValueError(
                f"the labels come from {', '.join(available)}: set how often each is used, e.g. "
                f"teacher_shares = {{{', '.join(f'{name} = {1 / len(available):.2g}' for name in available)}}}"
            )
        return dict.fromkeys(available, 1.0)
    used = {name: share for name, share in settings.teacher_shares.items() if share > 0 and name in available}
    if not used:
        raise ValueError(
            f"images labelled only by {', '.join(available)} cannot be used: teacher_shares gives a share only to "
            f"{', '.join(name for name, share in settings.teacher_shares.items() if share > 0)}"
        )
    return used


def check_teachers(dataset: Labelled, indices: Sequence[int], settings: TrainSettings) -> None:
    """Raises LookupError for a teacher without labels, ValueError for samples whose teachers have no share.

    Called before the first step, because the step that needs them may be a day away.
    """
    samples_by_teachers = Counter(tuple(dataset.teachers_of(index)) for index in indices)
    all_teachers = list(dict.fromkeys(name for names in samples_by_teachers for name in names))
    if missing := [name for name, share in settings.teacher_shares.items() if share > 0 and name not in all_teachers]:
        raise LookupError(f"there are no labels by {', '.join(missing)}; the labels are by: {', '.join(all_teachers)}")
    for available in samples_by_teachers:
        shares_among(available, settings)


def labels_to_learn(batch: Batch, settings: TrainSettings, *, teacher: str, among: Mapping[str, float]) -> Batch:
    """The batch with only the labels of `teacher` ("average": of all), converted to the kind the student predicts."""
    s = settings
    learnt = learnt_labels(batch.labels, teachers=among, name=teacher, kind=s.kind, keep_unconvertible=s.keep_unmet)
    return Batch(batch.keys, batch.images, {teacher: learnt})


@dataclass(frozen=True, slots=True)
class Item:
    """A sample that was read: its position, its teachers' shares, the teacher to use ("" in a held-out batch).

    draw: of its augmentation; None in a held-out batch.
    """

    place: SamplePosition
    among: dict[str, float]
    teacher: str
    sample: Any
    draw: Draw | None = None
    features: Features | None = None


def collated(make: Callable[[list[Item]], Any], items: Sequence[Item | Exception]) -> Any:
    """`make` of items that were all read; else the first error among them, or that of `make`, returned, not raised."""
    read = [item for item in items if isinstance(item, Item)]
    if len(read) < len(items):
        return next(item for item in items if isinstance(item, Exception))
    try:
        return make(read)
    except (ValueError, LookupError, OSError) as error:
        return error


@dataclass(frozen=True, slots=True)
class Group:
    """Images of a micro-batch that are alike: rows, positions in the stream, draws, the teacher used and all shares."""

    rows: tuple[int, ...]
    positions: tuple[int, ...]
    draws: tuple[Draw, ...]
    teacher: str
    among: Mapping[str, float]


def groups_of(items: Sequence[Item]) -> list[Group]:
    """The items grouped by teachers and, as far as the objective distinguishes them, supervision."""
    rows_of: dict[Hashable, list[int]] = {}
    for row, item in enumerate(items):
        key: list[Hashable] = [item.teacher]
        if not item.teacher or item.teacher in AVERAGES:
            key += item.among
        if isinstance(item.sample, Sample):
            for name, labels in item.sample.answers.items():
                key.append((name, labels.supervision.truth, labels.supervision.dense, labels.shared.kind))
        rows_of.setdefault(tuple(key), []).append(row)
    groups = []
    for rows in rows_of.values():
        alike = [items[row] for row in rows]
        positions, draws = tuple(item.place.position for item in alike), tuple(item.draw or Draw() for item in alike)
        groups.append(Group(tuple(rows), positions, draws, alike[0].teacher, alike[0].among))
    return groups


def augmented_batch(group: Group, batch: Batch, settings: TrainSettings) -> Batch:
    """The group's batch as the step sees it: with the labels to learn from, augmented."""
    s, averaged = settings, group.teacher in AVERAGES
    if not averaged:  # before the augmentation, which then has fewer maps; averages have weights, so they come after
        batch = labels_to_learn(batch, s, teacher=group.teacher, among=group.among)
    batch = augment(
        batch,
        group.draws,
        color_jitter=s.color_jitter,
        random_resized_crop=s.random_resized_crop,
        rotation=s.rotation,
        canonical=s.canonical_focal > 0,
    )
    return labels_to_learn(batch, s, teacher=group.teacher, among=group.among) if averaged else batch


def draw_of(position: int, s: TrainSettings) -> Draw:
    """The draws of the augmentation at a stream position."""
    return draw(
        position,
        seed=s.seed,
        hflip=s.hflip,
        color_jitter=s.color_jitter,
        random_resized_crop=s.random_resized_crop,
        rotation=s.rotation,
    )


def join_groups(groups: Sequence[Group], batches: Sequence[Batch]) -> MicroBatch:
    """Finished batches of the groups as one micro-batch, its images in the order of the stream."""
    of_row = {
        row: (position, draw.mirrored)
        for group in groups
        for row, position, draw in zip(group.rows, group.positions, group.draws, strict=True)
    }
    positions, is_flipped = zip(*(of_row[row] for row in sorted(of_row)), strict=True)
    if len(groups) == 1:
        [batch], [group] = batches, groups
        taught_all = TaughtRows(None, batch.labels[group.teacher], group.teacher)
        return MicroBatch(batch.keys, batch.images, (taught_all,), positions, is_flipped)
    count = sum(len(group.rows) for group in groups)
    keys, images = [""] * count, batches[0].images.new_empty(count, *batches[0].images.shape[1:])
    taught = []
    for group, batch in zip(groups, batches, strict=True):
        rows = torch.tensor(group.rows).to(images.device, non_blocking=True)
        taught.append(TaughtRows(rows, batch.labels[group.teacher], group.teacher))
        images[rows] = batch.images
        for row, key in zip(group.rows, batch.keys, strict=True):
            keys[row] = key
    return MicroBatch(tuple(keys), images, tuple(taught), positions, is_flipped)
