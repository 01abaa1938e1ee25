"""From answers to samples: converts a teacher's maps for storage, and makes a job's labels, or the reason for none.

Shapes: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from distill.core.codes import CodedLabels, CodedMaps, join
from distill.core.depth import DepthMap, Kind, cat
from distill.core.labels import Labels, Supervision
from distill.data.corruptions import Corruptions
from distill.data.sources import Rejected
from distill.labelling.alignment import Aligned, drop_reason
from distill.labelling.asking import camera_of
from distill.labelling.bridge import Bridged
from distill.labelling.jobs import CropJob, Teachers
from distill.labelling.settings import LabelSettings
from distill.shards.codec import Sample


def stored(depth: DepthMap, store: str) -> DepthMap:
    """A teacher's map as it is stored: with "disparity", depth without an unknown shift becomes disparity exactly.

    With "as_is" the kind is unchanged. affine_depth always is: its 1/d is meaningless. Non-finite values are invalid.
    """
    depth = DepthMap(depth.values, depth.valid & torch.isfinite(depth.values), depth.kind)
    return depth.convert(stored_kind(depth.kind, store))


def stored_kind(kind: Kind, store: str) -> Kind:
    """The kind in which a map of `kind` is stored; raises ValueError for an unknown `store`."""
    if store not in ("disparity", "as_is"):
        raise ValueError(f'store must be "disparity" or "as_is", not {store!r}')
    lawful = store == "disparity" and kind.quantity == "depth" and kind.unknown != "affine"
    return Kind(f"{kind.unknown}_disparity") if lawful else kind


def sample_of(
    job: CropJob,
    answers: Mapping[str, Sequence[Any]],
    kinds: Mapping[str, Kind],
    teachers: Teachers,
    settings: LabelSettings,
) -> Sample | Rejected:
    """The job with its labels, or the reason why there are none.

    answers: by teacher that was asked, its maps or their codes: the region's, then each patch's. kinds: the kinds that
    it predicted. Ground truth, corrupted or not, is the job's own; bridges and fits to truth are computed here.
    """
    labels: dict[str, Labels] = {}
    coded: dict[str, CodedLabels] = {}
    predicted: dict[str, dict[str, Any]] = {}
    for name, teacher in (named for named in teachers if job.asks(named[0])):
        if isinstance(teacher, str | Corruptions):
            if job.truth is None:
                return Rejected(job.origin, job.key, f"no ground truth, which {name} needs")
            truth_labels = job.truth if isinstance(teacher, str) else teacher.labels(job.truth, f"{name}.{job.key}")
            kind, shared = truth_labels.shared.kind, stored(truth_labels.shared, settings.store)
            local = None if truth_labels.local is None else stored(truth_labels.local, settings.store)
        else:
            kind = kinds[name]
            shared, local = _joined(answers[name])
        predicted[name] = {"predicted": str(kind), **_card(teacher), **camera_of(teacher, job.region, kind)}
        if not (shared.count if isinstance(shared, CodedMaps) else shared.valid).any():
            return Rejected(job.origin, job.key, f"{name} has no valid pixel in the region")
        if isinstance(shared, CodedMaps):
            coded[name] = CodedLabels(shared, local, _boxes(job, local))
            continue
        if isinstance(teacher, Bridged):
            primary = labels[teacher.primary]
            shared, local, predicted[name]["bridge"] = teacher.bridge(shared, local, primary)
        if isinstance(teacher, Aligned):
            if job.truth is None:
                return Rejected(job.origin, job.key, f"no ground truth, which {name} is fitted to")
            shared, local, fit = teacher.align(shared, local, job.truth, f"{name}.{job.key}")
            shared, local = stored(shared, settings.store), None if local is None else stored(local, settings.store)
            predicted[name]["align"] = fit
        supervision = Supervision.of(shared, teacher=name, truth=isinstance(teacher, str))
        labels[name] = Labels(shared, local, _boxes(job, local), supervision=supervision)
    fits = [f"{name} {drop_reason(table['align']['shared'])}" for name, table in predicted.items() if "align" in table]
    if fits and not any(made.shared.valid.any() for made in labels.values()):
        return Rejected(job.origin, job.key, "; ".join(fits))
    return Sample(job.key, job.image_key, job.region, labels, {**job.record, "labels": predicted}, coded)


def _boxes(job: CropJob, local: object) -> Tensor:
    """The boxes of a label's patches: all of the job's, or none."""
    return job.boxes if local is not None else job.boxes[:, :0]


def _joined(maps: Sequence[Any]) -> tuple[Any, Any]:
    """The region's map, and its patches' codes or values as one tensor; None without patches."""
    shared, *local = maps
    if not local:
        return shared, None
    return shared, join(local) if isinstance(shared, CodedMaps) else cat(local)


def _card(teacher: Any) -> dict[str, Any]:
    """The part of the teacher's card that a sample records; the whole card is in the manifest."""
    if isinstance(teacher, Corruptions):  # corrupted truth is recorded like a teacher
        return {"corruptions": {key: value for key, value in asdict(teacher).items() if value}}
    card = getattr(teacher, "card", None)
    return {} if card is None else {"card": {key: getattr(card, key) for key in ("weights", "revision", "licence")}}
