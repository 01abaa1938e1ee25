"""The weighted sum and its named parts: L = L_sc + 0.5 L_lg + 1.0 L_feat + 2.0 L_grad (Distill-Any-Depth, Sec. 3.2, 4).

Every part is one value per image; the trainer alone averages, over the global batch, so that 8 x 1 equals 2 x 4
accumulated equals 4 processes x 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from distill.core.crops import sample_boxes, student_blocks
from distill.core.depth import KindError
from distill.core.labels import Labels
from distill.losses.losses import anchor_loss, compare, feature_loss, gradient_loss
from distill.losses.normalize import Comparison


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

    normalization: a file of distill/losses/normalize. trim_top, label_only, faithful, contexts: see
    losses.distillation_loss; faithful takes its mean over a micro-batch. feature_margin: see losses.feature_loss.
    patch_resolution: where a patch's label meets the student's map: "patch" samples the student at the patch's pixels
    (finer: the label keeps all its detail), "student" samples the label at the student's own pixels (nothing is
    asked of the student between its pixels). Both are bilinear between pixel centres. The paper does not say; ours.
    """

    normalization: str = "hybrid"
    weights: Weights = field(default_factory=Weights)
    trim_top: float = 0.0
    label_only: bool = False
    feature_margin: float = 0.85
    faithful: bool = False
    contexts: str = "dr"
    patch_resolution: Literal["patch", "student"] = "patch"

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
        comparison = self._compare(pred, shared.values, shared.valid, labels.shared_weight)
        parts = {"shared": comparison.loss}
        total = w.shared * comparison.loss
        if w.local_global and labels.local is not None:
            parts["local_global"] = self._local_global(pred, labels)
            total = total + w.local_global * parts["local_global"]
        if w.gradient:
            normalize = self.normalization != "none"
            parts["gradient"] = gradient_loss(
                pred, shared.values, shared.valid, normalize=normalize, whole=comparison.whole
            )
            total = total + w.gradient * parts["gradient"]
        if w.feature and features is not None and teacher_features is not None:
            parts["feature"] = feature_loss(features, teacher_features, margin=self.feature_margin)
            total = total + w.feature * parts["feature"]
        if w.anchor:
            parts["anchor"] = anchor_loss(pred, shared.values, shared.valid)
            total = total + w.anchor * parts["anchor"]
        parts["dead_contexts"] = comparison.dead.to(pred.dtype)
        return total, parts

    def _compare(self, pred: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None) -> Comparison:
        return compare(
            pred,
            target,
            valid,
            self.normalization,
            trim_top=self.trim_top,
            label_only=self.label_only,
            weight=weight,
            faithful=self.faithful,
            contexts=self.contexts,
        )

    def _local_global(self, pred: Tensor, labels: Labels) -> Tensor:
        """Each patch's label against the student's map on the overlap; mean over patches."""
        assert labels.local is not None
        batch, num = labels.boxes.shape[:2]
        if self.patch_resolution == "student":
            seen, values, valid, weight = _at_student_pixels(pred, labels)
        else:
            values, size, weight = labels.local.values, labels.local.values.shape[-1], labels.local_weight
            seen, inside = sample_boxes(pred, labels.boxes, size)
            valid = labels.local.valid & inside.flatten(0, 1)
        loss = self._compare(seen.flatten(0, 1), values, valid, weight).loss.reshape(batch, num)
        labelled = valid.reshape(batch, num, -1).any(-1)
        return torch.where(labelled, loss, 0.0).sum(1) / labelled.sum(1).clamp(min=1)


def _at_student_pixels(pred: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The student's pixels over each patch (B,N,n,n), and the label, its valid and its weight there, (B*N,n,n)."""
    local = labels.local
    assert local is not None
    blocks, within, number = student_blocks(labels.boxes, pred.shape[-1])
    seen, _ = sample_boxes(pred, blocks, number)
    boxes = within.flatten(0, 1)[:, None]
    known = local.valid & torch.isfinite(local.values)
    values, inside = sample_boxes(torch.where(known, local.values, 0.0), boxes, number)
    valid = inside & (sample_boxes(known.float(), boxes, number)[0] > 0.999)
    weight = None if labels.local_weight is None else sample_boxes(labels.local_weight, boxes, number)[0][:, 0]
    return seen, values[:, 0], valid[:, 0], weight
