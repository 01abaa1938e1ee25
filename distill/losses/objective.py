"""The weighted sum and its named parts: L = L_sc + 0.5 L_lg + 1.0 L_feat + 2.0 L_grad (Distill-Any-Depth, Sec. 3.2, 4).

Every part is one value per image; the trainer alone averages, over the global batch, so that 8 x 1 equals 2 x 4
accumulated equals 4 processes x 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.core.crops import sample_boxes, student_blocks
from distill.core.depth import KindError
from distill.core.labels import Labels
from distill.losses.losses import anchor_loss, compare, feature_loss, gradient_loss
from distill.losses.normalize import Comparison
from distill.losses.settings import LossSettings


@dataclass(frozen=True, slots=True)
class Objective:
    """What a student is asked for; a recipe's [loss] says it.

    A patch's label meets the student's map at the patch's pixels or at the student's (settings.patch_resolution); both
    are bilinear between pixel centres.
    """

    settings: LossSettings = field(default_factory=LossSettings)

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
        w, shared = self.settings, labels.shared
        comparison = self._compare(pred, shared.values, shared.valid, labels.shared_weight)
        parts = {"shared": comparison.loss}
        total = w.shared * comparison.loss
        if w.local_global and labels.local is not None:
            parts["local_global"] = self._local_global(pred, labels)
            total = total + w.local_global * parts["local_global"]
        if w.gradient:
            normalize = w.normalization != "none"
            parts["gradient"] = gradient_loss(
                pred, shared.values, shared.valid, normalize=normalize, whole=comparison.whole
            )
            total = total + w.gradient * parts["gradient"]
        if w.feature and features is not None and teacher_features is not None:
            parts["feature"] = feature_loss(features, teacher_features, margin=w.feature_margin)
            total = total + w.feature * parts["feature"]
        if w.anchor:
            parts["anchor"] = anchor_loss(pred, shared.values, shared.valid)
            total = total + w.anchor * parts["anchor"]
        parts["dead_contexts"] = comparison.dead.to(pred.dtype)
        return total, parts

    def _compare(self, pred: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None) -> Comparison:
        s = self.settings
        return compare(
            pred,
            target,
            valid,
            s.normalization,
            trim_top=s.trim_top,
            label_only=s.label_only,
            weight=weight,
            reference_hdn=s.reference_hdn,
            contexts=s.contexts,
        )

    def _local_global(self, pred: Tensor, labels: Labels) -> Tensor:
        """Each patch's label against the student's map on the overlap; mean over patches."""
        assert labels.local is not None
        batch, num = labels.boxes.shape[:2]
        if self.settings.patch_resolution == "student":
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
