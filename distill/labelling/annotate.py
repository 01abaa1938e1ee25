"""From jobs to labelled samples: ask the teachers in batches, and keep only valid answers.

Used both for labelling to shards (`annotate`, batched across images) and for labelling during training (`label_photo`,
by labelling.online). One image's crops never affect another image: where a teacher fails on a batch, it is asked about
each crop separately, and only images that fail alone are lost.
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
from distill.core.wording import first_line
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

# After this many failed samples in a row the teacher is broken, not the images.
FAILURES_IN_A_ROW = 20
# Errors that a network raises for one odd input. Any other (such as TypeError) is a bug and must stop the program.
_TEACHER_ERRORS = (RuntimeError, ValueError, ArithmeticError, LookupError)


@dataclass(slots=True)
class _Waiting:
    """A job and its answers so far: by teacher, the region's map and then its patches', and their predicted kind."""

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
    queue = BatchQueue(teachers, labels, make_asker(teachers, labels, device))
    for job in jobs:
        queue.add(job)
        queue.run(at_least=labels.crops_at_once)
        yield from queue.drain()
    queue.run(at_least=1)
    yield from queue.drain()
    queue.check_all_failed()


def make_asker(teachers: Teachers, labels: LabelSettings, device: torch.device) -> HostAsking | DeviceAsking:
    """How batches reach the teachers. Bridges and fits read values, so with them maps are not coded on the device."""
    store = partial(stored, store=labels.store)
    if device.type != "cuda":
        return HostAsking(store)
    codec = CODECS[labels.codec]
    coded = codec.first > 0 and not any(isinstance(teacher, Bridged | Aligned) for _, teacher in teachers)
    coding = (labels.codec, codec.first) if coded else None
    return DeviceAsking(device, store, coding=coding, pad_to=labels.crops_at_once)


class BatchQueue:
    """A queue in which jobs wait for their batches to fill; they leave in their original order."""

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
        """Append a job's crops to the queue of their size and teachers."""
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
        """Ask the teachers of every queue that has at least `at_least` crops, batch by batch."""
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
        """The pending answer; None where the batch failed and was answered crop by crop instead.

        filled: small batches may be padded; False after a whole batch ran out of memory.
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
                    raise TeacherFailedError(f"{name} does not have enough memory for one crop: {error}") from error
                waiting, slot = crops[0]
                line = first_line(error)
                waiting.problem = waiting.problem or f"{name} failed on {_context(slot)}: {line}"
                return None
        # Not in the except block: the error's traceback keeps the batch's tensors on the device.
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
        """Store a teacher's maps of these crops in their waiting jobs."""
        if pending is None:
            return
        answer = pending()
        for (waiting, slot), depth_map, nan in zip(crops, answer.maps, answer.nan, strict=True):
            waiting.maps[name][slot], waiting.predicted[name] = depth_map, answer.predicted
            if nan:
                waiting.problem = waiting.problem or f"{name} returned NaN on {nan} pixels of {_context(slot)}"

    def drain(self) -> Iterator[Sample | Rejected]:
        """Yield the finished jobs at the head of the queue, in order."""
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
            raise TeacherFailedError(
                f"{self.in_a_row} samples in a row failed, so the images are not the cause: {problem}"
            )

    def check_all_failed(self) -> None:
        """Raises TeacherFailedError where four or more jobs all failed."""
        if self.failed == self.asked >= 4:
            raise TeacherFailedError(f"all {self.asked} samples failed, so the images are not the cause: {self.last}")


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
    """One photo's sample, as `annotate` makes it, not yet quantized. Raises BadImageError with the reason where it
    cannot be labelled.
    """
    job = prepare(photo, crops=crops, seed=seed, draw=draw, sky=labels.sky)
    result = next(annotate([job], teachers, labels=labels))
    if isinstance(result, Rejected):
        raise BadImageError(result.reason)
    return result
