"""The loss in contexts and its gradient: the numbers of `normalize._batched`, in nine launches forward and one back.

After the statistics (select.py):

    residual  a block's sums of the loss, of the pixels' weights, and of what the gradient of a context's median and
              deviation needs; the first pixel that is a context's median
    close     their sums over the blocks: the loss, and three numbers of each context for the gradient
    slope     the gradient, in the backward pass

With trim_top, `residual` runs twice: first it writes each pixel's loss, of which the statistics find the largest that
is kept. Shapes: B images, N pixels of each, C contexts.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.losses.kernels.keys import HEADER, Cut, cut_of, fold_least, fold_sum, header_of, label_of, spread
from distill.losses.kernels.launch import Launcher
from distill.losses.kernels.select import BLOCK, CHUNK, CROWDED, HOW, ROWS, WHOLE, Found, find


@triton.jit
def _level(
    pred, label, inside, part, row,
    LABEL_ONLY: tl.constexpr, FLOOR: tl.constexpr, CONTEXTS: tl.constexpr,
    LEVEL: tl.constexpr, FIRST: tl.constexpr, FINEST: tl.constexpr
):  # fmt: skip
    """At the pixels: whether the context of this level is live, the prediction centred, its scale, and the residual."""
    live = inside & (spread(row + 4 * CONTEXTS, part, LEVEL, FIRST, FINEST) > 0.0)
    label_median = spread(row, part, LEVEL, FIRST, FINEST)
    label_scale = spread(row + CONTEXTS, part, LEVEL, FIRST, FINEST)
    if LABEL_ONLY:
        centred, scale = pred - label_median, label_scale
    else:
        centred = pred - spread(row + 2 * CONTEXTS, part, LEVEL, FIRST, FINEST)
        scale = spread(row + 3 * CONTEXTS, part, LEVEL, FIRST, FINEST)
        scale = tl.where(scale < FLOOR, FLOOR, scale)
    residual = tl.div_rn(centred, scale) - tl.div_rn(label - label_median, label_scale)
    return live, centred, scale, tl.where(live, residual, 0.0)


@triton.jit
def _sign(values):
    return (values > 0.0).to(tl.float32) - (values < 0.0).to(tl.float32)


@triton.jit
def _counted(
    inside, part, row, weight, pixel_loss, threshold, at, pixels,
    WEIGHTED: tl.constexpr, TRIMMED: tl.constexpr, LEVELS: tl.constexpr, FIRSTS: tl.constexpr, NUMBER: tl.constexpr,
    CONTEXTS: tl.constexpr, FINEST: tl.constexpr
):  # fmt: skip
    """At the pixels: whether they are in a live context, how much they count, and that over how many they are in."""
    live = tl.zeros(part.shape, tl.float32)
    for i in tl.static_range(NUMBER):
        live += spread(row + 4 * CONTEXTS, part, (LEVELS >> (8 * i)) & 255, (FIRSTS >> (8 * i)) & 255, FINEST)
    some = inside & (live > 0.0)
    weights = some.to(tl.float32)
    if WEIGHTED:
        weights = tl.where(some, tl.load(weight + at, mask=at < pixels, other=0.0), 0.0)
    if TRIMMED:
        # Not "<=": a loss that is not a number must not be trimmed away.
        above = tl.load(pixel_loss + at, mask=at < pixels, other=0.0) > tl.load(threshold)
        weights = tl.where(above, 0.0, weights)
    return some, weights, tl.div_rn(1.0, tl.maximum(live, 1.0))


@triton.jit
def _sum_slopes(
    e, centred, live, part, at, sums, firsts, blocks,
    CONTEXTS: tl.constexpr, LEVEL: tl.constexpr, FIRST: tl.constexpr, FINEST: tl.constexpr
):  # fmt: skip
    """A block's sums of e and of e times the centred prediction, and its first pixel at the median, of each context."""
    pulled = tl.where(live, e * centred, 0.0)
    median = tl.where(live & (centred == 0.0), at, 0x7FFFFFFF)
    for k in tl.static_range(LEVEL):
        own = part // (FINEST // LEVEL) == k
        tl.store(sums + (FIRST + k) * blocks, tl.sum(tl.where(own, e, 0.0), 0))
        tl.store(sums + (CONTEXTS + FIRST + k) * blocks, tl.sum(tl.where(own, pulled, 0.0), 0))
        tl.store(firsts + (FIRST + k) * blocks, tl.min(tl.where(own, median, 0x7FFFFFFF), 0))


@triton.jit(do_not_specialize=["blocks"])
def _residual(
    pred, target, valid, weight, pixel_loss, alive, threshold, headers, statistics, sums, firsts, pixels, blocks,
    WEIGHTED: tl.constexpr, TRIM: tl.constexpr, LABEL_ONLY: tl.constexpr, FLOOR: tl.constexpr, LEVELS: tl.constexpr,
    FIRSTS: tl.constexpr, NUMBER: tl.constexpr, CONTEXTS: tl.constexpr, FINEST: tl.constexpr, PARTS: tl.constexpr,
    HEADER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """TRIM: 0 for no trimming, 1 to write each pixel's loss and whether it has one, 2 to trim and to sum."""
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    limit, low, per_unit = header_of(headers + image * HEADER)
    at, start = block * BLOCK + tl.arange(0, BLOCK), image * pixels
    label, inside, part = label_of(target + start, valid + start, at, pixels, limit, low, per_unit, FINEST, True)
    values = tl.load(pred + start + at, mask=at < pixels, other=0.0)
    row = statistics + image * ROWS * CONTEXTS
    some, weights, share = _counted(
        inside, part, row, weight + start, pixel_loss + start, threshold + image * ROWS, at, pixels,
        WEIGHTED, TRIM == 2, LEVELS, FIRSTS, NUMBER, CONTEXTS, FINEST
    )  # fmt: skip
    own, own_firsts = sums + image * (2 * CONTEXTS + 2) * blocks + block, firsts + image * CONTEXTS * blocks + block
    loss = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(NUMBER):
        live, centred, _, residual = _level(
            values, label, inside, part, row, LABEL_ONLY, FLOOR, CONTEXTS,
            (LEVELS >> (8 * i)) & 255, (FIRSTS >> (8 * i)) & 255, FINEST
        )  # fmt: skip
        loss += tl.abs(residual)
        if TRIM != 1:
            _sum_slopes(
                weights * share * _sign(residual), centred, live, part, at, own, own_firsts, blocks,
                CONTEXTS, (LEVELS >> (8 * i)) & 255, (FIRSTS >> (8 * i)) & 255, FINEST
            )  # fmt: skip
    loss *= share
    if TRIM == 1:
        tl.store(pixel_loss + start + at, tl.where(some, loss, 0.0), mask=at < pixels)
        tl.store(alive + start + at, some.to(tl.uint8), mask=at < pixels)
    else:
        tl.store(own + 2 * CONTEXTS * blocks, tl.sum(tl.where(weights > 0.0, loss * weights, 0.0), 0))
        tl.store(own + (2 * CONTEXTS + 1) * blocks, tl.sum(weights, 0))


@triton.jit(do_not_specialize=["blocks"])
def _close(
    statistics, sums, firsts, losses, lives, medians, blocks,
    LABEL_ONLY: tl.constexpr, FLOOR: tl.constexpr, CONTEXTS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """An image's loss and number of live contexts; of a context the last three rows and its first median pixel."""
    context, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = statistics + image * ROWS * CONTEXTS + context
    own = sums + image * (2 * CONTEXTS + 2) * blocks
    total = fold_sum(own + (2 * CONTEXTS + 1) * blocks, blocks, CHUNK)
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    live = tl.load(row + 4 * CONTEXTS) > 0.0
    scale = tl.load(row + CONTEXTS)
    pull, at_median = 0.0, 0.0
    e = tl.div_rn(fold_sum(own + context * blocks, blocks, CHUNK), total)
    if not LABEL_ONLY:
        scale = tl.load(row + 3 * CONTEXTS)
        floored = scale <= FLOOR
        scale = tl.where(floored, FLOOR, scale)
        pulled = tl.div_rn(fold_sum(own + (CONTEXTS + context) * blocks, blocks, CHUNK), total)
        pull = tl.div_rn(pulled, scale * scale * tl.maximum(tl.load(row + 6 * CONTEXTS), 1.0))
        pull = tl.where(floored | (live == 0), 0.0, pull)
        at_median = tl.where(live, pull * tl.load(row + 7 * CONTEXTS) - tl.div_rn(e, scale), 0.0)
    tl.store(row + 8 * CONTEXTS, pull)
    tl.store(row + 9 * CONTEXTS, at_median)
    tl.store(row + 10 * CONTEXTS, tl.where(some & live, tl.div_rn(1.0, scale * total), 0.0))
    first = fold_least(firsts + (image * CONTEXTS + context) * blocks, blocks, CHUNK)
    tl.store(medians + image * CONTEXTS + context, first)
    if context == 0:
        loss = fold_sum(own + 2 * CONTEXTS * blocks, blocks, CHUNK)
        tl.store(losses + image, tl.where(some, tl.div_rn(loss, total), 0.0))
        number = tl.load(row + 4 * CONTEXTS)
        for c in tl.static_range(1, CONTEXTS):
            number += tl.load(row + 4 * CONTEXTS + c)
        tl.store(lives + image, number.to(tl.int64))


@triton.jit
def _slope(
    pred, target, valid, weight, pixel_loss, threshold, headers, statistics, medians, upstream, slopes, pixels,
    WEIGHTED: tl.constexpr, TRIMMED: tl.constexpr, LABEL_ONLY: tl.constexpr, FLOOR: tl.constexpr, LEVELS: tl.constexpr,
    FIRSTS: tl.constexpr, NUMBER: tl.constexpr, CONTEXTS: tl.constexpr, FINEST: tl.constexpr, PARTS: tl.constexpr,
    HEADER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradient of the sum of upstream times loss. For the formula see `normalize._per_image._add_gradient`."""
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    limit, low, per_unit = header_of(headers + image * HEADER)
    at, start = block * BLOCK + tl.arange(0, BLOCK), image * pixels
    label, inside, part = label_of(target + start, valid + start, at, pixels, limit, low, per_unit, FINEST, True)
    values = tl.load(pred + start + at, mask=at < pixels, other=0.0)
    row = statistics + image * ROWS * CONTEXTS
    some, weights, share = _counted(
        inside, part, row, weight + start, pixel_loss + start, threshold + image * ROWS, at, pixels,
        WEIGHTED, TRIMMED, LEVELS, FIRSTS, NUMBER, CONTEXTS, FINEST
    )  # fmt: skip
    slope = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(NUMBER):
        slope += _level_slope(
            values, label, weights * share, inside, part, at, row, medians + image * CONTEXTS, LABEL_ONLY, FLOOR,
            CONTEXTS, (LEVELS >> (8 * i)) & 255, (FIRSTS >> (8 * i)) & 255, FINEST
        )  # fmt: skip
    slope = tl.where(some, slope * tl.load(upstream + image), 0.0)
    tl.store(slopes + start + at, slope, mask=at < pixels)


@triton.jit
def _level_slope(
    values, label, weights, inside, part, at, row, medians, LABEL_ONLY: tl.constexpr, FLOOR: tl.constexpr,
    CONTEXTS: tl.constexpr, LEVEL: tl.constexpr, FIRST: tl.constexpr, FINEST: tl.constexpr
):  # fmt: skip
    live, centred, _, residual = _level(
        values, label, inside, part, row, LABEL_ONLY, FLOOR, CONTEXTS, LEVEL, FIRST, FINEST
    )  # fmt: skip
    slope = weights * _sign(residual) * spread(row + 10 * CONTEXTS, part, LEVEL, FIRST, FINEST)
    if not LABEL_ONLY:
        slope -= spread(row + 8 * CONTEXTS, part, LEVEL, FIRST, FINEST) * _sign(centred)
        median = spread(medians, part, LEVEL, FIRST, FINEST)
        slope += tl.where(at == median, spread(row + 9 * CONTEXTS, part, LEVEL, FIRST, FINEST), 0.0)
    return tl.where(live, slope, 0.0)


@functools.lru_cache(maxsize=64)
def _kernels(cut: Cut, weighted: bool, label_only: bool, floor: float, trimmed: bool) -> dict[str, Launcher]:
    """By name, in the order of their launches."""
    options = {"LABEL_ONLY": label_only, "FLOOR": floor, "ROWS": ROWS}
    visit = {"WEIGHTED": weighted, "HEADER": HEADER, "BLOCK": BLOCK, **options, **cut.constants, **CROWDED}
    return {
        "each pixel": Launcher(_residual, visit | {"TRIM": 1}),
        "residual": Launcher(_residual, visit | {"TRIM": 2 if trimmed else 0}),
        "close": Launcher(_close, options | {"CONTEXTS": cut.contexts, "CHUNK": CHUNK, **HOW}),
        "slope": Launcher(_slope, visit | {"TRIMMED": trimmed}),
    }


class _ContextLoss(torch.autograd.Function):
    """Per-image loss of `statistics`; differentiable once, in `pred`."""

    @staticmethod
    def forward(ctx, pred, target, valid, weight, found, kernels, trim_top):
        (images, pixels), blocks, contexts = pred.shape, found.blocks, found.statistics.shape[-1]
        given, grid = (pred, target, valid, target if weight is None else weight), (blocks, images)
        sums = pred.new_empty(images, 2 * contexts + 2, blocks)
        firsts = torch.empty(images, contexts, blocks, dtype=torch.int32, device=pred.device)
        pixel_loss, threshold = pred, found.statistics
        if trim_top > 0.0:
            pixel_loss, alive = torch.empty_like(pred), torch.empty_like(valid)
            rest = (alive, threshold, found.headers, found.statistics, sums, firsts, pixels, blocks)
            kernels["each pixel"](grid, *given, pixel_loss, *rest)
            threshold = find(pixel_loss, None, alive, WHOLE, label=False, keep=1.0 - trim_top).statistics
        rest = (valid, threshold, found.headers, found.statistics, sums, firsts, pixels, blocks)
        kernels["residual"](grid, *given, pixel_loss, *rest)
        losses, live = pred.new_empty(images), torch.empty(images, dtype=torch.int64, device=pred.device)
        medians = torch.empty(images, contexts, dtype=torch.int32, device=pred.device)
        kernels["close"]((contexts, images), found.statistics, sums, firsts, losses, live, medians, blocks)
        ctx.save_for_backward(*given, pixel_loss, threshold, found.headers, found.statistics, medians)
        ctx.slope, ctx.grid = kernels["slope"], grid
        ctx.mark_non_differentiable(live)
        return losses, live

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _live):
        pred, *rest = ctx.saved_tensors
        slopes = torch.empty_like(pred)
        ctx.slope(ctx.grid, pred, *rest, upstream.contiguous(), slopes, pred.shape[1])
        return slopes, None, None, None, None, None, None


def context_loss(
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    levels: tuple[int, ...],
    *,
    trim_top: float,
    label_only: bool,
    flat: float,
    floor: float,
    min_pixels: int,
) -> tuple[Tensor, Tensor, Found]:
    """Losses (B,), numbers of live contexts (B,), and the statistics behind them.

    pred, target: (B,N) float32. valid: (B,N) uint8. weight: (B,N) float32 or None. All contiguous and on one device.
    flat, floor, min_pixels: `normalize._per_image`'s.
    """
    cut = cut_of(levels)
    seen = None if label_only else pred.detach()
    found = find(target, seen, valid, cut, flat=flat, min_pixels=min_pixels)
    kernels = _kernels(cut, weight is not None, label_only, floor, trim_top > 0.0)
    losses, live = _ContextLoss.apply(pred, target, valid, weight, found, kernels, trim_top)
    return losses, live, found
