"""How sharp the depth edges are: Depth Pro's scale-invariant boundary F1 and recall.

An edge lies between two neighbours whose depths have a ratio above a threshold; ten thresholds from 1.05 to 1.25 are
averaged with weights proportional to the threshold. Four kinds of edge are counted apart: the nearer pixel on the
right, left, below, above. Source: Depth Pro (Bochkovskii et al. 2024), Sec. 3.2 and apple/ml-depth-pro,
src/depth_pro/eval/boundary_metrics.py.

The inputs are depth, not disparity. The ratios do not depend on a scale but do depend on a shift, so an affine
prediction must be aligned to the ground truth first. The published metric has no valid mask, so that holes in the truth
count as edges; here a mask may be given, and edges are then counted only between two valid pixels.

Shapes: B batch, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.core.shapes import check_maps

NUM_THRESHOLDS = 10


def boundary_f1(
    pred: Tensor,
    target: Tensor,
    valid: Tensor | None = None,
    *,
    lowest: float = 1.05,
    highest: float = 1.25,
    count: int = NUM_THRESHOLDS,
) -> Tensor:
    """Boundary F1, (B,) float32, of predicted against true depth, both (B,H,W) in any unit.

    valid: (B,H,W) bool, where the truth is known; everywhere if None, as published. Per threshold: recall and precision
    are means over the four kinds of edge (0 where there is none to find). Raises ValueError for different shapes.
    """
    check_maps(pred=pred, target=target, valid=valid)
    near, near_target = _inverse(pred), _inverse(target)
    both_valid = _both_valid(torch.ones_like(target, dtype=torch.bool) if valid is None else valid)
    total = torch.zeros(len(pred), dtype=torch.float64, device=pred.device)
    for threshold, weight in _thresholds(lowest, highest, count):
        recall = precision = torch.zeros_like(total)
        for ratio, ratio_target, usable in zip(_ratios(near), _ratios(near_target), both_valid, strict=True):
            predicted, real = (ratio > threshold) & usable, (ratio_target > threshold) & usable
            hits = _count_edges(predicted & real)
            recall = recall + hits / _count_edges(real).clamp(min=1.0) / 4
            precision = precision + hits / _count_edges(predicted).clamp(min=1.0) / 4
        sum_rates = recall + precision
        total += weight * torch.where(sum_rates > 0, 2 * recall * precision / sum_rates.clamp(min=1e-300), 0.0)
    return total.float()


def boundary_recall(
    pred: Tensor,
    alpha: Tensor,
    *,
    lowest: float = 1.05,
    highest: float = 1.25,
    count: int = NUM_THRESHOLDS,
    foreground: float = 0.1,
) -> Tensor:
    """Boundary recall, (B,) float32: the share of a matte's edges that the predicted depth (B,H,W) has at that pixel.

    alpha: (B,H,W), a matte in [0,1] or a bool mask; above `foreground` is foreground. Predicted edges are thinned
    first: of a run of edges along a row (for up and down: a column) only the strongest stays, the first of equals.
    A matte of 0 to 255 is not divided, as published: 1 is foreground then. Raises ValueError for different shapes.
    """
    check_maps(pred=pred, alpha=alpha)
    inside = alpha.float() > foreground
    near = _inverse(pred)
    total = torch.zeros(len(pred), dtype=torch.float64, device=pred.device)
    real = [_count_edges(edge) for edge in _mask_edges(inside)]
    for threshold, weight in _thresholds(lowest, highest, count):
        for side, (ratio, edge) in enumerate(zip(_ratios(near), _mask_edges(inside), strict=True)):
            predicted = thin(ratio, threshold) if side < 2 else thin(ratio.mT, threshold).mT
            total += weight * _count_edges(predicted & edge) / real[side].clamp(min=1.0) / 4
    return total.float()


def thin(ratio: Tensor, threshold: float) -> Tensor:
    """(B,H,W) bool: of every run of values above the threshold along a row, the largest, the first of equals."""
    above = ratio > threshold
    before = torch.zeros_like(above)
    before[..., 1:] = above[..., :-1]
    run = (above & ~before).flatten().cumsum(0) - 1
    positions = above.flatten().nonzero().flatten()
    if not len(positions):
        return above
    value, run = ratio.reshape(-1)[positions], run[positions]
    num_runs = int(run[-1]) + 1
    largest = value.new_full((num_runs,), -torch.inf).scatter_reduce(0, run, value, "amax")
    tied = positions[value == largest[run]], run[value == largest[run]]
    first = positions.new_full((num_runs,), ratio.numel()).scatter_reduce(0, tied[1], tied[0], "amin")
    thinned = torch.zeros(ratio.numel(), dtype=torch.bool, device=ratio.device)
    thinned[first] = True
    return thinned.reshape(ratio.shape)


def _inverse(depth: Tensor) -> Tensor:
    return 1.0 / depth.clamp(min=1e-6)


def _ratios(near: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ratios by which the right, left, lower and upper of two neighbours is nearer."""
    left, right = near[..., :-1], near[..., 1:]
    upper, lower = near[..., :-1, :], near[..., 1:, :]
    return right / left, left / right, lower / upper, upper / lower


def _both_valid(valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where both of two neighbours are valid, in the order of `_ratios`."""
    across, down = valid[..., :-1] & valid[..., 1:], valid[..., :-1, :] & valid[..., 1:, :]
    return across, across, down, down


def _mask_edges(inside: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where only the right, left, lower or upper of two neighbours is foreground."""
    left, right = inside[..., :-1], inside[..., 1:]
    upper, lower = inside[..., :-1, :], inside[..., 1:, :]
    return right & ~left, left & ~right, lower & ~upper, upper & ~lower


def _thresholds(lowest: float, highest: float, count: int) -> list[tuple[float, float]]:
    """(threshold, weight), weights proportional to thresholds and of sum 1."""
    values = torch.linspace(lowest, highest, count, dtype=torch.float64).tolist()
    return [(value, value / sum(values)) for value in values]


def _count_edges(edges: Tensor) -> Tensor:
    """The number of edges per image, (B,) float64."""
    return edges.flatten(1).sum(1).double()
