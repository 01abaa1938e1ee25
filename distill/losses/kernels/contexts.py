"""The loss in contexts and its gradient: the numbers of `normalize._batched`, in three launches forward and one back.

After the statistics (select.py):

    residual  a piece's sums of the loss, of the pixels' weights, and of the terms for the gradient of a context's
              median and deviation; the first pixel at a context's median. The last program of an image to finish adds
              up the pieces: the loss, and three numbers per context for the gradient
    slope     the gradient, in the backward pass

With trim_top, `residual` runs twice: first it writes each pixel's loss, from which the statistics select the largest
one that is not trimmed. Shapes: B images, N pixels of each, C contexts.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.core.launch import Launcher, differentiable_once
from distill.losses.kernels.digits import added, columns, zeros
from distill.losses.kernels.keys import WIDTH, Cut, cut_of, in_context, label_of, spread, table, word
from distill.losses.kernels.select import CHUNK, CROWDED, ROWS, WHOLE, ContextStatistics, context_statistics, tile_of

NEVER = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _with_sign_of(sizes, values):
    """`sizes`, negative where `values` are, and 0 where they are 0 or not a number."""
    flipped = sizes.to(tl.int32, bitcast=True) ^ (values.to(tl.int32, bitcast=True) & -0x80000000)
    return tl.where(tl.abs(values) > 0.0, flipped.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _normal(row, LABEL_ONLY: tl.constexpr, CONTEXTS: tl.constexpr):
    """Tables of each context's median and 1 / scale, of label and prediction; 1 / scale of dead contexts is 0."""
    label_median, label_unit = table(row, CONTEXTS), table(row + 11 * CONTEXTS, CONTEXTS)
    median, unit = label_median, label_unit
    if not LABEL_ONLY:
        median, units = table(row + 2 * CONTEXTS, CONTEXTS), table(row + 12 * CONTEXTS, CONTEXTS)
        unit = ()
        for c in tl.static_range(CONTEXTS):
            unit = unit + (tl.where(label_unit[c] > 0.0, units[c], 0.0),)
    return label_median, label_unit, median, unit


@triton.jit
def _portions(
    label_unit, LEVELS: tl.constexpr, FIRSTS: tl.constexpr, NUMBER: tl.constexpr, FINEST: tl.constexpr
):  # fmt: skip
    """For each finest part 1 / the number of live contexts that contain it, or 0."""
    portions = ()
    for part in tl.static_range(FINEST):
        number = 0.0
        for i in tl.static_range(NUMBER):
            unit = label_unit[((FIRSTS >> (8 * i)) & 255) + part // (FINEST // ((LEVELS >> (8 * i)) & 255))]
            number += tl.where(unit > 0.0, 1.0, 0.0)
        portions = portions + (tl.where(number > 0.0, tl.div_rn(1.0, tl.maximum(number, 1.0)), 0.0),)  # type: ignore[assignment]
    return portions


@triton.jit
def _weights_of(
    inside, portion, weight, pixel_loss, highest, at, end, WEIGHTED: tl.constexpr, TRIMMED: tl.constexpr
):  # fmt: skip
    """Whether the pixels are in a live context, and their weights."""
    some = inside & (portion > 0.0)
    weights = tl.where(some, 1.0, 0.0)
    if WEIGHTED:
        weights = tl.where(some, tl.load(weight + at, mask=at < end, other=0.0), 0.0)
    if TRIMMED:
        # Not "<=": a NaN loss must not be trimmed.
        above = tl.load(pixel_loss + at, mask=at < end, other=0.0) > highest
        weights = tl.where(above, 0.0, weights)
    return some, weights


@triton.jit
def _residual_of(
    values, label, share, normal, LEVEL: tl.constexpr, FIRST: tl.constexpr, FINEST: tl.constexpr
):  # fmt: skip
    """At the pixels, for one level: the centred prediction, and the residual."""
    centred = values - spread(normal[2], share, LEVEL, FIRST, FINEST)
    label = label - spread(normal[0], share, LEVEL, FIRST, FINEST)
    label *= spread(normal[1], share, LEVEL, FIRST, FINEST)
    return centred, centred * spread(normal[3], share, LEVEL, FIRST, FINEST) - label


@triton.jit
def _earliest(
    firsts, at, share, inside,
    START: tl.constexpr, NUMBER: tl.constexpr, LEVEL: tl.constexpr, FINEST: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """As `added`, with the minimum instead of the sum."""
    out = ()
    for c in tl.static_range(NUMBER):
        each = firsts[c]
        if c >= START and c < START + LEVEL:
            mine = tl.where(in_context(share, inside, c - START, LEVEL, FINEST), at, NEVER)
            each = tl.minimum(each, tl.min(tl.reshape(mine, [mine.shape[0] // WIDTH, WIDTH]), 0))
        out = out + (each,)  # type: ignore[assignment]
    return out


@triton.jit(do_not_specialize=["pixels", "length", "pieces", "highest_stride"])
def _residual(
    pred, target, valid, weight, pixel_loss, alive, highest, statistics, sums, losses, live, dead, pixels, length,
    pieces, highest_stride,
    WEIGHTED: tl.constexpr, TRIM: tl.constexpr, LABEL_ONLY: tl.constexpr, FLOOR: tl.constexpr, LEVELS: tl.constexpr,
    FIRSTS: tl.constexpr, NUMBER: tl.constexpr, CONTEXTS: tl.constexpr, FINEST: tl.constexpr, PARTS: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr
):  # fmt: skip
    """TRIM: 0: no trimming; 1: write each pixel's loss and whether it is in a live context; 2: trim and sum."""
    piece, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, first = statistics + image * STRIDE, image * pixels
    header = row + ROWS * CONTEXTS
    low, per_unit, threshold = tl.load(header + 1), tl.load(header + 2), tl.load(highest + image * highest_stride)
    normal = _normal(row, LABEL_ONLY, CONTEXTS)
    portions = _portions(normal[1], LEVELS, FIRSTS, NUMBER, FINEST)
    total, weight_sum = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    sum_e, sum_pulled, firsts = zeros(CONTEXTS, WIDTH), zeros(CONTEXTS, WIDTH), ()
    for _ in tl.static_range(CONTEXTS):
        firsts = firsts + (tl.full([WIDTH], NEVER, tl.int32),)  # type: ignore[assignment]
    end = tl.minimum(pixels, (piece + 1) * length)
    limit = tl.minimum(word(header, 0), end)
    for start in range(piece * length, end if TRIM == 1 else limit, TILE):
        at = start + tl.arange(0, TILE)
        label, inside, share = label_of(target + first, valid + first, at, limit, low, per_unit, True)
        values = tl.load(pred + first + at, mask=at < end, other=0.0)
        portion = tl.zeros([TILE], tl.float32) + spread(portions, share, FINEST, 0, FINEST)
        some, weights = _weights_of(
            inside, portion, weight + first, pixel_loss + first, threshold, at, end, WEIGHTED, TRIM == 2
        )  # fmt: skip
        each, loss = weights * portion, tl.zeros([TILE], tl.float32)
        for i in tl.static_range(NUMBER):
            centred, residual = _residual_of(
                values, label, share, normal, (LEVELS >> (8 * i)) & 255, (FIRSTS >> (8 * i)) & 255, FINEST
            )  # fmt: skip
            loss += tl.abs(residual)
            if TRIM != 1:
                e = _with_sign_of(each, residual)
                sum_e = added(
                    sum_e, e, share, inside,
                    (FIRSTS >> (8 * i)) & 255, CONTEXTS, (LEVELS >> (8 * i)) & 255, FINEST, WIDTH
                )  # fmt: skip
                if not LABEL_ONLY:
                    sum_pulled = added(
                        sum_pulled, e * centred, share, inside,
                        (FIRSTS >> (8 * i)) & 255, CONTEXTS, (LEVELS >> (8 * i)) & 255, FINEST, WIDTH
                    )  # fmt: skip
                    firsts = _earliest(
                        firsts, tl.where(centred == 0.0, at, NEVER), share, inside,
                        (FIRSTS >> (8 * i)) & 255, CONTEXTS, (LEVELS >> (8 * i)) & 255, FINEST, WIDTH
                    )  # fmt: skip
        if TRIM == 1:
            tl.store(pixel_loss + first + at, tl.where(some, loss * portion, 0.0), mask=at < end)
            tl.store(alive + first + at, some.to(tl.uint8), mask=at < end)
        else:
            total += columns(tl.where(weights > 0.0, loss * each, 0.0), WIDTH)
            weight_sum += columns(weights, WIDTH)
    if TRIM != 1:
        _hand_over(
            sum_e, sum_pulled, firsts, tl.sum(total, 0), tl.sum(weight_sum, 0), row,
            sums + image * (3 * CONTEXTS + 2) * pieces, piece, pieces, losses + image, live + image, dead + image,
            LABEL_ONLY, FLOOR, CONTEXTS, LANES, ROWS, CHUNK
        )  # fmt: skip


@triton.jit
def _hand_over(
    sum_e, sum_pulled, firsts, total, weight_sum, row, sums, piece, pieces, losses, live, dead,
    LABEL_ONLY: tl.constexpr, FLOOR: tl.constexpr, CONTEXTS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr
):  # fmt: skip
    """Writes a piece's sums; the last program of the image to finish adds up those of all pieces."""
    out = sums + piece
    for c in tl.static_range(CONTEXTS):
        tl.store(out + c * pieces, tl.sum(sum_e[c], 0))
        if not LABEL_ONLY:
            tl.store(out + (CONTEXTS + c) * pieces, tl.sum(sum_pulled[c], 0))
            tl.store(out + (2 * CONTEXTS + c) * pieces, tl.min(firsts[c], 0).to(tl.float32, bitcast=True))
    tl.store(out + 3 * CONTEXTS * pieces, total)
    tl.store(out + (3 * CONTEXTS + 1) * pieces, weight_sum)
    tl.debug_barrier()
    counter = (row + ROWS * CONTEXTS + 8).to(tl.pointer_type(tl.int32), bitcast=True)
    if tl.atomic_add(counter, 1, sem="acq_rel") == pieces - 1:
        tl.debug_barrier()
        _close(row, sums, pieces, losses, live, dead, LABEL_ONLY, FLOOR, CONTEXTS, LANES, CHUNK)


@triton.jit
def _close(
    row, sums, pieces, losses, live, dead,
    LABEL_ONLY: tl.constexpr, FLOOR: tl.constexpr, CONTEXTS: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Writes an image's loss and numbers of contexts; for each context three rows, and its first median pixel."""
    of, lanes = tl.arange(0, LANES), tl.arange(0, CHUNK)
    there, some = of < CONTEXTS, lanes < pieces
    each, mask = sums + of[:, None] * pieces + lanes[None, :], there[:, None] & some[None, :]
    total = tl.sum(tl.load(sums + (3 * CONTEXTS + 1) * pieces + lanes, mask=some, other=0.0), 0)
    loss = tl.sum(tl.load(sums + 3 * CONTEXTS * pieces + lanes, mask=some, other=0.0), 0)
    counted = total > 0.0
    total = tl.where(counted, total, 1.0)
    row += of
    alive = tl.load(row + 4 * CONTEXTS, mask=there, other=0.0) > 0.0
    scale = tl.load(row + CONTEXTS, mask=there, other=1.0)
    if not LABEL_ONLY:
        e = tl.div_rn(tl.sum(tl.load(each, mask=mask, other=0.0), 1), total)
        pulled = tl.div_rn(tl.sum(tl.load(each + CONTEXTS * pieces, mask=mask, other=0.0), 1), total)
        scale = tl.load(row + 3 * CONTEXTS, mask=there, other=1.0)
        floored = scale <= FLOOR
        scale = tl.where(floored, FLOOR, scale)
        number = tl.maximum(tl.load(row + 6 * CONTEXTS, mask=there, other=1.0), 1.0)
        pull = tl.div_rn(pulled, scale * scale * number)
        pull = tl.where(alive, tl.where(floored, 0.0, pull), 0.0)
        balance = tl.load(row + 7 * CONTEXTS, mask=there, other=0.0)
        tl.store(row + 8 * CONTEXTS, pull, mask=there)
        tl.store(row + 9 * CONTEXTS, tl.where(alive, pull * balance - tl.div_rn(e, scale), 0.0), mask=there)
        bits = tl.load(each + 2 * CONTEXTS * pieces, mask=mask, other=0.0).to(tl.int32, bitcast=True)
        least = tl.min(tl.where(mask, bits, NEVER), 1)
        tl.store(row + 13 * CONTEXTS, least.to(tl.float32, bitcast=True), mask=there)
    unit = tl.where(counted, tl.div_rn(1.0, scale * total), 0.0)
    tl.store(row + 10 * CONTEXTS, tl.where(alive, unit, 0.0), mask=there)
    tl.store(losses, tl.where(counted, tl.div_rn(loss, total), 0.0))
    number = tl.sum(alive.to(tl.int32), 0)
    tl.store(live, number.to(tl.int64))
    tl.store(dead, (CONTEXTS - number).to(tl.int64))


@triton.jit(do_not_specialize=["pixels", "length", "highest_stride", "upstream_stride"])
def _slope(
    pred, target, valid, weight, pixel_loss, highest, statistics, upstream, slopes, pixels, length, highest_stride,
    upstream_stride, WEIGHTED: tl.constexpr, TRIMMED: tl.constexpr, LABEL_ONLY: tl.constexpr, LEVELS: tl.constexpr,
    FIRSTS: tl.constexpr, NUMBER: tl.constexpr, CONTEXTS: tl.constexpr, FINEST: tl.constexpr, PARTS: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The gradient of the sum of upstream times loss. For the formula see `normalize._per_image._add_gradient`."""
    piece, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, first = statistics + image * STRIDE, image * pixels
    header = row + ROWS * CONTEXTS
    low, per_unit, threshold = tl.load(header + 1), tl.load(header + 2), tl.load(highest + image * highest_stride)
    normal = _normal(row, LABEL_ONLY, CONTEXTS)
    portions = _portions(normal[1], LEVELS, FIRSTS, NUMBER, FINEST)
    units, pulls, factor = table(row + 10 * CONTEXTS, CONTEXTS), normal[0], tl.load(upstream + image * upstream_stride)
    if not LABEL_ONLY:
        pulls = table(row + 8 * CONTEXTS, CONTEXTS)
    end = tl.minimum(pixels, (piece + 1) * length)
    limit = tl.minimum(word(header, 0), end)
    for start in range(piece * length, end, TILE):
        at = start + tl.arange(0, TILE)
        label, inside, share = label_of(target + first, valid + first, at, limit, low, per_unit, True)
        values = tl.load(pred + first + at, mask=at < end, other=0.0)
        portion = tl.zeros([TILE], tl.float32) + spread(portions, share, FINEST, 0, FINEST)
        some, weights = _weights_of(
            inside, portion, weight + first, pixel_loss + first, threshold, at, end, WEIGHTED, TRIMMED
        )  # fmt: skip
        slope, weights = tl.zeros([TILE], tl.float32), weights * portion
        for i in tl.static_range(NUMBER):
            centred, residual = _residual_of(
                values, label, share, normal, (LEVELS >> (8 * i)) & 255, (FIRSTS >> (8 * i)) & 255, FINEST
            )  # fmt: skip
            unit = spread(units, share, (LEVELS >> (8 * i)) & 255, (FIRSTS >> (8 * i)) & 255, FINEST)
            slope += _with_sign_of(weights * unit, residual)
            if not LABEL_ONLY:
                pull = spread(pulls, share, (LEVELS >> (8 * i)) & 255, (FIRSTS >> (8 * i)) & 255, FINEST)
                slope -= _with_sign_of(pull + tl.zeros_like(centred), centred)
        tl.store(slopes + first + at, tl.where(some, slope * factor, 0.0), mask=at < end)
    if not LABEL_ONLY:
        for c in tl.static_range(CONTEXTS):
            median = word(row, 13 * CONTEXTS + c)
            if (median >= piece * length) & (median < end):
                tl.debug_barrier()
                slope = tl.load(slopes + first + median) + tl.load(row + 9 * CONTEXTS + c) * factor
                tl.debug_barrier()
                tl.store(slopes + first + median, slope)


@functools.lru_cache(maxsize=64)
def _kernels(
    cut: Cut, weighted: bool, label_only: bool, floor: float, trimmed: bool, stride: int
) -> dict[str, Launcher]:
    """The kernels by name, in launch order. stride: numbers per image in the statistics."""
    visit = {
        "WEIGHTED": weighted, "LABEL_ONLY": label_only, "LANES": triton.next_power_of_2(cut.contexts), "ROWS": ROWS,
        "STRIDE": stride, "TILE": tile_of(cut), **cut.constants, **CROWDED,
    }  # fmt: skip
    residual = visit | {"FLOOR": floor, "WIDTH": WIDTH, "CHUNK": CHUNK}
    return {
        "each pixel": Launcher(_residual, residual | {"TRIM": 1}),
        "residual": Launcher(_residual, residual | {"TRIM": 2 if trimmed else 0}),
        "slope": Launcher(_slope, visit | {"TRIMMED": trimmed}),
    }


class _ContextLoss(torch.autograd.Function):
    """Per-image loss of `statistics`; differentiable once, in `pred`."""

    @staticmethod
    def forward(ctx, pred, target, valid, weight, found, kernels, trim_top):
        statistics, pieces, length = found
        images, rows, contexts = statistics.shape
        pixels, stride = pred.numel() // images, rows * contexts
        inputs, grid = (pred, target, valid, target if weight is None else weight), (pieces, images, 1)
        sums, losses = pred.new_empty((images, 3 * contexts + 2, pieces)), pred.new_empty((images,))
        live, dead = (pred.new_empty((images,), dtype=torch.int64) for _ in range(2))
        pixel_loss, alive, highest = pred, valid, statistics
        outputs = (statistics, sums, losses, live, dead)
        if trim_top > 0.0:
            pixel_loss, alive = torch.empty_like(pred), torch.empty_like(valid)
            sizes = (pixels, length, pieces, stride)
            kernels["each pixel"](grid, (*inputs, pixel_loss, alive, highest, *outputs), sizes)
            highest = context_statistics(pixel_loss, None, alive, WHOLE, label=False, keep=1.0 - trim_top).statistics
            stride = highest.stride(0)
        tensors = (*inputs, pixel_loss, alive, highest, *outputs)
        kernels["residual"](grid, tensors, (pixels, length, pieces, stride))
        ctx.save_for_backward(*inputs, pixel_loss, highest, statistics)
        ctx.slope, ctx.grid, ctx.sizes = kernels["slope"], grid, (pixels, length, stride)
        ctx.mark_non_differentiable(live, dead)
        ctx.set_materialize_grads(False)
        return losses, live, dead

    @staticmethod
    @differentiable_once
    def backward(ctx, upstream, _live, _dead):
        saved = ctx.saved_tensors
        slopes = torch.empty_like(saved[0])
        ctx.slope(ctx.grid, (*saved, upstream, slopes), (*ctx.sizes, upstream.stride(0)))
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
) -> tuple[Tensor, Tensor, Tensor, ContextStatistics]:
    """Losses (B,), numbers of live and of dead contexts (B,), and their statistics.

    pred, target: (B,...) float32. valid: (B,...) uint8. weight: (B,...) float32 or None. All contiguous and on one
    device. flat, floor, min_pixels: the constants of `normalize._per_image`.
    """
    cut = cut_of(levels)
    stats = context_statistics(
        target, None if label_only else pred, valid, cut, flat=flat, floor=floor, min_pixels=min_pixels
    )
    kernels = _kernels(cut, weight is not None, label_only, floor, trim_top > 0.0, stats.statistics.stride(0))
    losses, live, dead = _ContextLoss.apply(pred, target, valid, weight, stats, kernels, trim_top)
    return losses, live, dead, stats
