"""From a dataset to the micro-batches a step learns from: read, chosen and augmented in the data workers.

Each sample has the teachers that its source has, and learns from one of them: the step's where it has that one, else
its own draw. A micro-batch may so hold several supervisions; the student sees it whole, in one forward pass, and the
objective is asked for each supervision's images (ours: a step of one source alone would swing between sources, and a
batch statistic with it). Only the labels that are learnt from are read. A sample that cannot be read comes out as its
own one-line error in the training process, not as a worker's traceback.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.core import machine
from distill.core.labels import Batch, Labels
from distill.shards.codec import Sample
from distill.shards.features import Features, FeatureStore, StackedFeatures, moved, stacked
from distill.training.augment import augment, mirrored
from distill.training.sampling import (
    AVERAGES,
    MicroBatchPositions,
    SamplePosition,
    choose_patches,
    choose_teacher,
    learnt_labels,
    meet_labels,
)
from distill.training.settings import TrainSettings

_log = logging.getLogger(__name__)
PREFETCH = 4  # micro-batches per worker that lie ready
PATIENCE = 1800  # seconds for one micro-batch; labelling online by a large teacher on a CPU takes minutes


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
    held-out images -1 - their index. mirrored: which of them the augmentation has turned.
    """

    keys: tuple[str, ...]
    images: Tensor
    taught: tuple[TaughtRows, ...]
    positions: tuple[int, ...] = ()
    mirrored: tuple[bool, ...] = ()
    features: StackedFeatures | None = None

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


def _alike(items: Sequence[Item]) -> list[list[int]]:
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
    """The items by what `_alike` says."""
    return [
        Group(tuple(rows), tuple(items[r].place.position for r in rows), items[rows[0]].teacher, items[rows[0]].among)
        for rows in _alike(items)
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
    )
    return labels_to_learn(batch, s, teacher=group.teacher, among=group.among) if averaged else batch


def _mirrored(positions: Sequence[int], s: TrainSettings) -> tuple[bool, ...]:
    crop = s.random_resized_crop
    return mirrored(positions, seed=s.seed, hflip=s.hflip, random_resized_crop=crop, rotation=s.rotation)


def joined(groups: Sequence[Group], batches: Sequence[Batch], settings: TrainSettings) -> MicroBatch:
    """Finished batches of the groups as one micro-batch, its images in the order of the stream."""
    placed = sorted((row, place) for group in groups for row, place in zip(group.rows, group.positions, strict=True))
    positions = tuple(place for _, place in placed)
    s = settings
    turned = _mirrored(positions, s)
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


@dataclass(frozen=True, slots=True)
class _Training:
    """Makes the micro-batch of places of the stream."""

    collate: Collate
    settings: TrainSettings

    def __call__(self, items: list[Item | Exception]) -> MicroBatch | Exception:
        read = [item for item in items if isinstance(item, Item)]
        if len(read) < len(items):
            return next(item for item in items if isinstance(item, Exception))
        try:
            groups = groups_of(read)
            batches = [self.collate([read[row].sample for row in group.rows]) for group in groups]
            done = [finished(g, batch, self.settings) for g, batch in zip(groups, batches, strict=True)]
            return replace(joined(groups, done, self.settings), features=stacked([item.features for item in read]))
        except (ValueError, LookupError, OSError) as error:
            return error


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """Makes held-out batches: the labels of every teacher that is learnt from, unchanged."""

    collate: Collate
    settings: TrainSettings

    def __call__(self, items: list[Item | Exception]) -> list[tuple[float, MicroBatch]] | Exception:
        read = [item for item in items if isinstance(item, Item)]
        if len(read) < len(items):
            return next(item for item in items if isinstance(item, Exception))
        s = self.settings
        made = []
        try:
            for rows in _alike(read):
                batch, among = self.collate([read[row].sample for row in rows]), read[rows[0]].among
                seen = stacked([read[row].features for row in rows])
                weights = among if s.strategy == "select" else {s.strategy: 1.0}
                for name, weight in weights.items():
                    labels = labels_to_learn(batch, s, teacher=name, among=among).labels[name]
                    places = tuple(-1 - read[row].place.index for row in rows)
                    taught = (TaughtRows(None, labels, name),)
                    micro = MicroBatch(batch.keys, batch.images, taught, places, (False,) * len(rows), seen)
                    made.append((weight / sum(weights.values()), micro))
            return made
        except (ValueError, LookupError, OSError) as error:
            return error


class Placed(Dataset[Any]):
    """The samples at places of the stream; a sample that cannot be read is the error that says why.

    learning: with the labels of the one teacher that is learnt from, and drawn anew at every visit; else with all.
    coded: with maps that are codes still, from a dataset that stores codes.
    """

    def __init__(
        self,
        dataset: Labelled,
        settings: TrainSettings,
        *,
        learning: bool,
        coded: bool = False,
        features: FeatureStore | None = None,
    ) -> None:
        self.dataset, self.settings, self.learning, self.features = dataset, settings, learning, features
        self.more: dict[str, Any] = {"coded": True} if coded else {}

    def __getitem__(self, place: SamplePosition) -> Item | Exception:
        s = self.settings
        try:
            among = shares_among(self.dataset.teachers_of(place.index), s)
            teacher, asked = "", list(among)
            if self.learning:
                teacher = s.strategy
                if s.strategy == "select":
                    teacher = choose_teacher(among, seed=s.seed, step=place.position // s.batch_size)
                    asked = [teacher]
            visit, more = None, dict(self.more)
            if self.learning:
                visit = place.position
                if s.patches_per_step and getattr(self.dataset, "stores_codes", False):
                    more["patches"] = partial(choose_patches, s.patches_per_step, s.seed, place.position)
            get: Callable[..., Any] = self.dataset.get
            sample = get(place.index, asked, visit=visit, **more)
            if isinstance(
                sample, Sample
            ):  # before they are joined: measured depth and rendered disparity are one truth
                met = {name: meet_labels(labels, s.kind, s.keep_unmet) for name, labels in sample.labels.items()}
                sample = replace(sample, labels=met)
            return Item(place, among, teacher, sample, self._features(place, sample))
        except (ValueError, LookupError, OSError) as error:
            return error

    def _features(self, place: SamplePosition, sample: Any) -> Features | None:
        if self.features is None:
            return None
        turned = self.learning and _mirrored((place.position,), self.settings)[0]
        return self.features.get(sample.key, mirrored=turned)


def _freeze(_worker: int) -> None:
    # The parent's objects are moved out of the collector's sight: a collection would copy every page of them.
    gc.freeze()
    torch.set_num_threads(1)


def loader_of(samples: Any, batches: Any, collate: Any, workers: int, *, pinned: bool = False) -> Iterator[Any]:
    """What `collate` makes of each batch of places, read ahead by so many processes; raises an Exception among it."""
    ahead = PREFETCH
    if workers and not machine.is_plentiful():
        size, tensors = _measure(collate([samples[place] for place in next(iter(batches), [])]))
        workers, ahead, warning = machine.readers(workers, ahead, size=size, tensors=tensors)
        if warning:
            _log.warning("%s", warning)
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        timeout=PATIENCE if workers else 0,
        worker_init_fn=_freeze,
        pin_memory=pinned,
    )
    items = iter(loader)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise OSError(_lost(str(error).splitlines()[0])) from error
        if isinstance(item, Exception):
            raise item
        yield item


def _measure(item: Any) -> tuple[int, int]:
    """Bytes and number of the tensors in what a data worker hands over."""
    if isinstance(item, Tensor):
        return item.numel() * item.element_size(), 1
    if is_dataclass(item):
        parts: list[Any] = [getattr(item, one.name) for one in fields(item)]
    else:
        parts = [*item.values()] if isinstance(item, Mapping) else list(item) if isinstance(item, tuple | list) else []
    found = [_measure(part) for part in parts]
    return sum(size for size, _ in found), sum(count for _, count in found)


def _lost(reason: str) -> str:
    """A line about reading processes that died or do not answer."""
    free = machine.shared_memory()
    memory = "" if free is None else f", of which {free / 1e6:.0f} MB are free (docker run --shm-size=8g)"
    return (
        f"a process that reads samples died or does not answer ({reason}): it lacked memory, or shared memory at "
        f"{machine.SHARED}{memory}; lower train.workers, 0 reads without them. The same command goes on from the last "
        "checkpoint"
    )


def training_batches(
    dataset: Labelled,
    micro_batches: MicroBatchPositions,
    *,
    collate: Collate,
    settings: TrainSettings,
    features: FeatureStore | None = None,
) -> Iterator[MicroBatch]:
    """This process's micro-batches, in order, read ahead by `settings.workers` processes.

    Raises what `check_teachers` raises, before anything is read.
    """
    check_teachers(dataset, micro_batches.order.indices, settings)
    samples = Placed(dataset, settings, learning=True, features=features)
    return loader_of(samples, micro_batches, _Training(collate, settings), settings.workers)


def heldout_batches(
    dataset: Labelled,
    indices: Sequence[int],
    *,
    collate: Collate,
    settings: TrainSettings,
    process: int,
    processes: int,
    features: FeatureStore | None = None,
) -> Iterator[list[tuple[float, MicroBatch]]]:
    """This process's share of the held-out samples: for each batch, every teacher's weight and labels."""
    size = settings.eval_batch_size
    places = [[SamplePosition(i, i) for i in indices[start : start + size]] for start in range(0, len(indices), size)]
    mine = places[process::processes]
    if not mine:
        return iter(())
    samples = Placed(dataset, settings, learning=False, features=features)
    return loader_of(samples, mine, _HeldOut(collate, settings), min(settings.workers, len(mine)))
