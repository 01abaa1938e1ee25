"""The loss in contexts of a whole batch at once and its gradient: the version for accelerators.

The same numbers as `_per_image`, from sorts and masked sums over (B,N) tensors: nothing here synchronizes with the
device, and no shape depends on values. Shapes: B images, N pixels of each, F finest parts, C contexts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.losses.normalize._per_image import FLAT, FLOOR, MIN_PIXELS


def _per_part(values: Tensor, part: Tensor, finest: int) -> Tensor:
    """Sums of (B,N) values over each part: (B,F). Masked sums instead of atomics make it deterministic."""
    return torch.stack([torch.where(part == k, values, 0).sum(1) for k in range(finest)], 1)


def _places(counts: Tensor, pixels: int) -> Tensor:
    """The index of each context's lower median (B,level) among pixels ordered by context and then by value."""
    before = counts.cumsum(1) - counts
    return (before + (counts - 1).clamp(min=0) // 2).clamp(max=pixels - 1)


def _label_medians(target: Tensor, part: Tensor, counts: list[Tensor], finest: int) -> list[Tensor]:
    """The lower medians (B,level) of each level's contexts. Parts increase with the label, so one sort serves all."""
    ordered = torch.where(part < finest, target, torch.inf).sort(dim=1).values
    return [ordered.gather(1, _places(each, target.shape[1])) for each in counts]


def _medians(pred: Tensor, part: Tensor, counts: list[Tensor], finest: int) -> list[Tensor]:
    """The prediction's lower medians: sorted by value once, then for each level by context, which is a short key."""
    ordered, index = torch.where(part < finest, pred, torch.inf).sort(dim=1, stable=True)
    context = part.to(torch.uint8 if finest < 256 else torch.int16).gather(1, index)
    medians = []
    for each in counts:
        places = _places(each, pred.shape[1])
        if each.shape[1] > 1:
            places = (context // (finest // each.shape[1])).sort(dim=1, stable=True).indices.gather(1, places)
        medians.append(ordered.gather(1, places))
    return medians


def _spread(per_context: Tensor, part: Tensor, level: int, finest: int) -> Tensor:
    """Each pixel's value (B,N) of numbers per context (B,level); invalid pixels get the last context's."""
    return per_context.gather(1, (part // (finest // level)).clamp(max=level - 1))


def _trimmed(pixel: Tensor, live: Tensor, trim_top: float) -> Tensor:
    counted = live.sum(1)
    num_kept = (counted * (1.0 - trim_top)).round().long().clamp(min=1)
    ranked = torch.where(live, pixel, torch.inf).sort(1).values
    return live & (pixel <= ranked.gather(1, (num_kept - 1)[:, None]))


class _Level:
    """One level's contexts of a batch: residuals at each pixel, and the values that their gradient needs."""

    def __init__(
        self,
        pred: Tensor,
        target: Tensor,
        part: Tensor,
        flat: Tensor,
        finest: int,
        counts: Tensor,
        label_median: Tensor,
        median: Tensor | None,
    ) -> None:
        """counts, and the medians of label and prediction: (B,level). median: None for only the label's statistics."""

        def mean(values: Tensor) -> Tensor:
            return self._sum(values) / self.counts.clamp(min=1)

        self.part, self.level, self.finest, self.label_only = part, counts.shape[1], finest, median is None
        self.counts = counts
        label = target - self.at(label_median)
        deviation = mean(label.abs())
        self.live = (self.counts >= MIN_PIXELS) & (deviation > flat[:, None])
        deviation = torch.where(self.live, deviation, 1.0)
        if median is None:
            self.centred, self.scale = pred - self.at(label_median), deviation
        else:
            self.centred = pred - self.at(median)
            self.scale = mean(self.centred.abs()).clamp(min=FLOOR)
        inside = self.at(self.live) & (part < finest)
        self.residual = torch.where(inside, self.centred / self.at(self.scale) - label / self.at(deviation), 0.0)
        self.inside = inside

    def _sum(self, values: Tensor) -> Tensor:
        fine = _per_part(values, self.part, self.finest)
        return fine.reshape(len(values), self.level, -1).sum(2)

    def at(self, per_context: Tensor) -> Tensor:
        return _spread(per_context, self.part, self.level, self.finest)

    def gradient(self, weight: Tensor) -> Tensor:
        """See `_per_image._add_gradient`."""
        e = torch.where(self.inside, weight * self.residual.sign(), 0.0)
        out = e / self.at(self.scale)
        if self.label_only:
            return out
        above = torch.where(self.inside, self.centred.sign(), 0.0)
        pull = self._sum(e * self.centred) / (self.scale.square() * self.counts.clamp(min=1))
        pull = torch.where(self.scale <= FLOOR, 0.0, pull)
        out = out - self.at(pull) * above
        at_median = torch.where(self.live, pull * self._sum(above) - self._sum(e) / self.scale, 0.0)
        # Of several pixels that equal the median, the first gets its gradient.
        context, median = self.part // (self.finest // self.level), self.centred == 0
        first = [(median & (context == k)).to(torch.uint8).argmax(1) for k in range(self.level)]
        return out.scatter_add(1, torch.stack(first, 1), at_median)


def batch_loss(
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    *,
    levels: tuple[int, ...],
    trim_top: float,
    label_only: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Losses (B,), gradient (B,N) and numbers of live contexts (B,); all inputs are (B,N)."""
    finest = max(levels)
    low = torch.where(valid, target, torch.inf).amin(1)
    high = torch.where(valid, target, -torch.inf).amax(1)
    flat = FLAT * torch.maximum(low.abs(), high.abs())
    not_flat = high - low > flat
    usable = valid & not_flat[:, None]
    pred, target = torch.where(usable, pred, 0.0), torch.where(usable, target, 0.0)
    low, high = torch.where(not_flat, low, 0.0), torch.where(not_flat, high, 1.0)
    part = ((target - low[:, None]) * (finest / (high - low))[:, None]).clamp(0, finest - 1).long()
    part = torch.where(usable, part, finest)
    fine = torch.stack([(part == k).sum(1) for k in range(finest)], 1)
    counts_of = [fine.reshape(len(fine), level, -1).sum(2) for level in levels]
    label_medians = _label_medians(target, part, counts_of, finest)
    medians = [None] * len(levels) if label_only else _medians(pred, part, counts_of, finest)
    levels_done = [
        _Level(pred, target, part, flat, finest, *each) for each in zip(counts_of, label_medians, medians, strict=True)
    ]
    shares = torch.stack([level.inside for level in levels_done]).sum(0)
    per_pixel = torch.where(shares > 0, 1.0 / shares.clamp(min=1), 0.0).to(pred.dtype)
    pixel = torch.stack([level.residual.abs() for level in levels_done]).sum(0) * per_pixel
    counts = (shares > 0).to(pred.dtype) if weight is None else torch.where(shares > 0, weight, 0.0)
    if trim_top > 0.0:
        counts = counts * _trimmed(pixel, shares > 0, trim_top)
    total = counts.sum(1, keepdim=True)
    counts = torch.where(total > 0, counts / torch.where(total > 0, total, 1.0), 0.0)
    gradient = None
    if want_gradient:
        gradient = torch.stack([level.gradient(counts * per_pixel) for level in levels_done]).sum(0)
    return (pixel * counts).sum(1), gradient, torch.cat([level.live for level in levels_done], 1).sum(1)
