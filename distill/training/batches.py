"""From a dataset to the micro-batches a step learns from: read, chosen and augmented in the data workers.

Only the labels that the step learns from leave a worker, already of the kind that the student predicts. A sample that
cannot be read comes out as its own one-line error in the training process, not as a worker's traceback.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from distill.core.labels import Batch, Labels
from distill.training.augment import augment
from distill.training.sampling import MicroBatchPositions, SamplePosition, choose_teacher, learnt_labels
from distill.training.settings import TrainSettings

PREFETCH = 4  # micro-batches per worker that lie ready


class Labelled(Protocol):
    """A map-style dataset of samples."""

    @property
    def image_keys(self) -> Sequence[str]:
        """One per sample; samples of one image share it."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Collate = Callable[[list[Any]], Batch]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one micro-batch of a step learns from: batch.labels holds the labels of `teacher` alone."""

    batch: Batch
    teacher: str

    @property
    def labels(self) -> Labels:
        """The labels to learn."""
        return self.batch.labels[self.teacher]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on another device."""
        labels = {name: part.to(device) for name, part in self.batch.labels.items()}
        return MicroBatch(Batch(self.batch.keys, self.batch.images.to(device), labels), self.teacher)


def shares(batch: Batch, settings: TrainSettings) -> dict[str, float]:
    """How often each teacher is learnt from; ValueError where the labels do not say or a teacher's are missing."""
    if not settings.teacher_shares:
        if len(batch.labels) != 1:
            raise ValueError(
                f"the labels come from {', '.join(batch.labels)}: say how often each is learnt from, e.g. "
                f"teacher_shares = {{{', '.join(f'{name} = {1 / len(batch.labels):.2g}' for name in batch.labels)}}}"
            )
        return dict.fromkeys(batch.labels, 1.0)
    used = {name: share for name, share in settings.teacher_shares.items() if share > 0}
    if missing := [name for name in used if name not in batch.labels]:
        raise ValueError(
            f"{batch.keys[0]} has no labels by {', '.join(missing)}; the labels hold: {', '.join(batch.labels)}"
        )
    return used


def labels_to_learn(batch: Batch, settings: TrainSettings, *, teacher: str, among: Mapping[str, float]) -> Batch:
    """The batch with the labels of `teacher` alone ("average": of all), of the kind that the student predicts."""
    learnt = learnt_labels(batch.labels, teachers=among, name=teacher, kind=settings.kind)
    return Batch(batch.keys, batch.images, {teacher: learnt})


@dataclass(frozen=True, slots=True)
class _Training:
    """Makes the micro-batch of places of the stream."""

    collate: Collate
    settings: TrainSettings
    alone: bool

    def __call__(self, items: list[Any]) -> MicroBatch | Exception:
        if errors := [item for item in items if isinstance(item, Exception)]:
            return errors[0]
        places, samples = zip(*items, strict=True)
        s = self.settings
        try:
            batch = self.collate(list(samples))
            among = s.teacher_shares if self.alone else shares(batch, s)
            step = places[0].position // s.batch_size
            teacher = "average" if s.strategy == "average" else choose_teacher(among, seed=s.seed, step=step)
            averaged = teacher == "average"
            if not averaged:  # before the augmentation, which then has fewer maps to turn; an average has weights
                batch = labels_to_learn(batch, s, teacher=teacher, among=among)
            positions = [place.position for place in places]
            batch = augment(
                batch,
                positions,
                seed=s.seed,
                hflip=s.hflip,
                color_jitter=s.color_jitter,
                random_resized_crop=s.random_resized_crop,
            )
            return MicroBatch(
                labels_to_learn(batch, s, teacher=teacher, among=among) if averaged else batch,
                teacher,
            )
        except (ValueError, LookupError, OSError) as error:
            return error


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """Makes a held-out batch: the labels of every teacher that is learnt from, unchanged."""

    collate: Collate
    settings: TrainSettings

    def __call__(self, items: list[Any]) -> list[tuple[float, MicroBatch]] | Exception:
        if errors := [item for item in items if isinstance(item, Exception)]:
            return errors[0]
        s = self.settings
        try:
            batch = self.collate([sample for _, sample in items])
            among = shares(batch, s)
            weights = {"average": 1.0} if s.strategy == "average" else among
            total = sum(weights.values())
            return [
                (weight / total, MicroBatch(labels_to_learn(batch, s, teacher=name, among=among), name))
                for name, weight in weights.items()
            ]
        except (ValueError, LookupError, OSError) as error:
            return error


class _Placed(Dataset[Any]):
    """The samples at places of the stream; a sample that cannot be read is the error that says why.

    settings: of a training whose samples come with the labels of the step's teacher alone (see `_alone`).
    """

    def __init__(self, dataset: Labelled, settings: TrainSettings | None = None) -> None:
        self.dataset, self.settings = dataset, settings

    def __getitem__(self, place: SamplePosition) -> Any:
        s = self.settings
        try:
            if s is None:
                return place, self.dataset[place.index]
            teacher = choose_teacher(s.teacher_shares, seed=s.seed, step=place.position // s.batch_size)
            return place, self.dataset.by(place.index, [teacher])  # type: ignore[attr-defined]
        except (ValueError, LookupError, OSError) as error:
            return error


def _freeze(_worker: int) -> None:
    # The parent's objects are moved out of the collector's sight: a collection would copy every page of them.
    gc.freeze()
    torch.set_num_threads(1)


def _loader(
    dataset: Labelled, batches: Any, collate: Any, workers: int, settings: TrainSettings | None = None
) -> Iterator[Any]:
    loader: DataLoader[Any] = DataLoader(
        _Placed(dataset, settings),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_freeze,
    )
    for item in loader:
        if isinstance(item, Exception):
            raise item
        yield item


def training_batches(
    dataset: Labelled, micro_batches: MicroBatchPositions, *, collate: Collate, settings: TrainSettings
) -> Iterator[MicroBatch]:
    """This process's micro-batches, in order, read ahead by `settings.workers` processes."""
    alone = _alone(dataset, settings)
    make = _Training(collate, settings, alone)
    return _loader(dataset, micro_batches, make, settings.workers, settings if alone else None)


def _alone(dataset: Labelled, settings: TrainSettings) -> bool:
    """Whether the dataset can decode the labels of a step's one teacher (LabelDataset.by), and that is what is learnt.

    Raises LookupError where a teacher's labels are missing, for the step that needs them may be a day away.
    """
    if settings.strategy != "select" or not settings.teacher_shares or not hasattr(dataset, "by"):
        return False
    known: Sequence[str] = dataset.teachers  # type: ignore[attr-defined]
    if missing := [name for name, share in settings.teacher_shares.items() if share > 0 and name not in known]:
        raise LookupError(f"there are no labels by {', '.join(missing)}; the labels hold: {', '.join(known)}")
    return True


def heldout_batches(
    dataset: Labelled,
    indices: Sequence[int],
    *,
    collate: Collate,
    settings: TrainSettings,
    process: int,
    processes: int,
) -> Iterator[list[tuple[float, MicroBatch]]]:
    """This process's share of the held-out samples: for each batch, every teacher's weight and labels."""
    size = settings.eval_batch_size
    places = [[SamplePosition(i, i) for i in indices[start : start + size]] for start in range(0, len(indices), size)]
    mine = places[process::processes]
    if not mine:
        return iter(())
    return _loader(dataset, mine, _HeldOut(collate, settings), min(settings.workers, len(mine)))
