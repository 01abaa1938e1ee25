"""Weight of a term that keeps the output's magnitude near the label's; 0 = off. Ours."""

from __future__ import annotations

from torch import Tensor

from distill.losses.losses import anchor_loss
from distill.losses.terms import TermInputs

WEIGHT = 0.0
NEEDS = frozenset[str]()


def term(inputs: TermInputs) -> Tensor:
    """The squared log ratio of the two deviations, (B,)."""
    return anchor_loss(inputs.pred, inputs.labels.shared.values, inputs.labels.shared.valid)
