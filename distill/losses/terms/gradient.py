"""gradient matching at four scales, on the normalized difference (MiDaS, Eq. 11)"""

from __future__ import annotations

from torch import Tensor

from distill.losses.losses import gradient_loss
from distill.losses.terms import Given

WEIGHT = 2.0
# Neighbours that sparse truth knows lie along the scanner's lines, and say nothing across them.
NEEDS = frozenset({"dense"})


def term(given: Given) -> Tensor:
    """L_grad (B,); on the raw difference for a student trained without normalization."""
    shared = given.labels.shared
    return gradient_loss(given.pred, shared.values, shared.valid, normalize=given.normalization != "none")
