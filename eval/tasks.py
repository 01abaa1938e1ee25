"""What is measured on one image, by the protocol's task: its metrics' names, how sums become values, how to measure.

Four tasks. `depth` is every published table: ten metrics of an aligned map. `boundary_f1` asks how sharp and how well
placed its edges are, against a true depth; `boundary_recall` the same against a matte, which has edges and no depth;
`order` which of two points is nearer. Every task adds up sums, so that a score over all pixels, edges or pairs comes
out of the same numbers as a mean over images. Which of the two is the headline is the task's: an image of DA-2K has
one to four pairs, and its accuracy is over all pairs of all images.
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
    """rows: the metrics, the first is the one to sort by. from_sums: (B, N) sums -> each metric, (B,). measure: one
    prediction (H,W) float32 against one truth. over_all: the headline is over the sums of all images, not a mean over
    images. group_mean: the name under which the plain mean over the benchmark's parts stands beside it, or "".
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
    """(H,W) that a prediction must have; None where nobody knows."""
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
    return ImageErrors(_one(value), {}, aligned.scale, aligned.shift, aligned.notes)


def _measure_recall(pred: np.ndarray, alpha: Tensor, kind: Kind, protocol: Protocol) -> ImageErrors:
    """Boundary recall of the prediction as depth; an unknown shift is taken as none, for want of a depth to fit."""
    if not np.isfinite(pred).all():
        raise ValueError(f"NaN or infinity in {int((~np.isfinite(pred)).sum())} of the {pred.size} pixels")
    depth = 1.0 / np.maximum(pred, 1e-6) if kind.quantity == "disparity" else pred
    return ImageErrors(_one(boundary_recall(torch.from_numpy(depth)[None], alpha)), {}, 1.0, 0.0, ())


def _measure_order(pred: np.ndarray, points: Points, kind: Kind, protocol: Protocol) -> ImageErrors:
    """Right pairs of all pairs."""
    right = num_right(pred, points.pairs, kind)
    return ImageErrors(torch.tensor([len(points.pairs), right], dtype=torch.float64), {}, 1.0, 0.0, ())


def _one(value: Tensor) -> Tensor:
    return torch.tensor([1.0, float(value)], dtype=torch.float64)


def _share(name: str) -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda totals: {name: (totals[:, 1] / totals[:, 0]).float()}


def _rows(*names: str) -> dict[str, MetricRow]:
    return {name: MetricRow(False, "{:.4f}") for name in names}


TASKS: Mapping[str, Task] = {
    "depth": Task(METRICS, from_sums, measure),
    "boundary_f1": Task(_rows("boundary_f1"), _share("boundary_f1"), _measure_f1),
    "boundary_recall": Task(_rows("boundary_recall"), _share("boundary_recall"), _measure_recall),
    "order": Task(
        _rows("accuracy", "scene_mean"), _share("accuracy"), _measure_order, over_all=True, group_mean="scene_mean"
    ),
}
