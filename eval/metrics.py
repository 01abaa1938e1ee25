"""The ten metrics of zero-shot depth, one value per image.

Inputs are (B,H,W) maps of positive values of one quantity (metres, if both are depth), already aligned and clipped; an
image without a valid pixel gives NaN. Definitions (prs-eth/Marigold, src/util/metric.py) for prediction p and truth t:

    abs_rel    mean |p - t| / t                 sq_rel     mean (p - t)^2 / t, in metres
    rmse       root of the mean (p - t)^2       rmse_log   root of the mean (ln p - ln t)^2
    log10      mean |log10 p - log10 t|         silog      100 x the standard deviation of ln p - ln t
    delta1     share of max(p/t, t/p) < 1.25    delta2, delta3   < 1.25^2, < 1.25^3
    i_rmse     root of the mean (1/p - 1/t)^2, in 1/metres; explodes where a depth was clipped to nearly 0

All ten are computed from eleven sums over pixels, so one pass is enough (`sums`, then `from_sums`), and the added sums
of several images give the values pooled over all their pixels. The pass works on blocks that fit into the cache, which
makes it fast; block sums are float32, totals float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from distill.core.shapes import check_maps

NUM_SUMS = 11
_BLOCK = 65536
_THRESHOLDS = [[1.25], [1.25**2], [1.25**3]]
# silog's variance below this share of the squared mean (a wrong scale, a single pixel) is lost in float32 sums.
_CANCELLING = 1 / 64


@dataclass(frozen=True, slots=True)
class MetricRow:
    """How a metric appears in a table: which direction is better, its number format, and its unit if it has one."""

    lower_is_better: bool
    format: str
    unit: str = ""


def sums(pred: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B, NUM_SUMS) float64 sums over the valid pixels of (B,H,W) or (B,N) maps; all are valid where None.

    With d = pred - target and l = log(pred / target), the columns are: the number of pixels, |d|/target, d^2/target,
    d^2, l, l^2, |l|, (1/pred - 1/target)^2, and the numbers of pixels with max(pred/target, target/pred) < 1.25,
    1.25^2, 1.25^3. Computed in float32, or in float64 where pred or target is. Raises ValueError for maps of different
    shapes or a `valid` that is not bool.
    """
    check_maps(pred=pred, target=target, valid=valid, any_rank=True)
    # A number of pixels, or a sum over them, overflows float16.
    pred, target = (each if each.dtype == torch.float64 else each.float() for each in (pred, target))
    totals = torch.zeros(len(pred), NUM_SUMS, dtype=torch.float64, device=pred.device)
    for image in range(len(pred)):
        flat_pred, flat_target = pred[image].reshape(-1), target[image].reshape(-1)
        if valid is not None:
            chosen = valid[image].reshape(-1)
            flat_pred, flat_target = flat_pred[chosen], flat_target[chosen]
        for start in range(0, len(flat_pred), _BLOCK):
            block = slice(start, start + _BLOCK)
            totals[image] += block_sums(flat_pred[block], flat_target[block])
    return totals


def block_sums(pred: Tensor, target: Tensor) -> Tensor:
    """The columns of `sums`, (NUM_SUMS,) float64, of two flat float32 blocks short enough for the cache."""
    difference = pred - target
    relative = difference / target
    ratio = pred / target
    worst = torch.maximum(ratio, target / pred)
    log = ratio.log_()
    # Counting in float32 is exact up to 2^24 and three times as fast as creating a bool tensor.
    below = torch.lt(worst, worst.new_tensor(_THRESHOLDS), out=worst.new_empty(3, len(worst)))
    parts = [
        relative.abs().sum(),
        difference @ relative,
        difference @ difference,
        log.sum(),
        log @ log,
        log.abs().sum(),
        relative.div_(pred) @ relative,
    ]
    totals = torch.cat([worst.new_full((1,), len(pred)), torch.stack(parts), below.sum(1)]).double()
    if totals[5] * len(pred) < (1 + _CANCELLING) * totals[4].square():
        exact = log.double()
        totals[4], totals[5] = exact.sum(), exact @ exact
    return totals


def from_sums(totals: Tensor) -> dict[str, Tensor]:
    """The ten metrics, each (B,) float32, of (B, NUM_SUMS) sums; NaN where no pixel was counted."""
    count = totals[:, 0]
    relative, squared, square, log, log_square, log_abs, inverse, *deltas = (totals[:, 1:] / count[:, None]).T
    values = {
        "abs_rel": relative,
        "sq_rel": squared,
        "rmse": square.sqrt(),
        "rmse_log": log_square.sqrt(),
        "log10": log_abs / math.log(10.0),
        "delta1": deltas[0],
        "delta2": deltas[1],
        "delta3": deltas[2],
        "i_rmse": inverse.sqrt(),
        "silog": 100.0 * (log_square - log.square()).clamp(min=0.0).sqrt(),
    }
    return {name: value.float() for name, value in values.items()}


def all_metrics(pred: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Every metric by name, each (B,) float32, in one pass over (B,H,W) maps."""
    return from_sums(sums(pred, target, valid))


METRICS: MappingProxyType[str, MetricRow] = MappingProxyType(
    {
        "abs_rel": MetricRow(True, "{:.4f}"),
        "sq_rel": MetricRow(True, "{:.4f}", "m"),
        "rmse": MetricRow(True, "{:.4f}", "m"),
        "rmse_log": MetricRow(True, "{:.4f}"),
        "log10": MetricRow(True, "{:.4f}"),
        "delta1": MetricRow(False, "{:.4f}"),
        "delta2": MetricRow(False, "{:.4f}"),
        "delta3": MetricRow(False, "{:.4f}"),
        "i_rmse": MetricRow(True, "{:.4f}", "1/m"),
        "silog": MetricRow(True, "{:.3f}"),
    }
)
