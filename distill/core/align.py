"""Least-squares alignment of a prediction to a target: masked, batched, closed form.

The problem: min over (scale, shift) of sum over valid of (scale * pred + shift - target)^2, per image. Solved on
centred values in float64, so that a large shift costs no digits. A constant prediction or a single valid pixel leaves
the scale undetermined; then the minimum-norm solution of `numpy.linalg.lstsq` is returned, as the published
evaluation does. No valid pixel gives (0, 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.core.shapes import check_maps


def _masked_mean(values: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    return torch.where(valid, values, 0.0).sum((-2, -1)) / count


def fit_affine(pred: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift, each (B,) float32, that bring `pred` (B,H,W) to `target` (B,H,W) on `valid` (B,H,W) bool.

    Raises ValueError for maps of different shapes.
    """
    check_maps(pred=pred, target=target, valid=valid, any_rank=pred.ndim > 3)
    pred64, target64 = pred.double(), target.double()
    count = valid.sum((-2, -1)).clamp(min=1).double()
    mean_pred = _masked_mean(pred64, valid, count)
    mean_target = _masked_mean(target64, valid, count)
    dev_pred = torch.where(valid, pred64 - mean_pred[:, None, None], 0.0)
    dev_target = torch.where(valid, target64 - mean_target[:, None, None], 0.0)
    variance = dev_pred.square().sum((-2, -1)) / count
    covariance = (dev_pred * dev_target).sum((-2, -1)) / count
    # Below float32 resolution of the prediction the spread is rounding, not signal.
    constant = variance <= (mean_pred.square() + variance) * 1e-13
    scale = torch.where(constant, 0.0, covariance / torch.where(constant, 1.0, variance))
    shift = mean_target - scale * mean_pred
    # Minimum norm of (a, b) with a*m + b = t, for a constant prediction m.
    norm = mean_pred.square() + 1.0
    scale = torch.where(constant, mean_target * mean_pred / norm, scale)
    shift = torch.where(constant, mean_target / norm, shift)
    return scale.float(), shift.float()


def apply_affine(pred: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * pred + shift per image: (B,H,W) from (B,H,W), (B,), (B,)."""
    return pred * scale[:, None, None] + shift[:, None, None]
