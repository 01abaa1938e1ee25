"""Converts affine depth to disparity with the help of another teacher: `labels.bridge = "primary"`.

Depth up to scale and shift determines no disparity: 1 / (a d + b) depends on an unknown shift. Where a second teacher
labelled the same crop, a and b can be fitted to its disparity, crop by crop. The label is then as good as the fit: the
residual is recorded, and a label whose residual is too large is dropped, that is, nowhere valid.

The fit takes only two numbers per crop from the primary. All detail is the assistant's own.

Shapes: B maps, H, W, M pixels that the fit uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import Labels
from distill.labelling.fitted import FittedTeacher

# The fit uses at most this many pixels of a map, on a regular grid: two parameters need no more.
PIXELS = 4096
# With fewer pixels a crop cannot be fitted.
MIN_PIXELS = 32
_STEPS = 30
# Huber's constant for residuals in standard deviations, times the ratio of those to median deviations.
_HUBER = 1.345 * 1.4826


def fit_reciprocal(depth: Tensor, disparity: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and the residual, (B,) float64 each, of the robust least-squares fit 1 / (a depth + b) ~ disparity.

    depth, disparity: (B,H,W). valid: (B,H,W) bool, where both may be used. a depth + b is positive at every valid
    pixel, and a is positive: disparity falls with depth. The residual is mean |1 / (a depth + b) - disparity| over mean
    |disparity - median|: 0 for a perfect fit, 1 for no better than a constant. Where no such fit exists (too few
    pixels, a constant map, disparity that grows with depth) the residual is 1, and a = 0, b = 1.

    The initial values are a linear fit of a depth + b to the reciprocal, each pixel weighted by disparity**4, which
    converts errors of the reciprocal to errors of disparity. Damped Gauss-Newton steps with Huber's weights follow, on
    the logarithms of a depth + b at the two ends of the depth's range, so that it stays positive.
    """
    stride = max(1, math.ceil(math.sqrt(depth[0].numel() / PIXELS)))
    d, q, use = (x[:, ::stride, ::stride].flatten(1) for x in (depth.double(), disparity.double(), valid))
    use = use & torch.isfinite(d) & torch.isfinite(q)
    # The range of the whole map, not of the grid: positive at its ends is positive everywhere.
    known = valid & torch.isfinite(depth)
    low = torch.where(known, depth.double(), torch.inf).flatten(1).amin(1)
    high = torch.where(known, depth.double(), -torch.inf).flatten(1).amax(1)
    count = use.sum(1)
    d, q = torch.where(use, d, 0.0), torch.where(use, q, 0.0)
    mean_q = q.abs().sum(1) / count.clamp(min=1)
    middle = torch.where(use, q, torch.nan).nanmedian(1).values.nan_to_num()
    spread = torch.where(use, (q - middle[:, None]).abs(), 0.0).sum(1) / count.clamp(min=1)
    possible = (count >= MIN_PIXELS) & (high > low) & (spread > 1e-6 * mean_q)
    span, unit = torch.where(possible, high - low, 1.0), torch.where(possible, mean_q, 1.0)
    along = torch.where(use & possible[:, None], (d - low[:, None]) / span[:, None], 0.0)
    target = q / unit[:, None]
    ends = _refine(_begin(along, target, use), along, target, use)
    fitted = _curve(ends, along)[0] * unit[:, None]
    error = torch.where(use, (fitted - q).abs(), 0.0).sum(1) / count.clamp(min=1)
    near, far = (ends.exp() / unit[:, None]).unbind(1)
    a = (far - near) / span
    possible = possible & (a > 0)
    residual = torch.where(possible, error / torch.where(possible, spread, 1.0), 1.0).clamp(max=1.0)
    return torch.where(possible, a, 0.0), torch.where(possible, near - a * low, 1.0), residual


def _curve(ends: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1 / y and its derivatives with respect to `ends` (B,2), the logarithms of y at along = 0 and 1; (B,M) each."""
    near, far = (e[:, None] for e in ends.exp().unbind(1))
    value = 1.0 / (near + (far - near) * along)
    return value, -value.square() * (1.0 - along) * near, -value.square() * along * far


def _solve(p: Tensor, r: Tensor, s: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The solution of [[p, r], [r, s]] (u, v) = (x, y)."""
    det = p * s - r * r
    det = torch.where(det.abs() > 1e-30, det, 1e-30)
    return (s * x - r * y) / det, (p * y - r * x) / det


def _begin(along: Tensor, target: Tensor, use: Tensor) -> Tensor:
    """The logarithms of y at both ends, from the weighted linear fit of y to 1 / target."""
    usable = use & (target > 1e-3)
    safe = torch.where(usable, target, 1.0)
    w = torch.where(usable, safe**4, 0.0)
    p, r, s = (w * (1 - along) ** 2).sum(1), (w * (1 - along) * along).sum(1), (w * along**2).sum(1)
    near, far = _solve(p, r, s, (w * (1 - along) / safe).sum(1), (w * along / safe).sum(1))
    # y at the near end cannot be far below the reciprocal of the largest disparity.
    floor = 0.2 / torch.where(use, target, 0.0).amax(1).clamp(min=1e-3)
    return torch.stack([torch.maximum(near, floor), torch.maximum(far, floor)], 1).log()


def _refine(ends: Tensor, along: Tensor, target: Tensor, use: Tensor) -> Tensor:
    """Levenberg-Marquardt steps on Huber's loss, whose width follows the residuals."""
    damping = torch.full_like(ends[:, 0], 1e-3)
    for _ in range(_STEPS):
        value, by_near, by_far = _curve(ends, along)
        residual = torch.where(use, value - target, 0.0)
        width = torch.where(use, residual.abs(), torch.nan).nanmedian(1).values.nan_to_num() * _HUBER + 1e-9
        w = torch.where(use, width[:, None] / torch.maximum(residual.abs(), width[:, None]), 0.0)
        p, r, s = (w * by_near**2).sum(1), (w * by_near * by_far).sum(1), (w * by_far**2).sum(1)
        step = _solve(
            p * (1 + damping) + 1e-12,
            r,
            s * (1 + damping) + 1e-12,
            -(w * by_near * residual).sum(1),
            -(w * by_far * residual).sum(1),
        )
        tried = (ends + torch.stack(step, 1).clamp(-2.0, 2.0)).clamp(-20.0, 20.0)
        other = torch.where(use, _curve(tried, along)[0] - target, 0.0)
        better = _huber(other, width) < _huber(residual, width)
        moved = torch.where(better, (tried - ends).abs().amax(1), 0.0)
        ends = torch.where(better[:, None], tried, ends)
        damping = torch.where(better, damping * 0.3, damping * 10.0).clamp(1e-9, 1e9)
        if bool(((damping >= 1e6) | (better & (moved < 1e-9))).all()):
            break
    return ends


def _huber(residual: Tensor, width: Tensor) -> Tensor:
    size, k = residual.abs(), width[:, None]
    return torch.where(size <= k, 0.5 * size.square(), k * (size - 0.5 * k)).sum(1)


def bridge_map(depth: DepthMap, primary: DepthMap, *, max_residual: float) -> tuple[DepthMap, list[dict[str, Any]]]:
    """Affine depth as affine disparity, each map of the batch by its own fit to `primary`, and a record of each fit.

    max_residual: maps with a larger residual are nowhere valid. Each record has a, b, residual and dropped. Raises
    KindError where `primary` is not disparity.
    """
    if primary.kind.quantity != "disparity":
        raise KindError(
            f"{depth.kind} can only be bridged to disparity, but the primary teacher's labels are {primary.kind}"
        )
    both = depth.valid & primary.valid
    known = depth.valid & torch.isfinite(depth.values)
    a, b, residual = fit_reciprocal(depth.values, primary.values, both)
    kept = residual <= max_residual
    y = a[:, None, None] * torch.where(known, depth.values, 0.0).double() + b[:, None, None]
    # Pixels that the primary does not know may lie beyond the fitted range.
    valid = known & kept[:, None, None] & (y > 0)
    values = torch.where(valid, 1.0 / torch.where(valid, y, 1.0), 0.0).float()
    fits = [
        {"a": float(a[i]), "b": float(b[i]), "residual": round(float(residual[i]), 6), "dropped": not bool(kept[i])}
        for i in range(len(depth))
    ]
    return DepthMap(values, valid, Kind.AFFINE_DISPARITY), fits


@dataclass(frozen=True, slots=True)
class Bridged(FittedTeacher):
    """An assistant of affine depth whose labels become disparity by a fit to those of the teacher named `primary`.

    It takes the assistant's place in a list of teachers, after its primary. max_residual: see `bridge_map`.
    """

    primary: str
    max_residual: float

    def bridge(
        self, shared: DepthMap, local: DepthMap | None, primary: Labels
    ) -> tuple[DepthMap, DepthMap | None, dict[str, Any]]:
        """A region's maps as disparity, and the record for its json: the region and every patch have their own fit."""
        disparity, fits = bridge_map(shared, primary.shared, max_residual=self.max_residual)
        record: dict[str, Any] = {"primary": self.primary, "shared": fits[0], "local": []}
        if local is None or primary.local is None:
            return disparity, None, record
        patches, record["local"] = bridge_map(local, primary.local, max_residual=self.max_residual)
        return disparity, patches, record
