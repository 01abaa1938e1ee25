"""Weight of the patches' labels against the student's map of the region, L_lg. Paper: 0.5."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.core.crops import sample_boxes, student_blocks
from distill.core.labels import Labels
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
        overlap, inside = sample_boxes(pred, labels.boxes, size)
        valid = labels.local.valid & inside.flatten(0, 1)
    loss = inputs.compare(overlap.flatten(0, 1), values, valid, weight).loss.reshape(batch, num)
    labelled = valid.reshape(batch, num, -1).any(-1)
    return torch.where(labelled, loss, 0.0).sum(1) / labelled.sum(1).clamp(min=1)


def _at_student_pixels(pred: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The student's pixels over each patch (B,N,n,n); the label, its valid mask and its weight there, (B*N,n,n)."""
    local = labels.local
    assert local is not None
    blocks, within, number = student_blocks(labels.boxes, pred.shape[-1])
    overlap, _ = sample_boxes(pred, blocks, number)
    boxes = within.flatten(0, 1)[:, None]
    known = local.valid & torch.isfinite(local.values)
    values, inside = sample_boxes(torch.where(known, local.values, 0.0), boxes, number)
    valid = inside & (sample_boxes(known.float(), boxes, number)[0] > 0.999)
    weight = None if labels.local_weight is None else sample_boxes(labels.local_weight, boxes, number)[0][:, 0]
    return overlap, values[:, 0], valid[:, 0], weight
