"""Fits teachers' labels to measured depth: `labels.align = "truth"` (Depth Anything 3's method for its real data).

A lidar or a reconstruction measures a few points of an image, some of them wrongly; a teacher predicts the shape
everywhere, up to scale and shift. Per map these two are found by RANSAC and least squares on its inliers, which makes
the teacher's map as metric as the truth, and dense. The fit is in the teacher's own space, disparity or depth.

What the summary of the paper leaves open is ours. Trials: 256 pairs of points (single points where only the scale is
unknown), drawn by the sample's key. The threshold is three standard deviations, estimated from the best trial's median
residual, but at least a hundredth of the truth's spread: it works while more than half of the points are right.

Shapes: B maps, H, W, M points that the fit uses, T trials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.core.crops import generator
from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import Labels
from distill.labelling.fitted import FittedTeacher

TRIALS = 256
POINTS = 4096
"""The largest number of points that the fit uses, evenly chosen among a map's known ones."""
MIN_POINTS = 32
"""Maps with fewer points are not fitted."""
_WIDTH = 3 * 1.4826  # three standard deviations of a normal distribution, from the median deviation
_FLOOR = 0.01


@dataclass(frozen=True, slots=True)
class Fit:
    """truth ~ scale * prediction + shift. residual: mean |difference| over mean |truth - median|, on the inliers: 0 is
    perfect, 1 no better than a constant. inliers: their share of the points. points: number of known points.
    """

    scale: float
    shift: float
    residual: float
    inliers: float
    points: int


def fit_robustly(prediction: Tensor, truth: Tensor, valid: Tensor, *, shift: bool = True, key: str = "") -> Fit:
    """The fit of one map (H,W) to its truth where both are `valid`; without `shift` only a scale.

    The scale is positive: where no such fit has an inlier, there are fewer than MIN_POINTS points, or either map is
    constant, the scale is 0, the residual 1. key: the seed of the trials.
    """
    usable = valid & torch.isfinite(prediction) & torch.isfinite(truth)
    places = usable.flatten().nonzero()[:, 0]
    point_count = len(places)
    if point_count > POINTS:
        places = places[torch.linspace(0, point_count - 1, POINTS).long()]
    x, y = (values.flatten()[places].double().cpu().numpy() for values in (prediction, truth))
    spread = float(np.abs(y - np.median(y)).mean()) if len(y) else 0.0
    if len(x) < MIN_POINTS or not spread > 1e-9 * np.abs(y).max() or not np.ptp(x) > 1e-9 * np.abs(x).max():
        return Fit(0.0, 0.0, 1.0, 0.0, point_count)
    scales, shifts = _trials(x, y, shift, generator("align", key))
    errors = np.abs(scales[:, None] * x + shifts[:, None] - y)
    if not len(errors):
        return Fit(0.0, 0.0, 1.0, 0.0, point_count)
    width = max(_WIDTH * float(np.median(errors, axis=1).min()), _FLOOR * spread)
    inside = errors[np.argmax((errors <= width).sum(1))] <= width
    for _ in range(3):  # least squares on the inliers, which change with the fit
        a, b = _least_squares(x[inside], y[inside], shift)
        inliers = np.abs(a * x + b - y) <= width
        if inliers.sum() < MIN_POINTS // 2 or not a > 0:
            break
        inside = inliers
    a, b = _least_squares(x[inside], y[inside], shift)
    if not a > 0:
        return Fit(0.0, 0.0, 1.0, 0.0, point_count)
    y_in = y[inside]
    y_spread = float(np.abs(y_in - np.median(y_in)).mean())
    residual = min(1.0, float(np.abs(a * x[inside] + b - y_in).mean()) / y_spread) if y_spread > 0 else 1.0
    return Fit(a, b, residual, float(inside.mean()), point_count)


def _trials(x: np.ndarray, y: np.ndarray, shift: bool, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scales and shifts (T,) of the trials whose scale is positive."""
    first, second = draw.integers(0, len(x), (2, TRIALS))
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = (y[first] - y[second]) / (x[first] - x[second]) if shift else y[first] / x[first]
    good = np.isfinite(scales) & (scales > 0)
    scales, first = scales[good], first[good]
    return scales, y[first] - scales * x[first] if shift else np.zeros_like(scales)


def _least_squares(x: np.ndarray, y: np.ndarray, shift: bool) -> tuple[float, float]:
    if not shift:
        power = float((x * x).sum())
        return (float((x * y).sum()) / power if power > 0 else 0.0), 0.0
    along = x - x.mean()
    power = float((along * along).sum())
    a = float((along * (y - y.mean())).sum()) / power if power > 0 else 0.0
    return a, float(y.mean() - a * x.mean())


def align_maps(
    label: DepthMap, truth: DepthMap, *, max_residual: float, min_inliers: float, key: str = ""
) -> tuple[DepthMap, list[dict[str, Any]]]:
    """Labels (B,H,W) in the truth's metres (or its unknown scale), each by its own fit, and a record of each fit.

    A map whose residual is larger or whose share of inliers is smaller is nowhere valid; each record has scale, shift,
    residual, inliers, points and dropped. Raises KindError for truth whose shift is unknown.
    """
    if truth.kind.unknown == "affine":
        raise KindError(f"labels cannot be fitted to {truth.kind}, whose scale and shift are unknown: use metric truth")
    kind = Kind(f"{truth.kind.unknown}_{label.kind.quantity}")
    truth_of_kind = truth.convert(kind)
    values, valid = torch.zeros_like(label.values), torch.zeros_like(label.valid)
    records = []
    for i in range(len(label)):
        both = label.valid[i] & truth_of_kind.valid[i]
        fit = fit_robustly(
            label.values[i], truth_of_kind.values[i], both, shift=label.kind.unknown == "affine", key=f"{key}.{i}"
        )
        dropped = not (fit.scale > 0 and fit.residual <= max_residual and fit.inliers >= min_inliers)
        if not dropped:
            fitted = label.values[i] * fit.scale + fit.shift
            valid[i] = label.valid[i] & torch.isfinite(fitted) & (fitted > 0)
            values[i] = torch.where(valid[i], fitted, 0.0)
        record = {"scale": fit.scale, "shift": fit.shift, "residual": round(fit.residual, 6)}
        records.append(record | {"inliers": round(fit.inliers, 6), "points": fit.points, "dropped": dropped})
    return DepthMap(values, valid, kind), records


@dataclass(frozen=True, slots=True)
class Aligned(FittedTeacher):
    """A teacher whose labels are fitted to each image's truth. max_residual, min_inliers: see `align_maps`."""

    max_residual: float
    min_inliers: float

    def align(
        self, shared: DepthMap, local: DepthMap | None, truth: Labels, key: str
    ) -> tuple[DepthMap, DepthMap | None, dict[str, Any]]:
        """A region's maps fitted to its truth, and the record for its json: region and patches have their own fits."""
        limits = {"max_residual": self.max_residual, "min_inliers": self.min_inliers}
        fitted, fits = align_maps(shared, truth.shared, **limits, key=key)
        record: dict[str, Any] = {"shared": fits[0], "local": []}
        if local is None or truth.local is None:
            return fitted, None, record
        patches, record["local"] = align_maps(local, truth.local, **limits, key=f"{key}.local")
        return fitted, patches, record


def drop_reason(fit: dict[str, Any]) -> str:
    """The reason why a fit was dropped, for the list of quarantined images."""
    if not fit["scale"]:
        return f"no fit to the truth ({fit['points']} points)"
    return f"fits the truth badly (residual {fit['residual']:.2f}, {fit['inliers']:.0%} of {fit['points']} points)"
