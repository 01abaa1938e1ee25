"""Weight of the mean absolute error of the logarithm, of metric students; 0 = off. Ours."""

from __future__ import annotations

from torch import Tensor

from distill.losses.terms import TermInputs
from distill.losses.terms._log import log_difference

WEIGHT = 0.0
NEEDS = frozenset({"metric"})


def term(inputs: TermInputs) -> Tensor:
    """mean |log pred - log label| over valid pixels, (B,): about the relative error where that is small."""
    g, valid = log_difference(inputs.pred, inputs.labels.shared)
    return g.abs().sum((-2, -1)) / valid.sum((-2, -1)).clamp(min=1)
