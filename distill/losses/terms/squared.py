"""Weight of the mean squared difference of the region's normalized maps; 0 = off. Ours.

Where two teachers alternate, the absolute difference is minimal at one of their labels, the squared one between them.
"""

from __future__ import annotations

from torch import Tensor

from distill.losses.losses import squared_loss
from distill.losses.terms import TermInputs

WEIGHT = 0.0
NEEDS = frozenset[str]()


def term(inputs: TermInputs) -> Tensor:
    """The mean squared difference, (B,), whatever `normalization` says: each map by its own median and deviation."""
    labels = inputs.labels
    return squared_loss(inputs.pred, labels.shared.values, labels.shared.valid, labels.shared_weight)
