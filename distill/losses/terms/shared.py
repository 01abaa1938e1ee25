"""Weight of the region's label against the student's map, L_sc. Paper: 1."""

from __future__ import annotations

from torch import Tensor

from distill.losses.terms import Given

WEIGHT = 1.0
NEEDS = frozenset[str]()


def term(given: Given) -> Tensor:
    """L_sc (B,): the normalized difference over the region. Counts "dead_contexts"."""
    shared = given.labels.shared
    comparison = given.compare(given.pred, shared.values, shared.valid, given.labels.shared_weight)
    given.regions.append(comparison)
    given.counts["dead_contexts"] = comparison.dead.to(given.pred.dtype)
    return comparison.loss
