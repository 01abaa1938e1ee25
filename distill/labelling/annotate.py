"""From jobs to labelled samples: ask the teachers in batches, keep what can be trusted.

The same steps serve labelling to shards (`annotate`, batched across images) and training with the teachers at hand
(`label_photo`, by labelling.online). A batch of one image's crops never decides about another image: where a teacher
fails on a batch, its crops are asked again one by one, and only the image that fails alone is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from distill.core.codes import CodedMaps
from distill.core.crop_settings import CropSettings
from distill.core.depth import DepthMap, Kind
from distill.data.corruptions import Corruptions
from distill.data.sources import BadImageError, Photo, Rejected
from distill.labelling.alignment import Aligned
from distill.labelling.asking import DeviceAsking, HostAsking, Pending, TeacherFailedError
from distill.labelling.bridge import Bridged
from distill.labelling.finishing import sample_of, stored
from distill.labelling.jobs import CropJob, Teachers, prepare
from distill.labelling.settings import DEFAULTS, LabelSettings
from distill.shards.codec import CODECS, Sample
from distill.teachers import Teacher

CPU = torch.device("cpu")

# A teacher that fails on so many samples in a row is broken, not the images.
FAILURES_IN_A_ROW = 20
# What a network raises for one odd input. Anything else (a TypeError, say) is a fault in the program and must stop it.
_TEACHER_ERRORS = (RuntimeError, ValueError, ArithmeticError, LookupError)


@dataclass(slots=True)
class _Waiting:
    """A job and the answers it has so far: maps and their predicted kind by teacher, the region's first, then its
    patches'.
    """

    job: CropJob | Rejected
    maps: dict[str, list[DepthMap | CodedMaps | None]] = field(default_factory=dict)
    predicted: dict[str, Kind] = field(default_factory=dict)
    missing: int = 0
    problem: str = ""


_Crops: TypeAlias = list[tuple[_Waiting, int]]


def annotate(
    jobs: Iterable[CropJob | Rejected],
    teachers: Teachers,
    *,
    labels: LabelSettings = DEFAULTS,
    device: torch.device = CPU,
) -> Iterator[Sample | Rejected]:
    """Jobs as labelled samples, in their order; a job that a teacher cannot label becomes Rejected with the reason.

    Crops of several images share a batch, and which ones do depends on `jobs` alone, so that a rerun gives the same
    bits. device: where the teachers are. Raises TeacherFailedError where a teacher fails on FAILURES_IN_A_ROW samples
    in a row, or on every one of four or more.
    """
    queue = BatchQueue(teachers, labels, asking(teachers, labels, device))
    for job in jobs:
        queue.add(job)
        queue.run(at_least=labels.crops_at_once)
        yield from queue.drain()
    queue.run(at_least=1)
    yield from queue.drain()
    queue.check_all_failed()


def asking(teachers: Teachers, labels: LabelSettings, device: torch.device) -> HostAsking | DeviceAsking:
    """How batches reach the teachers. A bridge reads its primary's values, so there they come back as they are."""
    store = partial(stored, store=labels.store)
    if device.type != "cuda":
        return HostAsking(store)
    codec = CODECS[labels.codec]
    coded = codec.first > 0 and not any(isinstance(teacher, Bridged | Aligned) for _, teacher in teachers)
    coding = (labels.codec, codec.first) if coded else None
    return DeviceAsking(device, store, coding=coding, pad_to=labels.crops_at_once)


class BatchQueue:
    """Where jobs wait for their batches to fill, and leave in the order they came."""

    def __init__(self, teachers: Teachers, labels: LabelSettings, ask: HostAsking | DeviceAsking) -> None:
        self.teachers, self.labels, self.ask = teachers, labels, ask
        self.pending: deque[tuple[_Crops, dict[str, Pending | None]]] = deque()
        self.networks = [(name, teacher) for name, teacher in teachers if not isinstance(teacher, str | Corruptions)]
        self.order: deque[_Waiting] = deque()
        # Crops by size and teachers: a batch has one of each.
        self.queues: dict[tuple[int, tuple[str, ...]], list[tuple[_Waiting, int]]] = {}
        self.asked = self.failed = self.in_a_row = 0
        self.last = ""

    def add(self, job: CropJob | Rejected) -> None:
        """Queue a job's crops behind those of its size."""
        waiting = _Waiting(job)
        self.order.append(waiting)
        asked = () if isinstance(job, Rejected) else tuple(name for name, _ in self.networks if job.asks(name))
        if isinstance(job, Rejected) or not asked:
            return
        waiting.missing = 1 + len(job.patches)
        waiting.maps = {name: [None] * waiting.missing for name in asked}
        for slot in range(waiting.missing):
            size = (job.region if slot == 0 else job.patches).shape[-1]
            self.queues.setdefault((size, asked), []).append((waiting, slot))

    def run(self, *, at_least: int) -> None:
        """Ask every teacher for each batch of which at least so many crops wait."""
        for (_, asked), queue in self.queues.items():
            while len(queue) >= at_least:
                size = self.labels.crops_at_once
                crops, queue[:size] = queue[:size], []
                self.pending.append(
                    (crops, {name: self._ask(name, teacher, crops) for name, teacher in self.networks if name in asked})
                )
                self._take(self.ask.in_flight)
        if at_least == 1:
            self._take(0)

    def _ask(self, name: str, teacher: Teacher, crops: _Crops, *, filled: bool = True) -> Pending | None:
        """The answer to come; None where it has been written already, crop by crop, for the batch failed.

        filled: small batches are filled up, where they ever are; not once a whole one had not enough memory.
        """
        keys = [f"{w.job.key}.{'shared' if slot == 0 else f'local{slot - 1}'}" for w, slot in crops]
        try:
            return self.ask(name, teacher, [_crop(w.job, slot) for w, slot in crops], keys, filled=filled)
        except TeacherFailedError:
            raise
        except _TEACHER_ERRORS as error:
            scarce = isinstance(error, torch.OutOfMemoryError)
            if len(crops) == 1 and not (scarce and filled):
                if scarce:
                    raise TeacherFailedError(f"{name} has not enough memory for one crop: {error}") from error
                waiting, slot = crops[0]
                line = (str(error) or type(error).__name__).splitlines()[0]
                waiting.problem = waiting.problem or f"{name} failed on {_context(slot)}: {line}"
                return None
        # Not above: an error holds, through its traceback, all that the batch left on the device.
        for crop in crops:
            self._write(name, [crop], self._ask(name, teacher, [crop], filled=filled and not scarce))
        return None

    def _take(self, left: int) -> None:
        """Take the answers of all but the last `left` batches."""
        while len(self.pending) > left:
            crops, answers = self.pending.popleft()
            for name, answer in answers.items():
                self._write(name, crops, answer)
            for waiting, _ in crops:
                waiting.missing -= 1

    @staticmethod
    def _write(name: str, crops: _Crops, pending: Pending | None) -> None:
        """Write a teacher's maps of these crops where the crops wait."""
        if pending is None:
            return
        answer = pending()
        for (waiting, slot), one, nan in zip(crops, answer.maps, answer.nan, strict=True):
            waiting.maps[name][slot], waiting.predicted[name] = one, answer.predicted
            if nan:
                waiting.problem = waiting.problem or f"{name} returned NaN on {nan} pixels of {_context(slot)}"

    def drain(self) -> Iterator[Sample | Rejected]:
        """The finished jobs at the head of the line, in order."""
        while self.order and self.order[0].missing == 0:
            waiting = self.order.popleft()
            if isinstance(waiting.job, Rejected):
                yield waiting.job
                continue
            self._count(waiting.problem)
            if waiting.problem:
                yield Rejected(waiting.job.origin, waiting.job.key, waiting.problem)
                continue
            yield sample_of(waiting.job, waiting.maps, waiting.predicted, self.teachers, self.labels)

    def _count(self, problem: str) -> None:
        self.asked += 1
        self.failed += bool(problem)
        self.in_a_row = self.in_a_row + 1 if problem else 0
        self.last = problem or self.last
        if self.in_a_row >= FAILURES_IN_A_ROW:
            raise TeacherFailedError(f"{self.in_a_row} samples in a row failed, so it is not the images: {problem}")

    def check_all_failed(self) -> None:
        """Raises TeacherFailedError where four or more jobs all failed."""
        if self.failed == self.asked >= 4:
            raise TeacherFailedError(f"all {self.asked} samples failed, so it is not the images: {self.last}")


def _crop(job: CropJob | Rejected, slot: int) -> Tensor:
    assert isinstance(job, CropJob)
    return job.patches[slot - 1] if slot else job.region


def _context(slot: int) -> str:
    return "the region" if slot == 0 else f"patch {slot - 1}"


def label_photo(
    photo: Photo,
    teachers: Teachers,
    *,
    crops: CropSettings,
    labels: LabelSettings = DEFAULTS,
    seed: int = 0,
    draw: int = 0,
) -> Sample:
    """One photo's sample, as `annotate` makes it, not yet quantized. Raises BadImageError with the reason there is
    none.
    """
    job = prepare(photo, crops=crops, seed=seed, draw=draw, sky=labels.sky)
    result = next(annotate([job], teachers, labels=labels))
    if isinstance(result, Rejected):
        raise BadImageError(result.reason)
    return result
