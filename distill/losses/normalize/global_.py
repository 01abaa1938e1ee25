"""One context, the whole image: (d - median) / mean|d - median| (Distill-Any-Depth, Sec. 3.1, N_glo; MiDaS)."""

from __future__ import annotations

from torch import Tensor

from distill.losses.normalize import Comparison
from distill.losses.normalize._contexts import compare_in_contexts

INVARIANT = True
LEVELS = (1,)


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
