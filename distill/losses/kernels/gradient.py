"""The multi-scale gradient loss and its gradient: `losses.gradient_loss` in two launches and one back.

After the statistics of the whole image (select.py), unless the loss in contexts has computed them already:

    differences  the normalized maps' difference at each pixel, and the number of pixels of each scale
    edges        each pixel's part of the loss and of the gradient, from its neighbours at all scales. The last program
                 of an image to finish adds up all: the loss, and two numbers for the gradient
    slopes       the gradient in the prediction, in the backward pass

The first two work on rectangles whose corners are on every scale, so that the pixels of a scale are a rectangle too.
The gradients of a pair of neighbours cancel in the sum, so that the median has a gradient through the deviation
only. Shapes: B images, H rows, W columns, N = H W pixels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.core.launch import Grid, Launcher, differentiable_once
from distill.losses.kernels.keys import fold_least, fold_sum
from distill.losses.kernels.select import CHUNK, HOW, WHOLE, ContextStatistics, context_statistics

BLOCK = 2048
# Rows and columns of a rectangle, unless a scale is coarser, and rows per iteration. Each scale costs a program sums
# over its threads, however few pixels the scale has.
TALL, WIDE, LINES = 64, 128, 16
ABSENT = float(torch.finfo(torch.float32).max)
NEVER = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _scales_of(statistics, stride, FLOOR: tl.constexpr, NORMALIZE: tl.constexpr):
    """Median and 1 / deviation of prediction and of label, and whether the label is not flat."""
    label_median, label_unit, median, unit, shaped = 0.0, 1.0, 0.0, 1.0, 1.0
    if NORMALIZE:
        shaped = tl.load(statistics + 5 * stride)
        label_median, median = tl.load(statistics), tl.load(statistics + 2 * stride)
        label_unit = tl.div_rn(1.0, tl.where(shaped > 0.0, tl.load(statistics + stride), 1.0))
        scale = tl.load(statistics + 3 * stride)
        unit = tl.div_rn(1.0, tl.where(scale < FLOOR, FLOOR, scale))
    return median, unit, label_median, label_unit, shaped


@triton.jit
def _sign(values):
    return (values > 0.0).to(tl.float32) - (values < 0.0).to(tl.float32)


@triton.jit
def _place(row, column, height, width, STEP: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr):
    """For a rectangle's pixels that are on a scale: rows, columns, offsets, and whether they are in the image."""
    rows = row + tl.arange(0, TALL // STEP)[:, None] * STEP
    columns = column + tl.arange(0, WIDE // STEP)[None, :] * STEP
    return rows, columns, rows * width + columns, (rows < height) & (columns < width)


@triton.jit
def _counted(numbers, counts, places, SCALES: tl.constexpr):
    """The counts, plus 1 for each scale that contains the pixel. places: its row | its column (bitwise)."""
    out = ()
    for s in tl.static_range(SCALES):
        out = out + (numbers[s] + (counts & (places & ((1 << s) - 1) == 0)).to(tl.int32),)  # type: ignore[assignment]
    return out


@triton.jit(do_not_specialize=["stride", "image_stride", "height", "width", "across", "tiles"])
def _differences(
    pred, target, valid, statistics, differences, sums, counters, stride, image_stride, height, width, across, tiles,
    SCALES: tl.constexpr, FLOOR: tl.constexpr, NORMALIZE: tl.constexpr, ABSENT: tl.constexpr, TALL: tl.constexpr,
    WIDE: tl.constexpr, LINES: tl.constexpr
):  # fmt: skip
    """ABSENT marks pixels that do not count. NaN cannot: a NaN prediction must reach the loss."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, row, column = image * height * width, (tile // across) * TALL, (tile % across) * WIDE
    median, unit, label_median, label_unit, shaped = _scales_of(
        statistics + image * image_stride, stride, FLOOR, NORMALIZE
    )  # fmt: skip
    limit = tl.where(shaped > 0.0, height, 0)
    numbers, first = (), tl.full([LINES, WIDE], NEVER, tl.int32)
    for _ in tl.static_range(SCALES):
        numbers = numbers + (tl.zeros([LINES, WIDE], tl.int32),)  # type: ignore[assignment]
    for line in range(row, row + TALL, LINES):
        rows, columns, at, there = _place(line, column, height, width, 1, LINES, WIDE)
        values = tl.load(pred + start + at, mask=there, other=0.0)
        label = tl.load(target + start + at, mask=there, other=0.0)
        counts = (tl.load(valid + start + at, mask=there, other=0) != 0) & (tl.abs(label) < float("inf"))
        counts = counts & (rows < limit)
        difference = (values - median) * unit - (label - label_median) * label_unit
        tl.store(differences + start + at, tl.where(counts, difference, ABSENT), mask=there)
        numbers = _counted(numbers, counts, rows | columns, SCALES)
        if NORMALIZE:
            first = tl.minimum(first, tl.where(counts & (values == median), at, NEVER))
    sums += image * (SCALES + 3) * tiles + tile
    for s in tl.static_range(SCALES):
        tl.store(sums + s * tiles, tl.sum(numbers[s]).to(tl.float32))
    if NORMALIZE:
        tl.store(sums + SCALES * tiles, tl.min(first).to(tl.float32, bitcast=True))
    if tile == 0:
        tl.store(counters + image, 0)


@triton.jit
def _beside(differences, at, there, difference, counts, ABSENT: tl.constexpr):
    """At each pixel |change to its neighbour `at`|, and the change's sign; 0 where either does not count."""
    other = tl.load(differences + at, mask=there, other=ABSENT)
    change = tl.where(counts & (other != ABSENT), difference - other, 0.0)
    return tl.abs(change), _sign(change)


@triton.jit
def _edges_of(
    pred, differences, pushes, row, column, height, width, share, median,
    STEP: tl.constexpr, NORMALIZE: tl.constexpr, ABSENT: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """At a rectangle's pixels on a scale: |change| to right and below, and gradient times centred prediction."""
    rows, columns, at, there = _place(row, column, height, width, STEP, TALL, WIDE)
    difference = tl.load(differences + at, mask=there, other=ABSENT)
    counts = difference != ABSENT
    right, push = _beside(differences, at + STEP, there & (columns + STEP < width), difference, counts, ABSENT)
    _, left_push = _beside(differences, at - STEP, there & (columns >= STEP), difference, counts, ABSENT)
    down, down_push = _beside(
        differences, at + STEP * width, there & (rows + STEP < height), difference, counts, ABSENT
    )  # fmt: skip
    _, up_push = _beside(differences, at - STEP * width, there & (rows >= STEP), difference, counts, ABSENT)
    push = ((push + left_push) + (down_push + up_push)) * share
    if STEP == 1:
        tl.store(pushes + at, tl.where(counts, push, ABSENT), mask=there)
    else:
        before = tl.load(pushes + at, mask=there, other=ABSENT)
        tl.store(pushes + at, tl.where(counts, before + push, ABSENT), mask=there)
    pulled = tl.zeros_like(push)
    if NORMALIZE:
        values = tl.load(pred + at, mask=there, other=0.0)
        pulled = tl.where(counts, push * (values - median), 0.0)
    return right + down, pulled


@triton.jit(do_not_specialize=["stride", "image_stride", "height", "width", "across", "tiles"])
def _edges(
    pred, statistics, differences, sums, counters, pushes, losses, pulls, stride, image_stride, height, width, across,
    tiles,
    SCALES: tl.constexpr, FLOOR: tl.constexpr, NORMALIZE: tl.constexpr, ABSENT: tl.constexpr, TALL: tl.constexpr,
    WIDE: tl.constexpr, LINES: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """pushes: the gradient in the difference, ABSENT where that is. The first median pixels follow the counters."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, row = image * height * width, statistics + image * image_stride
    sums += image * (SCALES + 3) * tiles
    loss, pulled, median = 0.0, 0.0, 0.0
    if NORMALIZE:
        median = tl.load(row + 2 * stride)
    row_of, column = (tile // across) * TALL, (tile % across) * WIDE
    for s in tl.static_range(SCALES):
        share = tl.div_rn(1.0, tl.maximum(fold_sum(sums + s * tiles, tiles, CHUNK), 1.0))
        if s == 0:
            losses_of, pulled_of = tl.zeros([LINES, WIDE], tl.float32), tl.zeros([LINES, WIDE], tl.float32)
            for line in range(0, TALL, LINES):
                more, more_pulled = _edges_of(
                    pred + start, differences + start, pushes + start, row_of + line, column, height, width, share,
                    median, 1, NORMALIZE, ABSENT, LINES, WIDE
                )  # fmt: skip
                losses_of += more
                pulled_of += more_pulled
        else:
            tl.debug_barrier()  # this scale reads what the previous one wrote
            losses_of, pulled_of = _edges_of(
                pred + start, differences + start, pushes + start, row_of, column, height, width, share, median,
                1 << s, NORMALIZE, ABSENT, TALL, WIDE
            )  # fmt: skip
        loss += tl.sum(losses_of) * share
        if NORMALIZE:
            pulled += tl.sum(pulled_of)
    tl.store(sums + (SCALES + 1) * tiles + tile, loss)
    tl.store(sums + (SCALES + 2) * tiles + tile, pulled)
    tl.debug_barrier()
    if tl.atomic_add(counters + image, 1, sem="acq_rel") == tiles - 1:
        tl.debug_barrier()
        tl.store(losses + image, fold_sum(sums + (SCALES + 1) * tiles, tiles, CHUNK))
        if NORMALIZE:
            scale, count = tl.load(row + 3 * stride), tl.maximum(tl.load(row + 6 * stride), 1.0)
            pull = tl.div_rn(fold_sum(sums + (SCALES + 2) * tiles, tiles, CHUNK), scale * scale * count)
            tl.store(pulls + image, tl.where(scale <= FLOOR, 0.0, pull))
            tl.store(counters + tl.num_programs(1) + image, fold_least(sums + SCALES * tiles, tiles, CHUNK))


@triton.jit(do_not_specialize=["stride", "image_stride", "upstream_stride"])
def _slopes(
    pred, statistics, pushes, pulls, counters, upstream, slopes, stride, image_stride, pixels,
    upstream_stride, FLOOR: tl.constexpr, NORMALIZE: tl.constexpr, ABSENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradient of the sum of upstream times loss."""
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, start = block * BLOCK + tl.arange(0, BLOCK), image * pixels
    slope = tl.load(pushes + start + at, mask=at < pixels, other=ABSENT)
    counts = slope != ABSENT
    if NORMALIZE:
        row = statistics + image * image_stride
        median, unit, _, _, _ = _scales_of(row, stride, FLOOR, NORMALIZE)
        values, pull = tl.load(pred + start + at, mask=at < pixels, other=0.0), tl.load(pulls + image)
        slope = slope * unit - pull * _sign(values - median)
        slope += tl.where(at == tl.load(counters + tl.num_programs(1) + image), pull * tl.load(row + 7 * stride), 0.0)
    factor = tl.load(upstream + image * upstream_stride)
    tl.store(slopes + start + at, tl.where(counts, slope * factor, 0.0), mask=at < pixels)


@functools.lru_cache(maxsize=64)
def _kernels(scales: int, floor: float, normalize: bool, block: int) -> tuple[int, int, dict[str, Launcher]]:
    """Rows and columns of a rectangle, and the kernels by name, in launch order."""
    tall, wide = max(TALL, 1 << (scales - 1)), max(WIDE, 1 << (scales - 1))
    each = {"NORMALIZE": normalize, "FLOOR": floor, "ABSENT": ABSENT, **HOW}
    visit = each | {"SCALES": scales, "TALL": tall, "WIDE": wide, "LINES": LINES}
    kernels = {
        "differences": Launcher(_differences, visit),
        "edges": Launcher(_edges, visit | {"CHUNK": CHUNK}),
        "slopes": Launcher(_slopes, each | {"BLOCK": block}),
    }
    return tall, wide, kernels


class _Plan(NamedTuple):
    """All that the loss needs beside the maps, because working it out takes longer than the launches."""

    images: int
    sums: tuple[int, int, int]
    grid: Grid
    sizes: tuple[int, ...]
    blocks: Grid
    strides_and_pixels: tuple[int, int, int]
    differences: Launcher
    edges: Launcher
    slopes: Launcher


@functools.lru_cache(maxsize=256)
def _plan(
    images: int, height: int, width: int, stride: int, image_stride: int, scales: int, floor: float, normalize: bool,
    block: int,
) -> _Plan:  # fmt: skip
    tall, wide, kernels = _kernels(scales, floor, normalize, block)
    across = -(-width // wide)
    tiles = across * -(-height // tall)
    return _Plan(
        images, (images, scales + 3, tiles), (tiles, images, 1), (stride, image_stride, height, width, across, tiles),
        (-(-height * width // block), images, 1), (stride, image_stride, height * width),
        kernels["differences"], kernels["edges"], kernels["slopes"],
    )  # fmt: skip


class _GradientLoss(torch.autograd.Function):
    """Per-image loss; differentiable once, in `pred`."""

    @staticmethod
    def forward(ctx, pred, target, valid, statistics, scales, floor, normalize):
        plan = _plan(*pred.shape, statistics.stride(1), statistics.stride(0), scales, floor, normalize, BLOCK)
        differences, pushes = torch.empty_like(pred), torch.empty_like(pred)
        sums, losses = pred.new_empty(plan.sums), pred.new_empty(plan.images)
        pulls, counters = pred.new_empty(plan.images), pred.new_empty(2 * plan.images, dtype=torch.int32)
        plan.differences(
            plan.grid, (pred, target, valid, statistics, differences, sums, counters), plan.sizes
        )  # fmt: skip
        plan.edges(plan.grid, (pred, statistics, differences, sums, counters, pushes, losses, pulls), plan.sizes)
        ctx.save_for_backward(pred, statistics, pushes, pulls, counters)
        ctx.plan = plan
        return losses

    @staticmethod
    @differentiable_once
    def backward(ctx, upstream):
        saved, plan = ctx.saved_tensors, ctx.plan
        slopes = torch.empty_like(saved[0])
        numbers = (*plan.strides_and_pixels, upstream.stride(0))
        plan.slopes(plan.blocks, (*saved, upstream, slopes), numbers)
        return slopes, None, None, None, None, None, None


def gradient_loss(
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    scales: int,
    normalize: bool,
    flat: float,
    floor: float,
    found: ContextStatistics | None = None,
) -> Tensor:
    """Losses (B,).

    pred, target: (B,H,W) float32. valid: (B,H,W) uint8. All contiguous and on one device. found: statistics of the
    same maps whose first context is the whole image, if available.
    """
    if found is None and normalize:
        found = context_statistics(target, pred, valid, WHOLE, flat=flat, floor=floor)
    statistics = pred.detach() if found is None else found.statistics
    losses: Tensor = _GradientLoss.apply(pred, target, valid, statistics, scales, floor, normalize)
    return losses
