"""Shared by the terms of metric students: the log ratio of a prediction to its label."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.core.depth import DepthMap

SMALLEST = 1e-6


def log_difference(pred: Tensor, label: DepthMap) -> tuple[Tensor, Tensor]:
    """log pred - log label, 0 where not usable, and the mask of usable pixels: (B,H,W) each."""
    usable = label.valid & torch.isfinite(label.values) & (label.values > 0)
    ratio = pred.clamp(min=SMALLEST).log() - torch.where(usable, label.values, 1.0).log()
    return torch.where(usable, ratio, 0.0), usable
