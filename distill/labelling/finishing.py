"""From answers to samples: what is stored of a teacher's maps, and what a job's sample learns from, or why it has none.

Shapes: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from distill.core.codes import CodedLabels, CodedMaps, join
from distill.core.depth import DepthMap, Kind, cat
from distill.core.labels import Labels, Supervision
from distill.data.corruptions import Corruptions
from distill.data.sources import Rejected
from distill.labelling.alignment import Aligned, words
from distill.labelling.asking import camera_of
from distill.labelling.bridge import Bridged
from distill.labelling.jobs import CropJob, Teachers
from distill.labelling.settings import LabelSettings
from distill.shards.codec import Sample


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


def sample_of(
    job: CropJob,
    answers: Mapping[str, Sequence[Any]],
    kinds: Mapping[str, Kind],
    teachers: Teachers,
    settings: LabelSettings,
) -> Sample | Rejected:
    """The job with its labels, or why there are none.

    answers: by teacher that was asked, its maps or their codes: the region's, then each patch's. kinds: what it
    predicted them as. Ground truth, spoilt or not, is the job's own; bridges and fits to truth are made here.
    """
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
            kind = kinds[name]
            shared, local = _joined(answers[name])
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
