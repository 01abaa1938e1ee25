"""The tasks of protocols: each with its metrics' names, how to measure one image, and how sums become values.

There are four. `depth` is that of the published tables: ten metrics of an aligned map. `boundary_f1` measures how sharp
and well placed its edges are, against true depth; `boundary_recall` the same against a matte, which has edges and no
depth; `order` asks which of two points is nearer. Every task adds up sums, so that a score over all pixels, edges or
pairs comes from the same numbers as a mean over images. The task decides which of the two is the headline: an image of
DA-2K has one to four pairs, and its accuracy is over all pairs of all images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.core.depth import DepthMap, Kind
from distill.eval.boundary import boundary_f1, boundary_recall
from distill.eval.da2k import Points, num_right
from distill.eval.fit import ImageErrors, NoGroundTruthError, aligned_depth, as_depth, measure
from distill.eval.metrics import METRICS, MetricRow, from_sums
from distill.eval.protocol import Protocol


@dataclass(frozen=True, slots=True)
class Task:
    """rows: the metrics, the main one first. from_sums: (B, N) sums -> each metric, (B,). measure: one prediction
    (H,W) float32 against one truth. over_all: the headline is computed from the sums of all images, not as a mean over
    images. group_mean: the name of the plain mean over the benchmark's parts, which is given beside it, or "".
    """

    rows: Mapping[str, MetricRow]
    from_sums: Callable[[Tensor], dict[str, Tensor]]
    measure: Callable[[np.ndarray, Any, Kind, Protocol], ImageErrors]
    over_all: bool = False
    group_mean: str = ""

    @property
    def main(self) -> str:
        """The first metric's name."""
        return next(iter(self.rows))


def size_of(truth: Any) -> tuple[int, int] | None:
    """The (H,W) that a prediction must have; None if unknown."""
    if isinstance(truth, Points):
        return truth.size
    height, width = (truth.values if isinstance(truth, DepthMap) else truth).shape[-2:]
    return int(height), int(width)


def _measure_f1(pred: np.ndarray, truth: DepthMap, kind: Kind, protocol: Protocol) -> ImageErrors:
    """Boundary F1 of the prediction as depth; affine kinds are aligned to the truth first."""
    if not bool(truth.valid.any()):
        raise NoGroundTruthError("the truth has no valid pixel")
    truth = as_depth(truth)
    depth, aligned = aligned_depth(pred, truth, kind, protocol)
    value = boundary_f1(torch.from_numpy(depth)[None], truth.values, truth.valid)
    return ImageErrors(_single_value(value), {}, aligned.scale, aligned.shift, aligned.notes)


def _measure_recall(pred: np.ndarray, alpha: Tensor, kind: Kind, protocol: Protocol) -> ImageErrors:
    """Boundary recall of the prediction as depth; an unknown shift is taken as 0, since there is no depth to fit to."""
    if not np.isfinite(pred).all():
        raise ValueError(f"NaN or infinity in {int((~np.isfinite(pred)).sum())} of the {pred.size} pixels")
    depth = 1.0 / np.maximum(pred, 1e-6) if kind.quantity == "disparity" else pred
    return ImageErrors(_single_value(boundary_recall(torch.from_numpy(depth)[None], alpha)), {}, 1.0, 0.0, ())


def _measure_order(pred: np.ndarray, points: Points, kind: Kind, protocol: Protocol) -> ImageErrors:
    """The number of correctly ordered pairs, of all pairs."""
    num_correct = num_right(pred, points.pairs, kind)
    return ImageErrors(torch.tensor([len(points.pairs), num_correct], dtype=torch.float64), {}, 1.0, 0.0, ())


def _single_value(value: Tensor) -> Tensor:
    return torch.tensor([1.0, float(value)], dtype=torch.float64)


def _ratio(name: str) -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda totals: {name: (totals[:, 1] / totals[:, 0]).float()}


def _rows(*names: str) -> dict[str, MetricRow]:
    return {name: MetricRow(False, "{:.4f}") for name in names}


TASKS: Mapping[str, Task] = {
    "depth": Task(METRICS, from_sums, measure),
    "boundary_f1": Task(_rows("boundary_f1"), _ratio("boundary_f1"), _measure_f1),
    "boundary_recall": Task(_rows("boundary_recall"), _ratio("boundary_recall"), _measure_recall),
    "order": Task(
        _rows("accuracy", "scene_mean"), _ratio("accuracy"), _measure_order, over_all=True, group_mean="scene_mean"
    ),
}
