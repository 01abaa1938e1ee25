"""Weight of gradient matching at four scales (MiDaS, Eq. 11), L_grad. Paper: 2.

on_sparse: Also for sparse ground truth, whose neighbouring pixels lie along a scanner's lines. Ours.
"""

from __future__ import annotations

from torch import Tensor

from distill.losses.losses import gradient_loss
from distill.losses.terms import TermInputs

WEIGHT = 2.0
NEEDS = frozenset[str]()


def term(inputs: TermInputs, *, on_sparse: bool = True) -> Tensor | None:
    """L_grad (B,), on the normalized difference, or the raw one for a student trained without normalization."""
    if not on_sparse and not inputs.labels.supervision.dense:
        return None
    shared, normalize = inputs.labels.shared, inputs.normalization != "none"
    whole_image = inputs.regions[0].whole_image if inputs.regions else None
    return gradient_loss(inputs.pred, shared.values, shared.valid, normalize=normalize, whole_image=whole_image)
