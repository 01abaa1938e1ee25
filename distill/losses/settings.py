"""[loss]: what the student is asked for; distill.losses.objective computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill.core.plugins import name_fault
from distill.core.settings import below, refuse, unknown_words


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """The objective: the weights of its parts, and how maps are brought to each other."""

    normalization: str = "hybrid"
    """How prediction and label are normalized: one of `distill list normalizations`, or a Python file of yours
    ("./mine.py"). Paper: hybrid."""
    shared: float = 1.0
    """Weight of the region's label against the student's map. Paper: 1."""
    local_global: float = 0.5
    """Weight of the patches' labels against the student's map. Paper: 0.5."""
    feature: float = 1.0
    """Weight of alignment with a frozen encoder's features; it has no part where the student's encoder is frozen.
    Paper: 1."""
    gradient: float = 2.0
    """Weight of multi-scale gradient matching. Paper: 2."""
    anchor: float = 0.0
    """Weight of a term that holds the output's magnitude near the label's; 0 = off. Ours."""
    trim_top: float = 0.0
    """The share of pixels with the largest loss that is dropped, in [0, 1). Depth Anything V2: 0.1; off, as in the
    paper."""
    label_only: bool = False
    """The student is brought to the label's scale by the label's statistics, not by its own. Ours."""
    feature_margin: float = 0.85
    """Tokens whose cosine with the frozen encoder's is above this are left alone. Paper: 0.85."""
    reference_hdn: bool = False
    """HDN's released loss to the letter, oddities included (losses.losses.hdn_loss); its mean is over a
    micro-batch."""
    contexts: Literal["dr", "dp", "ds"] = "dr"
    """Which of HDN's contexts, with reference_hdn: equal parts of the label's range ("dr"), of its pixels ("dp"),
    squares ("ds")."""
    patch_resolution: Literal["patch", "student"] = "patch"
    """Where a patch's label meets the student's map: at the patch's pixels, which keeps all of the label's detail, or
    at the student's own pixels, which asks for nothing between them. The paper does not say; ours."""

    def __post_init__(self) -> None:
        refuse(unknown_words(self))
        fault = name_fault("distill.losses.normalize", self.normalization)
        if fault:
            raise ValueError(fault)
        if self.reference_hdn and (self.trim_top or self.label_only):
            raise ValueError("reference_hdn is HDN's released loss, which knows no trim_top and no label_only")
        if self.contexts != "dr" and not self.reference_hdn:
            raise ValueError(
                f'contexts = "{self.contexts}" is a variant of HDN\'s released loss: set reference_hdn = true'
            )
        faults = below(self, shared=0, local_global=0, feature=0, gradient=0, anchor=0, feature_margin=0)
        if not 0.0 <= self.trim_top < 1.0:
            faults.append(f"trim_top must be in [0, 1), not {self.trim_top}")
        refuse(faults)
