"""The whole range, its halves and its quarters together (Distill-Any-Depth, Sec. 3.1; HDN, depth-range contexts)."""

from __future__ import annotations

from torch import Tensor

from distill.losses.normalize import Comparison
from distill.losses.normalize._contexts import compare_in_contexts

INVARIANT = True
LEVELS = (1, 2, 4)


def compare(
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    trim_top: float = 0.0,
    label_only: bool = False,
    weight: Tensor | None = None,
) -> Comparison:
    """See distill.losses.normalize: the loss (B,) and the contexts that carried it."""
    return compare_in_contexts(pred, target, valid, LEVELS, trim_top=trim_top, label_only=label_only, weight=weight)
