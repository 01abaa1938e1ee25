"""No normalization: the plain mean absolute difference (Distill-Any-Depth, Sec. 3.1). Not invariant to anything."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.losses.normalize import Comparison, single_or_double

INVARIANT = False
LEVELS: tuple[int, ...] = ()


def compare(
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    trim_top: float = 0.0,
    label_only: bool = False,
    weight: Tensor | None = None,
) -> Comparison:
    """See distill.losses.normalize: the loss (B,). `label_only` changes nothing here; no valid pixels give 0."""
    del label_only
    pred = single_or_double(pred)
    usable = valid & torch.isfinite(target)
    difference = (torch.where(usable, pred, 0.0) - torch.where(usable, target.detach(), 0.0).to(pred.dtype)).abs()
    counted = usable
    if trim_top > 0.0:
        rows = torch.where(usable, difference.detach(), -1.0).flatten(1)
        counts = usable.flatten(1).sum(1)
        keep = (counts * (1.0 - trim_top)).round().long().clamp(min=1)
        position = (rows.shape[1] - counts + keep - 1).clamp(0, rows.shape[1] - 1)
        threshold = rows.sort(1).values.gather(1, position[:, None])
        counted = usable & (difference <= threshold[..., None])
    each = counted.to(pred.dtype) if weight is None else torch.where(counted, weight.to(pred.dtype), 0.0)
    total = each.sum((-2, -1))
    loss = (difference * each).sum((-2, -1)) / torch.where(total > 0, total, 1.0)
    live = counted.any(-1).any(-1).long()
    return Comparison(loss, live, 1 - live)
