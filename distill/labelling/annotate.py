"""From photos to labelled samples: cut the regions, ask the teachers, keep what can be trusted.

The same steps serve labelling to shards (`annotate`, batched across images) and training with the teachers at hand
(`label_photo`, by labelling.online). A batch of one image's crops never decides about another image: where a teacher
fails on a batch, its crops are asked again one by one, and only the image that fails alone is lost.

Shapes: B batch, N patches of a region, S region size, P patch size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.codes import CodedLabels, CodedMaps, join
from distill.core.crop_settings import CropSettings
from distill.core.crops import ImageTooSmallError, Plan, Square, cut_patches, cut_region, plan
from distill.core.depth import DepthMap, Kind, cat
from distill.core.focal import resized
from distill.core.labels import Labels, Supervision
from distill.data.corruptions import Corruptions
from distill.data.photos import squashed
from distill.data.sources import BadImageError, InputShard, Photo, Rejected
from distill.labelling.alignment import Aligned, words
from distill.labelling.asking import DeviceAsking, HostAsking, Pending, TeacherFailedError, camera_of
from distill.labelling.bridge import Bridged
from distill.labelling.settings import DEFAULTS, LabelSettings
from distill.shards.codec import CODECS, Sample
from distill.teachers import Teacher

TRUTH: Literal["truth"] = "truth"
CPU = torch.device("cpu")
Teachers: TypeAlias = Sequence[tuple[str, Teacher | Literal["truth"] | Corruptions]]

# A teacher that fails on so many samples in a row is broken, not the images.
FAILURES_IN_A_ROW = 20
# What a network raises for one odd input. Anything else (a TypeError, say) is a fault in the program and must stop it.
_TEACHER_ERRORS = (RuntimeError, ValueError, ArithmeticError, LookupError)


def plan_photo(photo: Photo, crops: CropSettings, *, seed: int = 0, draw: int = 0) -> Plan:
    """The plan of one photo's draw; raises BadImageError where it is too small."""
    try:
        height, width = photo.rgb.shape[1:]
        return plan(height, width, crops, key=photo.key, seed=seed, draw=draw)
    except ImageTooSmallError as error:
        raise BadImageError(str(error)) from error


@dataclass(frozen=True, slots=True)
class CropJob:
    """One region that waits for its labels.

    region: (3,S,S) uint8. patches: (N,3,P,P) uint8. truth: its ground truth, if the photo has one. record: the sample's
    json, without labels. teachers: who is asked; none: everybody.
    """

    key: str
    image_key: str
    origin: str
    region: Tensor
    patches: Tensor
    boxes: Tensor
    truth: Labels | None
    record: dict[str, Any]
    teachers: tuple[str, ...] = ()

    def asks(self, name: str) -> bool:
        """Whether a teacher is asked about this region."""
        return not self.teachers or name in self.teachers


def prepare(
    photo: Photo,
    *,
    crops: CropSettings,
    seed: int = 0,
    draw: int = 0,
    sky: str = DEFAULTS.sky,
    teachers: Collection[str] = (),
) -> CropJob:
    """Cut one draw's region and patches out of a photo; raises BadImageError where it is smaller than the smallest
    region. sky: labels.sky, for the record. teachers: who is asked; none: everybody.

    The ground truth is cut alike: nearest pixel, so that no value is invented at an edge and nothing invalid leaks.
    The record's crop has the focal length in pixels of the region as it is resized, where the photo has one.
    """
    height, width = photo.rgb.shape[1:]
    more: dict[str, Any] = {}
    focal = photo.focal
    if crops.region == "whole":
        photo, more = squashed(photo), {"squashed": True}  # the region is in pixels of the squashed image
        focal = resized(focal, (height, width), (photo.rgb.shape[1], photo.rgb.shape[2]))
    chosen = plan_photo(photo, crops, seed=seed, draw=draw)
    region = chosen.region
    if focal:
        more["focal"] = resized(focal, (region.side, region.columns), chosen.shape)
    boxes = chosen.boxes()[None]
    truth = None
    if photo.truth is not None:
        shared = _cut_truth(photo.truth, region, chosen.shape)
        squares = [Square(region.top + p.top, region.left + p.left, p.side) for p in chosen.patches]
        local = [_cut_truth(photo.truth, square, (chosen.patch_size, chosen.patch_size)) for square in squares]
        truth = Labels(shared, cat(local) if local else None, boxes)
    record = {
        "image": {"key": photo.key, "origin": photo.origin, "height": height, "width": width},
        "crop": {**region.record, "size": chosen.size, "patch_size": chosen.patch_size, "draw": draw, **more},
        "patches": [[p.top, p.left, p.side] for p in chosen.patches],
        "seed": seed,
        "sky": None if sky == "teacher" else sky,
    }
    return CropJob(
        key=f"{photo.key}-{draw}",
        image_key=photo.key,
        origin=photo.origin,
        region=cut_region(photo.rgb, chosen),
        patches=cut_patches(photo.rgb, chosen),
        boxes=boxes,
        truth=truth,
        record=record,
        teachers=tuple(teachers),
    )


def _cut_truth(truth: DepthMap, square: Square, size: tuple[int, int]) -> DepthMap:
    rows = slice(square.top, square.top + square.side)
    columns = slice(square.left, square.left + square.columns)
    values, valid = truth.values[:, rows, columns], truth.valid[:, rows, columns]
    if (square.side, square.columns) != size:
        values = F.interpolate(values[None], size=size, mode="nearest-exact")[0]
        valid = F.interpolate(valid[None].float(), size=size, mode="nearest-exact")[0] > 0.5
    return DepthMap(values, valid, truth.kind)


def teachers_for(names: Collection[str], teachers: Teachers, *, origin: str) -> Teachers:
    """Those of `teachers` that are named, all where nobody is, with what they are bridged to; in their order.

    Raises ValueError for a name that no teacher has, naming `origin`.
    """
    known = [name for name, _ in teachers]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{origin} is to be labelled by {', '.join(unknown)}; the teachers are {', '.join(known)}")
    needed: set[str] = set()
    for name, teacher in teachers:
        if name in names and isinstance(teacher, Bridged):
            needed.add(teacher.primary)
    return [(name, teacher) for name, teacher in teachers if not names or name in names or name in needed]


def asked_about(shard: InputShard, teachers: Teachers) -> tuple[str, ...]:
    """Who labels the images of a shard; raises ValueError where it names nobody's name, or a bridge without its end."""
    asked = tuple(name for name, _ in teachers_for(shard.teachers, teachers, origin=shard.origin))
    if more := [name for name in asked if shard.teachers and name not in shard.teachers]:
        raise ValueError(f"{shard.origin}: a teacher there is bridged to {more[0]}, which must label it too")
    return asked


def stored(depth: DepthMap, store: str) -> DepthMap:
    """What is stored of a teacher's map: with "disparity", depth without an unknown shift becomes disparity exactly.

    With "as_is" the kind stays. affine_depth stays either way: its 1/d means nothing. Non-finite values are invalid.
    """
    depth = DepthMap(depth.values, depth.valid & torch.isfinite(depth.values), depth.kind)
    return depth.convert(stored_kind(depth.kind, store))


def stored_kind(kind: Kind, store: str) -> Kind:
    """The kind that a map of `kind` has when stored; raises ValueError for an unknown `store`."""
    if store not in ("disparity", "as_is"):
        raise ValueError(f'store must be "disparity" or "as_is", not {store!r}')
    lawful = store == "disparity" and kind.quantity == "depth" and kind.unknown != "affine"
    return Kind(f"{kind.unknown}_disparity") if lawful else kind


# --- asking teachers --------------------------------------------------------------------------------------------------


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

    def _ask(self, name: str, teacher: Teacher, crops: _Crops) -> Pending | None:
        """The answer to come; None where it has been written already, crop by crop, for the batch failed."""
        keys = [f"{w.job.key}.{'shared' if slot == 0 else f'local{slot - 1}'}" for w, slot in crops]
        try:
            return self.ask(name, teacher, [_crop(w.job, slot) for w, slot in crops], keys)
        except TeacherFailedError:
            raise
        except _TEACHER_ERRORS as error:
            if len(crops) > 1:
                for crop in crops:
                    self._write(name, [crop], self._ask(name, teacher, [crop]))
                return None
            if isinstance(error, torch.OutOfMemoryError):
                raise TeacherFailedError(f"{name} has not enough memory for one crop: {error}") from error
            waiting, slot = crops[0]
            line = (str(error) or type(error).__name__).splitlines()[0]
            waiting.problem = waiting.problem or f"{name} failed on {_context(slot)}: {line}"
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
            yield _finish(waiting.job, waiting, self.teachers, self.labels)

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


def _finish(job: CropJob, waiting: _Waiting, teachers: Teachers, settings: LabelSettings) -> Sample | Rejected:
    """The job with its labels, or why there are none."""
    if waiting.problem:
        return Rejected(job.origin, job.key, waiting.problem)
    labels: dict[str, Labels] = {}
    coded: dict[str, CodedLabels] = {}
    predicted: dict[str, dict[str, Any]] = {}
    for name, teacher in (one for one in teachers if job.asks(one[0])):
        if isinstance(teacher, str | Corruptions):
            if job.truth is None:
                return Rejected(job.origin, job.key, f"no ground truth, which {name} needs")
            given = job.truth if isinstance(teacher, str) else teacher.labels(job.truth, f"{name}.{job.key}")
            kind, shared = given.shared.kind, stored(given.shared, settings.store)
            local = None if given.local is None else stored(given.local, settings.store)
        else:
            kind = waiting.predicted[name]
            shared, local = _joined(waiting.maps[name])
        predicted[name] = {"predicted": str(kind), **_card(teacher), **camera_of(teacher, job.region, kind)}
        if not (shared.count if isinstance(shared, CodedMaps) else shared.valid).any():
            return Rejected(job.origin, job.key, f"{name} has no valid pixel in the region")
        boxes = job.boxes if local is not None else job.boxes[:, :0]
        if isinstance(shared, CodedMaps):
            coded[name] = CodedLabels(shared, local, boxes)
            continue
        if isinstance(teacher, Bridged):
            primary = labels[teacher.primary]
            shared, local, predicted[name]["bridge"] = teacher.bridge(shared, local, primary)
            boxes = job.boxes if local is not None else job.boxes[:, :0]
        if isinstance(teacher, Aligned):
            if job.truth is None:
                return Rejected(job.origin, job.key, f"no ground truth, which {name} is fitted to")
            shared, local, fit = teacher.align(shared, local, job.truth, f"{name}.{job.key}")
            shared, local = stored(shared, settings.store), None if local is None else stored(local, settings.store)
            predicted[name]["align"] = fit
        by = Supervision.of(shared, teacher=name, truth=isinstance(teacher, str))
        labels[name] = Labels(shared, local, boxes, supervision=by)
    fits = [f"{name} {words(table['align']['shared'])}" for name, table in predicted.items() if "align" in table]
    if fits and not any(one.shared.valid.any() for one in labels.values()):
        return Rejected(job.origin, job.key, "; ".join(fits))
    return Sample(job.key, job.image_key, job.region, labels, {**job.record, "labels": predicted}, coded)


def _joined(maps: Sequence[Any]) -> tuple[Any, Any]:
    """The region's map and its patches', whose codes or values share a tensor; None where there are no patches."""
    shared, *local = maps
    if not local:
        return shared, None
    return shared, join(local) if isinstance(shared, CodedMaps) else cat(local)


def _card(teacher: Any) -> dict[str, Any]:
    """What a sample says of its teacher; the whole card stands in the manifest."""
    if isinstance(teacher, Corruptions):  # spoilt truth is an opinion too
        return {"corruptions": {key: value for key, value in asdict(teacher).items() if value}}
    card = getattr(teacher, "card", None)
    return {} if card is None else {"card": {key: getattr(card, key) for key in ("weights", "revision", "licence")}}


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
