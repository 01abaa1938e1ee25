"""The terms of the objective, one file each; a term's weight is the key of [loss] with its name.

A plug-in is a file with

    WEIGHT   the default weight; 0.0: off
    NEEDS    what the term requires: a set of "patches", "features", "dense" and "metric"
    term(inputs, *, option=default, ...) -> Tensor | None

`term` returns one value per image, (B,), in float32 or better, outside autocast; only the trainer averages. A pixel
outside `valid` never counts, whatever its value; an image without usable pixels gives 0. A term whose needs are not
met, or that returns None, is left out for those images; the other terms still apply.

    "patches"    labels of patches                  "dense"   labels for most pixels (core.labels.Supervision)
    "features"   features of student and encoder    "metric"  prediction and labels in metres

Each option is a key of [loss] too, prefixed with the term's name: `margin` of feature.py is `feature_margin`. The first
line of a file's docstring documents its weight, a line "option: meaning." an option.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from distill.core.labels import Labels
from distill.losses.normalize import Comparison

NEEDS = frozenset({"patches", "features", "dense", "metric"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TermInputs:
    """The inputs of a term, for B images of one supervision.

    pred: (B,S,S), of the labels' kind. features, reference: (B,C,h,w), the student's and the frozen encoder's, or None.
    compare: L_Dis between maps (B,H,W) with the recipe's normalization and options: pred, target, valid and each
    pixel's weight or None. counts: unweighted values that are logged with the loss, each (B,); a term may add to them.
    regions: the comparison of pred with the labels' shared map, once a term has computed it.
    """

    pred: Tensor
    labels: Labels
    features: Tensor | None
    reference: Tensor | None
    normalization: str
    patch_resolution: str
    compare: Callable[[Tensor, Tensor, Tensor, Tensor | None], Comparison]
    counts: dict[str, Tensor] = field(default_factory=dict)
    regions: list[Comparison] = field(default_factory=list)

    @property
    def has(self) -> frozenset[str]:
        """Which of NEEDS are met."""
        labels = self.labels
        met = {
            "patches": labels.local is not None,
            "features": self.features is not None and self.reference is not None,
            "dense": labels.supervision.dense,
            "metric": labels.shared.kind.unknown == "metric",
        }
        return frozenset(name for name, holds in met.items() if holds)
