"""Normalization within contexts of the label's depth range: what `global`, `hybrid` and `local` share.

The label's range is cut into S equal parts for each S in `levels`; the pixels whose label lies in one part are a
context. In each context u, student and label are both centred on their median and divided by their mean
absolute deviation over the context's pixels; a pixel's loss is the mean of |N_u(student) - N_u(label)| over the
contexts it is in (Distill-Any-Depth, Sec. 3.1, equations for N_glo and L_Dis; contexts as in HDN, depth-range variant).

How it is made fast: pixels are brought into the order of the finest parts once, after which every context is one
contiguous slice; medians are quickselects on slices; loss and gradient are written down together in closed form, image
by image, so that nothing but the gradient itself is kept for the backward pass.

Choices where the paper is silent (ours): the maximum belongs to the last part; a context with fewer than MIN_PIXELS
pixels, or whose label is constant, is dead: it is left out and counted; the lower median, as torch.median has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.normalize import Comparison

MIN_PIXELS = 5
# A mean deviation below this fraction of the label's magnitude is rounding, not shape.
FLAT = 1e-6
# The student's scale is never divided below this: a constant prediction gives a finite loss and a finite gradient.
FLOOR = 1e-6


@dataclass(frozen=True, slots=True)
class _Context:
    """A slice [start, stop) of the ordered pixels, with the label's statistics over it."""

    start: int
    stop: int
    median: Tensor
    deviation: Tensor


def _ordered(target: Tensor, finest: int) -> tuple[Tensor, list[int]]:
    """The order that groups pixels by the `finest` equal parts of the range, and the parts' boundaries in it."""
    if finest == 1:
        return torch.arange(len(target), device=target.device), [0, len(target)]
    low, high = torch.aminmax(target)
    part = ((target - low) * (finest / (high - low))).to(torch.uint8).clamp_(max=finest - 1)
    members = [(part == k).nonzero().squeeze(1) for k in range(finest)]
    bounds = [0]
    for m in members:
        bounds.append(bounds[-1] + len(m))
    return torch.cat(members), bounds


def _live_contexts(
    target: Tensor, bounds: list[int], levels: tuple[int, ...], flat: Tensor
) -> tuple[list[_Context], list[int]]:
    """The contexts that carry information, and for each finest part how many of them contain it."""
    finest = len(bounds) - 1
    contexts, shares = [], [0] * finest
    for level in levels:
        width = finest // level
        for k in range(level):
            start, stop = bounds[k * width], bounds[(k + 1) * width]
            if stop - start < MIN_PIXELS:
                continue
            part = target[start:stop]
            median = part.median()
            deviation = (part - median).abs_().mean()
            if not bool(deviation > flat):
                continue
            contexts.append(_Context(start, stop, median, deviation))
            for j in range(k * width, (k + 1) * width):
                shares[j] += 1
    return contexts, shares


def _context_residual(pred: Tensor, target: Tensor, c: _Context, label_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    """N(student) - N(label) over one context, and the student's median and scale used for it."""
    p, t = pred[c.start : c.stop], target[c.start : c.stop]
    if label_only:
        median, scale = c.median, c.deviation
    else:
        median = p.median()
        scale = (p - median).abs_().mean().clamp(min=FLOOR)
    residual = ((p - median) / scale).sub_((t - c.median).div_(c.deviation))
    return residual, median, scale


def _pixel_losses(pred: Tensor, target: Tensor, contexts: list[_Context], label_only: bool) -> Tensor:
    total = torch.zeros_like(pred)
    for c in contexts:
        total[c.start : c.stop] += _context_residual(pred, target, c, label_only)[0].abs_()
    return total


def _add_gradient(
    gradient: Tensor, pred: Tensor, residual: Tensor, weight: Tensor, median: Tensor, scale: Tensor, c: _Context
) -> None:
    """Adds d/dpred of sum(weight * |residual|) where residual = (pred - median(pred)) / scale(pred) - label.

    With e = weight * sign(residual), n = (pred - median) / scale and a floor that is not active:
        d/dpred_i = e_i / scale - sum(e * n) / scale * d scale / dpred_i - [i is the median] * sum(e) / scale
        d scale / dpred_i = (sign(pred_i - median) - [i is the median] * sum(sign)) / count
    """
    p = pred[c.start : c.stop]
    e = weight * residual.sign()
    centred = p - median
    above = centred.sign()
    out = gradient[c.start : c.stop]
    at_median = (centred == 0).to(torch.uint8).argmax()
    floored = bool(scale <= FLOOR)
    pull = torch.zeros_like(scale) if floored else (e * centred).sum() / (scale * scale * len(p))
    out += e / scale
    out -= pull * above
    out[at_median] += pull * above.sum() - e.sum() / scale


def _image(
    pred: Tensor, target: Tensor, levels: tuple[int, ...], trim_top: float, label_only: bool, want_gradient: bool
) -> tuple[Tensor, Tensor | None, int]:
    """Loss, gradient and number of live contexts of one image's valid pixels, (M,) each."""
    zero = pred.new_zeros(())
    if len(target) == 0:
        return zero, None, 0
    low, high = torch.aminmax(target)
    flat = FLAT * torch.maximum(low.abs(), high.abs())
    if not bool(high - low > flat):
        return zero, None, 0
    order, bounds = _ordered(target, max(levels))
    p, t = pred[order], target[order]
    contexts, shares = _live_contexts(t, bounds, levels, flat)
    parts = list(zip(bounds[:-1], bounds[1:], shares, strict=True))
    weight = torch.cat([p.new_full((stop - start,), 1.0 / max(n, 1)) for start, stop, n in parts])
    counted = sum(stop - start for start, stop, n in parts if n)
    if not counted:
        return zero, None, 0
    if trim_top > 0.0:
        pixel = _pixel_losses(p, t, contexts, label_only).mul_(weight)
        kept = max(1, round(counted * (1.0 - trim_top)))
        # Pixels in no context hold zero and sort first; they are not part of the count.
        threshold = pixel.kthvalue(len(pixel) - counted + kept).values
        inside = pixel <= threshold
        for start, stop, n in parts:
            if not n:
                inside[start:stop] = False
        weight, counted = weight * inside, int(inside.sum())
    weight /= counted
    loss = zero
    gradient = torch.zeros_like(p) if want_gradient else None
    for c in contexts:
        residual, median, scale = _context_residual(p, t, c, label_only)
        w = weight[c.start : c.stop]
        loss = loss + (residual.abs() * w).sum()
        if gradient is not None and label_only:
            gradient[c.start : c.stop] += w * residual.sign() / scale
        elif gradient is not None:
            _add_gradient(gradient, p, residual, w, median, scale, c)
    if gradient is not None:
        gradient = torch.empty_like(gradient).index_copy_(0, order, gradient)
    return loss, gradient, len(contexts)


class _ContextLoss(torch.autograd.Function):
    """Per-image loss whose gradient is computed in the forward pass; differentiable once, in `pred`."""

    @staticmethod
    def forward(ctx, pred, target, valid, levels, trim_top, label_only):  # type: ignore[no-untyped-def]  # noqa: ANN001
        losses, live = [], []
        gradient = torch.zeros_like(pred) if pred.requires_grad else None
        for b in range(len(pred)):
            loss, part, contexts = _image(
                pred[b][valid[b]], target[b][valid[b]], levels, trim_top, label_only, gradient is not None
            )
            losses.append(loss)
            live.append(contexts)
            if gradient is not None and part is not None:
                gradient[b][valid[b]] = part
        if gradient is not None:
            ctx.save_for_backward(gradient)
        counts = torch.tensor(live, device=pred.device)
        ctx.mark_non_differentiable(counts)
        return torch.stack(losses), counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _counts):  # type: ignore[no-untyped-def]  # noqa: ANN001
        (gradient,) = ctx.saved_tensors
        return upstream[:, None, None] * gradient, None, None, None, None, None


def compare_in_contexts(
    pred: Tensor, target: Tensor, valid: Tensor, levels: tuple[int, ...], *, trim_top: float, label_only: bool
) -> Comparison:
    """The comparison for the given `levels`, each a divisor of the largest. Half precision is raised to float32."""
    work = pred.dtype if pred.dtype in (torch.float32, torch.float64) else torch.float32
    usable = valid & torch.isfinite(target)
    loss, live = _ContextLoss.apply(pred.to(work), target.detach().to(work), usable, levels, trim_top, label_only)
    return Comparison(loss, live, sum(levels) - live)
