"""Metric labels as the canonical camera would have them (distill.core.focal).

A label's metres hold for the camera that took the region, or for the one that its teacher assumes: Depth Anything 3's
metric model says metres for 300 pixels at its own size, whatever the photo. So its labels need no known camera.
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
    """The sample with its metric labels as a camera of `focal` pixels would have them; others stay as they are.

    Raises ValueError naming the sample where nobody says the focal length of its metres, or where a teacher's own
    camera meets patches, which it saw at another scale than the region.
    """
    labels = {name: _labels(one, name, sample, focal) for name, one in sample.labels.items()}
    coded = {name: _coded(one, name, sample, focal) for name, one in sample.coded.items()}
    return replace(sample, labels=labels, coded=coded)


def _times(name: str, sample: Sample, focal: float, disparity: bool, has_patches: bool) -> float:
    """What the values of a label are times."""
    said: Mapping[str, Any] = sample.record.get("labels", {}).get(name, {})
    own = said.get("focal")
    if own is not None and has_patches:
        raise ValueError(
            f"{sample.key}: {name} says metres for a camera of its own, which is another one for every patch: with "
            'student.canonical_focal set crops.patches = "none"'
        )
    known = own or sample.record.get("crop", {}).get("focal")
    if not known:
        raise ValueError(
            f"{sample.key}: no focal length, which student.canonical_focal needs: give its source one (the column "
            "focal of pairs, a data set's index), label it again where it was labelled before it had one, or leave "
            "canonical_focal out"
        )
    times = factor(float(known), focal)
    return times if disparity else 1.0 / times


def _labels(labels: Labels, name: str, sample: Sample, focal: float) -> Labels:
    kind = labels.shared.kind
    if kind.unknown != "metric":
        return labels
    times = _times(name, sample, focal, kind.quantity == "disparity", labels.local is not None)

    def scaled(depth: DepthMap) -> DepthMap:
        return DepthMap(depth.values * times, depth.valid, depth.kind)

    return replace(labels, shared=scaled(labels.shared), local=None if labels.local is None else scaled(labels.local))


def _coded(labels: CodedLabels, name: str, sample: Sample, focal: float) -> CodedLabels:
    kind = labels.shared.kind
    if kind.unknown != "metric":
        return labels
    times = _times(name, sample, focal, kind.quantity == "disparity", labels.local is not None)

    def scaled(maps: CodedMaps) -> CodedMaps:  # codes lie evenly between low and high
        return replace(maps, low=maps.low * times, high=maps.high * times)

    return replace(labels, shared=scaled(labels.shared), local=None if labels.local is None else scaled(labels.local))
