"""Weight of the region's label against the student's map, L_sc. Paper: 1."""

from __future__ import annotations

from torch import Tensor

from distill.losses.terms import TermInputs

WEIGHT = 1.0
NEEDS = frozenset[str]()


def term(inputs: TermInputs) -> Tensor:
    """L_sc (B,): the normalized difference over the region. Counts "dead_contexts"."""
    shared = inputs.labels.shared
    comparison = inputs.compare(inputs.pred, shared.values, shared.valid, inputs.labels.shared_weight)
    inputs.regions.append(comparison)
    inputs.counts["dead_contexts"] = comparison.dead.to(inputs.pred.dtype)
    return comparison.loss
