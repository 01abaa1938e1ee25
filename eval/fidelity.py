"""How far a student is from its teacher, in the units of its accuracy.

The teacher's map takes the place of the ground truth. Scale and shift of both may be unknown, so the teacher is first
aligned to the ground truth as in its own score (clean mode), then the student to the teacher: AbsRel and delta1 of
depth, and the F1 of edges, over the pixels with ground truth where the teacher lies within the truth's range (outside
it, the teacher's depth is clipped). A student that is far from the truth and close to its teacher is limited by its
labels, not by its training.
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
"""The most pixels kept for the scatter, spread evenly over the images."""


def fidelity(
    student: Path, teacher: Path, samples: Sequence[BenchmarkSample], protocol: Protocol
) -> dict[str, Any] | None:
    """Compare two stores: {"abs_rel", "delta1", "boundary_f1", "images", "points"}; None if no image can be compared.

    points: (teacher, student) depths in metres at up to POINTS pixels. protocol: the benchmark's, for depth.
    """
    kinds = [Kind(settings["kind"]) for store in (student, teacher) if (settings := read_settings(store))]
    if len(kinds) < 2 or protocol.task != "depth" or protocol.truth != "metric_depth":
        return None
    clean = protocol.in_mode("clean")
    rows: list[tuple[float, float, float]] = []
    points: list[tuple[float, float]] = []
    for number, sample in enumerate(samples):
        truth = sample.truth()
        size = (truth.values.shape[-2], truth.values.shape[-1])
        try:
            maps = [read_prediction(find_prediction(s, sample), size)[0] for s in (student, teacher)]
            expected, _ = aligned_depth(maps[1], truth, kinds[1], clean, scaled=True)
            values, low, high = torch.from_numpy(np.ascontiguousarray(expected, np.float32))[None], *_range(truth)
            teacher_truth = DepthMap(values, truth.valid & (values > low) & (values < high), truth.kind)
            depth_protocol, edge_protocol = clean.with_kind(kinds[0]), protocol.of_edges().with_kind(kinds[0])
            sums = TASKS["depth"].measure(maps[0], teacher_truth, kinds[0], depth_protocol).sums
            edges = TASKS["boundary_f1"].measure(maps[0], teacher_truth, kinds[0], edge_protocol).sums
            predicted, _ = aligned_depth(maps[0], teacher_truth, kinds[0], clean, scaled=True)
        except (NoGroundTruthError, BadPredictionError, ValueError, OSError):
            continue  # the score files name the image
        depths = TASKS["depth"].from_sums(sums[None])
        f1 = TASKS["boundary_f1"].from_sums(edges[None])["boundary_f1"]
        rows.append((float(depths["abs_rel"]), float(depths["delta1"]), float(f1)))
        valid_indices = np.flatnonzero(teacher_truth.valid[0].numpy().ravel())
        quota = (number + 1) * POINTS // len(samples) - number * POINTS // len(samples)
        chosen = valid_indices[((np.arange(quota) + 0.5) * len(valid_indices) / max(1, quota)).astype(int)]
        points += [(float(expected.ravel()[i]), float(predicted.ravel()[i])) for i in chosen]
    if not rows:
        return None
    means = dict(zip(("abs_rel", "delta1", "boundary_f1"), map(fmean, zip(*rows, strict=True)), strict=True))
    return {**means, "images": len(rows), "points": points}


def _range(truth: DepthMap) -> tuple[float, float]:
    """The least and the largest valid truth."""
    known = truth.values[truth.valid]
    return (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
