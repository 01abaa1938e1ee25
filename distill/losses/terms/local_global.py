"""Weight of the patches' labels against the student's map of the region, L_lg. Paper: 0.5."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.core import crops
from distill.core.labels import Labels
from distill.losses import fused
from distill.losses.terms import TermInputs

WEIGHT = 0.5
NEEDS = frozenset({"patches"})


def term(inputs: TermInputs) -> Tensor:
    """L_lg (B,): each patch's label against the student's map on the overlap; the mean over patches with a label."""
    pred, labels = inputs.pred, inputs.labels
    assert labels.local is not None
    batch, num = labels.boxes.shape[:2]
    if inputs.patch_resolution == "student":
        overlap, values, valid, weight = _at_student_pixels(pred, labels)
    else:
        values, size, weight = labels.local.values, labels.local.values.shape[-1], labels.local_weight
        overlap, inside = _sample(pred, labels.boxes, size)
        valid = labels.local.valid & inside.flatten(0, 1)
    loss = inputs.compare(overlap.flatten(0, 1), values, valid, weight).loss.reshape(batch, num)
    labelled = valid.reshape(batch, num, -1).any(-1)
    return torch.where(labelled, loss, 0.0).sum(1) / labelled.sum(1).clamp(min=1)


def _at_student_pixels(pred: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The student's pixels over each patch (B,N,n,n); the label, its valid mask and its weight there, (B*N,n,n)."""
    local = labels.local
    assert local is not None
    blocks, within, number = crops.student_blocks(labels.boxes, pred.shape[-1])
    overlap, _ = _sample(pred, blocks, number)
    boxes = within.flatten(0, 1)[:, None]
    known = local.valid & torch.isfinite(local.values)
    values, inside = _sample(torch.where(known, local.values, 0.0), boxes, number)
    valid = inside & (_sample(known.float(), boxes, number)[0] > 0.999)
    weight = None if labels.local_weight is None else _sample(labels.local_weight, boxes, number)[0][:, 0]
    return overlap, values[:, 0], valid[:, 0], weight


def _sample(maps: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """As `crops.sample_boxes`."""
    fused_result = fused.sample_boxes(maps, boxes, size, reference=crops.sample_boxes)
    return crops.sample_boxes(maps, boxes, size) if fused_result is None else fused_result
