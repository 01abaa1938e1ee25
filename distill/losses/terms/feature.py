"""Weight of alignment with a frozen encoder's features, L_feat; none where the student's is frozen. Paper: 1.

margin: Tokens whose cosine with the frozen encoder's is above this have no loss. Inferred: 0.85, Depth Anything's.
"""

from __future__ import annotations

from torch import Tensor

from distill.losses.losses import feature_loss
from distill.losses.terms import TermInputs

WEIGHT = 1.0
NEEDS = frozenset({"features"})


def term(inputs: TermInputs, *, margin: float = 0.85) -> Tensor:
    """L_feat (B,): 1 - cosine over tokens whose cosine is below `margin`."""
    assert inputs.features is not None and inputs.reference is not None
    return feature_loss(inputs.features, inputs.reference, margin=margin)
