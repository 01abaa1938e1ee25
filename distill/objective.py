"""The weighted sum and its named parts: L = L_sc + 0.5 L_lg + 1.0 L_feat + 2.0 L_grad (Distill-Any-Depth, Sec. 3.2, 4).

Every part is one value per image; the trainer alone averages, over the global batch, so that 8 x 1 equals 2 x 4
accumulated equals 4 processes x 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.crops import sample_boxes
from distill.depth import KindError
from distill.labels import Labels
from distill.losses import anchor_loss, compare, feature_loss, gradient_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How much each part counts; the paper's values. `anchor` is ours and off by default."""

    shared: float = 1.0
    local_global: float = 0.5
    feature: float = 1.0
    gradient: float = 2.0
    anchor: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a student is asked for.

    normalization: a file of distill/normalize. trim_top, label_only: see losses.distillation_loss.
    feature_margin: see losses.feature_loss.
    """

    normalization: str = "hybrid"
    weights: Weights = field(default_factory=Weights)
    trim_top: float = 0.0
    label_only: bool = False
    feature_margin: float = 0.85

    def __call__(
        self, pred: Tensor, labels: Labels, features: Tensor | None = None, teacher_features: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total (B,) and its parts by name, each (B,), unweighted.

        pred: (B,S,S) affine disparity. features, teacher_features: (B,C,h,w) of the student and of the frozen encoder,
        or None where the recipe has no feature alignment. Raises KindError for labels that are not disparity.
        "dead_contexts" among the parts is a count and has no weight.
        """
        kind = labels.shared.kind
        if kind.quantity != "disparity":
            raise KindError(
                f"the student learns affine_disparity, and a label of kind {kind} cannot become that: use a checkpoint "
                f'that predicts disparity, or bridge = "primary"'
            )
        with torch.autocast(pred.device.type, enabled=False):
            return self._sum(pred.float() if pred.dtype != torch.float64 else pred, labels, features, teacher_features)

    def _sum(
        self, pred: Tensor, labels: Labels, features: Tensor | None, teacher_features: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        w, shared = self.weights, labels.shared
        comparison = compare(
            pred, shared.values, shared.valid, self.normalization, trim_top=self.trim_top, label_only=self.label_only
        )
        parts = {"shared": comparison.loss}
        total = w.shared * comparison.loss
        if w.local_global and labels.local is not None:
            parts["local_global"] = self._local_global(pred, labels)
            total = total + w.local_global * parts["local_global"]
        if w.gradient:
            normalize = self.normalization != "none"
            parts["gradient"] = gradient_loss(pred, shared.values, shared.valid, normalize=normalize)
            total = total + w.gradient * parts["gradient"]
        if w.feature and features is not None and teacher_features is not None:
            parts["feature"] = feature_loss(features, teacher_features, margin=self.feature_margin)
            total = total + w.feature * parts["feature"]
        if w.anchor:
            parts["anchor"] = anchor_loss(pred, shared.values, shared.valid)
            total = total + w.anchor * parts["anchor"]
        parts["dead_contexts"] = comparison.dead.to(pred.dtype)
        return total, parts

    def _local_global(self, pred: Tensor, labels: Labels) -> Tensor:
        """Each patch's label against the student's map on the overlap, at patch resolution; mean over patches."""
        local = labels.local
        assert local is not None
        size = local.values.shape[-1]
        seen, inside = sample_boxes(pred, labels.boxes, size)
        batch, num = seen.shape[:2]
        valid = local.valid & inside.reshape(batch * num, size, size)
        loss = compare(
            seen.reshape(batch * num, size, size),
            local.values,
            valid,
            self.normalization,
            trim_top=self.trim_top,
            label_only=self.label_only,
        ).loss.reshape(batch, num)
        labelled = valid.reshape(batch, num, -1).any(-1)
        return torch.where(labelled, loss, 0.0).sum(1) / labelled.sum(1).clamp(min=1)
