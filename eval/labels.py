"""Quality of labels that have ground truth stored beside them: the first thing to know of a study's teachers.

A labels folder that also holds plain ground truth (a [[teachers]] table `name = "truth"` without options) is scored
like a model: every map is aligned to the truth of its own crop, regions and patches separately. The truth is as exact
as the labels' codec: off by at most 1/8192 of each map's range of disparity, which is 1 % of a far depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import numpy as np

from distill.core.depth import DepthMap
from distill.core.labels import Labels
from distill.eval.fit import NoGroundTruthError
from distill.eval.protocol import Protocol
from distill.eval.tasks import TASKS
from distill.shards.shards import LabelDataset


@dataclass(frozen=True, slots=True)
class LabelQuality:
    """A teacher's label quality: means over maps. abs_rel: lower is better; boundary_f1: higher; NaN without a map."""

    teacher: str
    context: str
    abs_rel: float
    boundary_f1: float
    maps: int


def label_quality(
    dataset: LabelDataset, protocol: Protocol, *, truth: str = "truth", at_most: int = 32
) -> list[LabelQuality]:
    """Score every other teacher's labels against those of `truth`, on up to `at_most` evenly spaced samples.

    protocol: a benchmark's, whose range and mask apply. Empty if the folder has no truth.
    """
    others = [name for name in dataset.teachers if name != truth]
    if truth not in dataset.teachers:
        return []
    errors: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(at_most, len(dataset))).round().astype(int)):
        sample = dataset[int(index)]
        if truth not in sample.labels:
            continue
        for name in (name for name in others if name in sample.labels):
            for context in ("regions", "patches"):
                pairs = zip(_maps(sample.labels[name], context), _maps(sample.labels[truth], context), strict=True)
                for label, truth_map in pairs:
                    if (map_errors := _compared(label, truth_map, protocol)) is not None:
                        errors.setdefault((name, context), []).append(map_errors)
    return [
        LabelQuality(name, context, fmean(a for a, _ in values), fmean(f for _, f in values), len(values))
        for (name, context), values in errors.items()
    ]


def _maps(labels: Labels, context: str) -> list[DepthMap]:
    maps = labels.shared if context == "regions" else labels.local
    return [] if maps is None else [maps[i : i + 1] for i in range(len(maps))]


def _compared(said: DepthMap, known: DepthMap, protocol: Protocol) -> tuple[float, float] | None:
    """AbsRel and boundary F1 of one map; None without a pixel that is valid in both."""
    both = DepthMap(known.values, known.valid & said.valid, known.kind).convert(f"{known.kind.unknown}_depth")
    values = []
    for task, task_protocol in (("depth", protocol.in_mode("clean")), ("boundary_f1", protocol.of_edges())):
        try:
            sums = TASKS[task].measure(said.values[0].numpy(), both, said.kind, task_protocol.with_kind(said.kind)).sums
        except NoGroundTruthError:
            return None
        values.append(float(TASKS[task].from_sums(sums[None])[TASKS[task].main]))
    return values[0], values[1]
