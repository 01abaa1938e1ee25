"""Converts metric labels to the canonical camera (distill.core.focal).

A label's metres hold for the camera that took the region, or for the one that its teacher assumes: Depth Anything 3's
metric model predicts metres for a focal length of 300 pixels at its own size, whatever the photo, so its labels need no
known camera.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from distill.core.codes import CodedLabels, CodedMaps
from distill.core.depth import DepthMap
from distill.core.focal import factor
from distill.core.labels import Labels
from distill.shards.codec import Sample

_Maps = TypeVar("_Maps", DepthMap, CodedMaps)
_Labels = TypeVar("_Labels", Labels, CodedLabels)


def canonical(sample: Sample, focal: float) -> Sample:
    """The sample with its metric labels converted to a camera of `focal` pixels; other labels are unchanged.

    Raises ValueError naming the sample where the focal length of its metres is unknown, or where a teacher that assumes
    its own camera labelled patches, which it saw at another scale than the region.
    """
    labels = {name: _converted(label, name, sample, focal) for name, label in sample.labels.items()}
    coded = {name: _converted(label, name, sample, focal) for name, label in sample.coded.items()}
    return replace(sample, labels=labels, coded=coded)


def _converted(labels: _Labels, name: str, sample: Sample, focal: float) -> _Labels:
    kind, local = labels.shared.kind, labels.local
    if kind.unknown != "metric":
        return labels
    ratio = factor(_focal_of(name, sample, local is not None), focal)
    multiplier = ratio if kind.quantity == "disparity" else 1.0 / ratio
    return replace(
        labels, shared=_times(labels.shared, multiplier), local=None if local is None else _times(local, multiplier)
    )


def _focal_of(name: str, sample: Sample, has_patches: bool) -> float:
    """The focal length in pixels for which a teacher's metres hold."""
    label_record: Mapping[str, Any] = sample.record.get("labels", {}).get(name, {})
    assumed_focal = label_record.get("focal")
    if assumed_focal is not None and has_patches:
        raise ValueError(
            f"{sample.key}: {name} predicts metres for an assumed camera, which differs from patch to patch: "
            'student.canonical_focal then needs crops.patches = "none"'
        )
    focal_here = assumed_focal or sample.record.get("crop", {}).get("focal")
    if not focal_here:
        raise ValueError(
            f"{sample.key}: student.canonical_focal needs a focal length, but this sample has none: give its source "
            "one (the column focal of pairs, a data set's index), label it again if it was labelled before that, or "
            "remove canonical_focal"
        )
    return float(focal_here)


def _times(maps: _Maps, multiplier: float) -> _Maps:
    if isinstance(maps, CodedMaps):  # codes lie evenly between low and high
        return replace(maps, low=maps.low * multiplier, high=maps.high * multiplier)
    return DepthMap(maps.values * multiplier, maps.valid, maps.kind)
