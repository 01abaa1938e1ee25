"""How far a student is from its teacher, in the units of its accuracy.

The teacher's map takes the place of the truth. Neither knows its scale and shift, so the teacher is first brought to
the ground truth as its own score was (clean mode), and the student to the teacher: AbsRel and delta1 of depth, and the
F1 of edges, over the pixels that have a truth and where the teacher lies within its range (beyond, its depth would be
the clip's). A student may be far from the truth and close to its teacher: then the labels are its limit, and more
training is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from distill.core.depth import DepthMap, Kind
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.fit import NoGroundTruthError, aligned_depth
from distill.eval.protocol import Protocol
from distill.eval.stored import BadPredictionError, find_prediction, read_prediction, read_settings
from distill.eval.tasks import TASKS

POINTS = 1500
"""Pixels kept for the scatter, evenly over the images."""


def fidelity(
    student: Path, teacher: Path, samples: Sequence[BenchmarkSample], protocol: Protocol
) -> dict[str, Any] | None:
    """Of two stores of predictions: {"abs_rel", "delta1", "boundary_f1", "images", "points"}; None without an image.

    points: (teacher's, student's depth) in metres of some pixels, at most POINTS. protocol: the benchmark's, of depth.
    """
    kinds = [Kind(settings["kind"]) for store in (student, teacher) if (settings := read_settings(store))]
    if len(kinds) < 2 or protocol.task != "depth" or protocol.truth != "metric_depth":
        return None
    clean = protocol.in_mode("clean")
    rows: list[tuple[float, float, float]] = []
    points: list[tuple[float, float]] = []
    for sample in samples:
        truth = sample.truth()
        size = (truth.values.shape[-2], truth.values.shape[-1])
        try:
            maps = [read_prediction(find_prediction(s, sample), size)[0] for s in (student, teacher)]
            depth, _ = aligned_depth(maps[1], truth, kinds[1], clean)
            values, low, high = torch.from_numpy(np.ascontiguousarray(depth, np.float32))[None], *_range(truth)
            taught = DepthMap(values, truth.valid & (values > low) & (values < high), truth.kind)
            own, sharp = clean.with_kind(kinds[0]), protocol.of_edges().with_kind(kinds[0])
            sums = TASKS["depth"].measure(maps[0], taught, kinds[0], own).sums
            edges = TASKS["boundary_f1"].measure(maps[0], taught, kinds[0], sharp).sums
            mine, _ = aligned_depth(maps[0], taught, kinds[0], clean)
        except (NoGroundTruthError, BadPredictionError, ValueError, OSError):
            continue  # the scores name it
        depths = TASKS["depth"].from_sums(sums[None])
        f1 = TASKS["boundary_f1"].from_sums(edges[None])["boundary_f1"]
        rows.append((float(depths["abs_rel"]), float(depths["delta1"]), float(f1)))
        known = np.flatnonzero(taught.valid[0].numpy().ravel())
        few = known[np.linspace(0, len(known) - 1, max(1, POINTS // len(samples))).astype(int)]
        points += [(float(depth.ravel()[i]), float(mine.ravel()[i])) for i in few]
    if not rows:
        return None
    means = dict(zip(("abs_rel", "delta1", "boundary_f1"), map(fmean, zip(*rows, strict=True)), strict=True))
    return {**means, "images": len(rows), "points": points}


def _range(truth: DepthMap) -> tuple[float, float]:
    """The least and the largest valid truth."""
    known = truth.values[truth.valid]
    return (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
