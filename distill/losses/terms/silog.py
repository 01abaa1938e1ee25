"""Weight of the scale-invariant error of the logarithm, of metric students; 0 = off. Depth Anything V2: 1.

variance_focus: How much of a common scale error is ignored: 0 none, 1 all. Depth Anything V2: 0.5; BTS: 0.85.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.losses.terms import TermInputs
from distill.losses.terms._log import log_difference

WEIGHT = 0.0
NEEDS = frozenset({"metric"})


def term(inputs: TermInputs, *, variance_focus: float = 0.5) -> Tensor:
    """sqrt(mean g^2 - variance_focus (mean g)^2), g = log pred - log label, valid pixels (Eigen et al. 2014), (B,)."""
    g, valid = log_difference(inputs.pred, inputs.labels.shared)
    count = valid.sum((-2, -1)).clamp(min=1)
    mean = g.sum((-2, -1)) / count
    value = g.square().sum((-2, -1)) / count - variance_focus * mean.square()
    # sqrt has no finite gradient at 0, and rounding may make the value slightly negative.
    positive = value > 1e-12
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)
