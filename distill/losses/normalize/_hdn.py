"""The hierarchical depth normalization loss exactly as in HDN's released code (icoz69/HDN, demo.py), by autograd.

It is here for comparisons with that code; `_contexts` corrects its oddities. What differs from ours:

- contexts are half open, [low, high): the pixels with the largest label belong to none. A constant label other than
  zero has no contexts at all; a constant zero has all its pixels in all of them.
- the scale is sum|d - median| / (n + 1) + 1e-6. Contexts of any size and constant contexts count.
- the mean is over the batch: the sum over all pixels divided by the number of valid pixels, including those in no
  context.
- contexts are of the range ("dr"), of equal shares of the pixels ("dp", between linearly interpolated quantiles), or
  squares of the image ("ds", square maps only).

The same as ours: the lower median, whose gradient goes to one pixel, and the mean over a pixel's contexts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distill.losses.normalize import single_or_double

_EPS = 1e-6
# In float32 it changes no bound but zero: this is why the maximum belongs to no context, and why a zero label does.
_TINY = 1e-30


def _bounds(target: Tensor, valid: Tensor, level: int, percentile: bool) -> Tensor:
    """Lower and upper ends of the (2,level) contexts of one image's label (H,W)."""
    inside = target[valid]
    if percentile:
        ends = torch.quantile(inside, torch.linspace(0.0, 1.0, level + 1, dtype=inside.dtype, device=inside.device))
        return torch.stack([ends[:-1], ends[1:]])
    low, high = torch.aminmax(inside)
    ends = torch.stack([low + (high - low) * (k / level) for k in range(level + 1)])
    return torch.stack([ends[:-1], ends[1:] + _TINY])


def _members(target: Tensor, valid: Tensor, levels: tuple[int, ...], contexts: str) -> Iterator[Tensor]:
    """The pixels (H,W) of each context of one image, the finest level first."""
    width = target.shape[-1]
    if not levels:
        yield valid
    for level in sorted(levels, reverse=True):
        if contexts == "ds":
            ends = [int(width * (k / level)) for k in range(level + 1)]
            for top, bottom in zip(ends[:-1], ends[1:], strict=True):
                for left, right in zip(ends[:-1], ends[1:], strict=True):
                    window = torch.zeros_like(valid)
                    window[top:bottom, left:right] = True
                    yield valid & window
        elif valid.any():
            for low, high in _bounds(target, valid, level, contexts == "dp").T:
                yield valid & (target >= low) & (target < high)


def _normalized(values: Tensor) -> Tensor:
    centred = values - values.median()
    return centred / (centred.abs().sum() / (len(values) + 1) + _EPS)


def _pixel_losses(pred: Tensor, target: Tensor, valid: Tensor, levels: tuple[int, ...], contexts: str) -> Tensor:
    """Each pixel's mean over its contexts, (H,W), zero where it has none."""
    # A zero that depends on `pred`: an image without contexts has a gradient, which is zero.
    total, count = torch.where(valid, pred, 0.0) * 0.0, torch.zeros_like(pred)
    for member in _members(target, valid, levels, contexts):
        if member.any():
            residual = (_normalized(pred[member]) - _normalized(target[member])).abs()
            total = total.masked_scatter(member, total[member] + residual)
            count += member
    return total / count.clamp(min=1)


def hdn(pred: Tensor, target: Tensor, valid: Tensor, levels: tuple[int, ...], *, contexts: str) -> Tensor:
    """Losses (B,) whose mean is the released code's value for the batch; 0 where it has no valid pixel (there: NaN).

    pred, target, valid: (B,H,W). levels: into how many parts the range, the pixels, or each side is cut: (1, 2, 4) is
    the code's level 3; () is its SSIMAE, with all valid pixels in one context. contexts: "dr", "dp" or "ds".
    Raises ValueError for another name, and for "ds" with maps that are not square.
    """
    if contexts not in ("dr", "dp", "ds"):
        raise ValueError(f'contexts must be "dr", "dp" or "ds", not {contexts!r}')
    if levels and contexts == "ds" and pred.shape[-1] != pred.shape[-2]:
        raise ValueError(f"ds contexts need square maps, not {pred.shape[-2]} x {pred.shape[-1]}")
    pred = single_or_double(pred)
    target = target.detach().to(pred.dtype)
    valid = valid & torch.isfinite(target)
    sums = [_pixel_losses(p, t, v, levels, contexts).sum() for p, t, v in zip(pred, target, valid, strict=True)]
    return (torch.stack(sums) if sums else pred.new_zeros(0)) * (len(pred) / valid.sum().clamp(min=1).to(pred.dtype))
