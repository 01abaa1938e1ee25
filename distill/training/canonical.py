"""Converts metric labels to the canonical camera (distill.core.focal).

A label's metres hold for the camera that took the region, or for the one that its teacher assumes: Depth Anything 3's
metric model predicts metres for a focal length of 300 pixels at its own size, whatever the photo, so its labels need no
known camera.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distill.core.codes import CodedLabels, CodedMaps
from distill.core.depth import DepthMap
from distill.core.focal import factor
from distill.core.labels import Labels
from distill.shards.codec import Sample


def canonical(sample: Sample, focal: float) -> Sample:
    """The sample with its metric labels converted to a camera of `focal` pixels; other labels are unchanged.

    Raises ValueError naming the sample where the focal length of its metres is unknown, or where a teacher that assumes
    its own camera labelled patches, which it saw at another scale than the region.
    """
    labels = {name: _labels(label, name, sample, focal) for name, label in sample.labels.items()}
    coded = {name: _coded(label, name, sample, focal) for name, label in sample.coded.items()}
    return replace(sample, labels=labels, coded=coded)


def _times(name: str, sample: Sample, focal: float, disparity: bool, has_patches: bool) -> float:
    """The factor that a label's values are multiplied by."""
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
    ratio = factor(float(focal_here), focal)
    return ratio if disparity else 1.0 / ratio


def _labels(labels: Labels, name: str, sample: Sample, focal: float) -> Labels:
    kind = labels.shared.kind
    if kind.unknown != "metric":
        return labels
    multiplier = _times(name, sample, focal, kind.quantity == "disparity", labels.local is not None)

    def scaled(depth: DepthMap) -> DepthMap:
        return DepthMap(depth.values * multiplier, depth.valid, depth.kind)

    return replace(labels, shared=scaled(labels.shared), local=None if labels.local is None else scaled(labels.local))


def _coded(labels: CodedLabels, name: str, sample: Sample, focal: float) -> CodedLabels:
    kind = labels.shared.kind
    if kind.unknown != "metric":
        return labels
    multiplier = _times(name, sample, focal, kind.quantity == "disparity", labels.local is not None)

    def scaled(maps: CodedMaps) -> CodedMaps:  # codes lie evenly between low and high
        return replace(maps, low=maps.low * multiplier, high=maps.high * multiplier)

    return replace(labels, shared=scaled(labels.shared), local=None if labels.local is None else scaled(labels.local))
