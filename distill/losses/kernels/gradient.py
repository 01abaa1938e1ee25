"""The multi-scale gradient loss and its gradient: `losses.gradient_loss` in three launches and one back.

After the statistics of the whole image (select.py), unless the loss in contexts has found them already:

    differences  the normalized maps' difference at each pixel, and how many pixels each scale has
    edges        from a pixel's neighbours at all scales its share of the loss and of the gradient; their sums
    close        the sums over the blocks
    slopes       the gradient in the prediction, in the backward pass

In the sum over pairs whatever one pixel gains its neighbour loses, so that the median's own gradient is that of the
deviation alone. Shapes: B images, H rows, W columns, N = H W pixels.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.losses.kernels.keys import fold_least, fold_sum
from distill.losses.kernels.launch import Launcher
from distill.losses.kernels.select import BLOCK, CHUNK, HOW, ROWS, WHOLE, Found, find

# Of a block's pixels each of 256 threads would hold more than 128 registers can, and spill them to memory.
SPREAD = {**HOW, "num_warps": 16}
ABSENT = float(torch.finfo(torch.float32).max)


@triton.jit
def _scales_of(statistics, stride, FLOOR: tl.constexpr, NORMALIZE: tl.constexpr):
    """Median and one over the deviation of prediction and label, and whether the label has a shape at all."""
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


@triton.jit(do_not_specialize=["stride", "blocks"])
def _differences(
    pred, target, valid, statistics, differences, numbers, firsts, stride, height, width, blocks,
    SCALES: tl.constexpr, FLOOR: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, ABSENT: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """ABSENT stands where a pixel does not count. NaN cannot: a prediction that is not a number must be heard of."""
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, start = block * BLOCK + tl.arange(0, BLOCK), image * height * width
    there = at < height * width
    median, unit, label_median, label_unit, shaped = _scales_of(
        statistics + image * ROWS * stride, stride, FLOOR, NORMALIZE
    )  # fmt: skip
    values = tl.load(pred + start + at, mask=there, other=0.0)
    label = tl.load(target + start + at, mask=there, other=0.0)
    counts = (tl.load(valid + start + at, mask=there, other=0) != 0) & (tl.abs(label) < float("inf"))
    counts = counts & (at < tl.where(shaped > 0.0, height * width, 0))
    difference = (values - median) * unit - (label - label_median) * label_unit
    tl.store(differences + start + at, tl.where(counts, difference, ABSENT), mask=there)
    row, column = at // width, at % width
    for s in tl.static_range(SCALES):
        on = counts & ((row | column) & ((1 << s) - 1) == 0)
        tl.store(numbers + (image * SCALES + s) * blocks + block, tl.sum(on.to(tl.float32), 0))
    if NORMALIZE:
        tl.store(firsts + image * blocks + block, tl.min(tl.where(counts & (values == median), at, 0x7FFFFFFF), 0))


@triton.jit
def _beside(differences, at, there, difference, ABSENT: tl.constexpr):
    """At the pixels, from the neighbours `at`: |difference to it|, and its sign; 0 where one does not count."""
    other = tl.load(differences + at, mask=there, other=ABSENT)
    change = tl.where(other == ABSENT, 0.0, difference - other)
    return tl.abs(change), _sign(change)


@triton.jit(do_not_specialize=["stride", "blocks"])
def _edges(
    pred, statistics, differences, numbers, pushes, sums, stride, height, width, blocks,
    SCALES: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, ABSENT: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr
):  # fmt: skip
    """pushes: the gradient in the difference, ABSENT where that is."""
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, start = block * BLOCK + tl.arange(0, BLOCK), image * height * width
    there = at < height * width
    own = differences + start
    difference = tl.load(own + at, mask=there, other=ABSENT)
    counts = difference != ABSENT
    row, column = at // width, at % width
    loss, push = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(SCALES):
        step = 1 << s
        number = fold_sum(numbers + (image * SCALES + s) * blocks, blocks, CHUNK)
        on = counts & ((row | column) & (step - 1) == 0)
        right, right_sign = _beside(own, at + step, on & (column + step < width), difference, ABSENT)
        left, left_sign = _beside(own, at - step, on & (column >= step), difference, ABSENT)
        down, down_sign = _beside(own, at + step * width, on & (row + step < height), difference, ABSENT)
        up, up_sign = _beside(own, at - step * width, on & (row >= step), difference, ABSENT)
        share = tl.div_rn(1.0, tl.maximum(number, 1.0))
        # Each pair is seen from both its ends.
        loss += ((right + left) + (down + up)) * (0.5 * share)
        push += ((right_sign + left_sign) + (down_sign + up_sign)) * share
    tl.store(pushes + start + at, tl.where(counts, push, ABSENT), mask=there)
    sums += image * 2 * blocks + block
    tl.store(sums, tl.sum(loss, 0))
    if NORMALIZE:
        median = tl.load(statistics + image * ROWS * stride + 2 * stride)
        values = tl.load(pred + start + at, mask=there, other=0.0)
        tl.store(sums + blocks, tl.sum(tl.where(counts, push * (values - median), 0.0), 0))


@triton.jit(do_not_specialize=["stride", "blocks"])
def _close(
    statistics, sums, firsts, losses, pulls, medians, stride, blocks,
    FLOOR: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """An image's loss, by how much its deviation pulls at each pixel, and the first pixel that is its median."""
    image = tl.program_id(0).to(tl.int64)
    sums, row = sums + image * 2 * blocks, statistics + image * ROWS * stride
    tl.store(losses + image, fold_sum(sums, blocks, CHUNK))
    if NORMALIZE:
        scale, count = tl.load(row + 3 * stride), tl.maximum(tl.load(row + 6 * stride), 1.0)
        pull = tl.div_rn(fold_sum(sums + blocks, blocks, CHUNK), scale * scale * count)
        tl.store(pulls + image, tl.where(scale <= FLOOR, 0.0, pull))
        tl.store(medians + image, fold_least(firsts + image * blocks, blocks, CHUNK))


@triton.jit(do_not_specialize=["stride"])
def _slopes(
    pred, statistics, pushes, pulls, medians, upstream, slopes, stride, pixels,
    FLOOR: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, ABSENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradient of the sum of upstream times loss."""
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, start = block * BLOCK + tl.arange(0, BLOCK), image * pixels
    slope = tl.load(pushes + start + at, mask=at < pixels, other=ABSENT)
    counts = slope != ABSENT
    if NORMALIZE:
        row = statistics + image * ROWS * stride
        median, unit, _, _, _ = _scales_of(row, stride, FLOOR, NORMALIZE)
        values, pull = tl.load(pred + start + at, mask=at < pixels, other=0.0), tl.load(pulls + image)
        slope = slope * unit - pull * _sign(values - median)
        slope += tl.where(at == tl.load(medians + image), pull * tl.load(row + 7 * stride), 0.0)
    tl.store(slopes + start + at, tl.where(counts, slope * tl.load(upstream + image), 0.0), mask=at < pixels)


@functools.lru_cache(maxsize=64)
def _kernels(scales: int, floor: float, normalize: bool) -> dict[str, Launcher]:
    """By name, in the order of their launches."""
    options = {"NORMALIZE": normalize, "ROWS": ROWS}
    visit = {"ABSENT": ABSENT, "BLOCK": BLOCK, **options}
    return {
        "differences": Launcher(_differences, visit | {"SCALES": scales, "FLOOR": floor, **HOW}),
        "edges": Launcher(_edges, visit | {"SCALES": scales, "CHUNK": CHUNK, **SPREAD}),
        "close": Launcher(_close, options | {"FLOOR": floor, "CHUNK": CHUNK, **HOW}),
        "slopes": Launcher(_slopes, visit | {"FLOOR": floor, **HOW}),
    }


class _GradientLoss(torch.autograd.Function):
    """Per-image loss; differentiable once, in `pred`."""

    @staticmethod
    def forward(ctx, pred, target, valid, statistics, scales, floor, normalize):
        images, height, width = pred.shape
        blocks, stride = -(-height * width // BLOCK), statistics.shape[-1]
        differences, pushes = torch.empty_like(pred), torch.empty_like(pred)
        sums, numbers = pred.new_empty(images, 2, blocks), pred.new_empty(images, scales, blocks)
        losses, pulls = pred.new_empty(images), pred.new_empty(images)
        firsts = torch.empty(images, blocks, dtype=torch.int32, device=pred.device)
        medians = torch.empty(images, dtype=torch.int32, device=pred.device)
        size, grid, kernels = (stride, height, width, blocks), (blocks, images), _kernels(scales, floor, normalize)
        kernels["differences"](grid, pred, target, valid, statistics, differences, numbers, firsts, *size)
        kernels["edges"](grid, pred, statistics, differences, numbers, pushes, sums, *size)
        kernels["close"]((images,), statistics, sums, firsts, losses, pulls, medians, stride, blocks)
        ctx.save_for_backward(pred, statistics, pushes, pulls, medians)
        ctx.slopes, ctx.grid = kernels["slopes"], grid
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        pred, statistics, *rest = ctx.saved_tensors
        slopes, pixels = torch.empty_like(pred), pred.shape[1] * pred.shape[2]
        ctx.slopes(ctx.grid, pred, statistics, *rest, upstream.contiguous(), slopes, statistics.shape[-1], pixels)
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
    found: Found | None = None,
) -> Tensor:
    """Losses (B,).

    pred, target: (B,H,W) float32. valid: (B,H,W) uint8. All contiguous and on one device. found: statistics of these
    very maps whose first context is the whole image, where they are known.
    """
    if found is None and normalize:
        found = find(target.flatten(1), pred.detach().flatten(1), valid.flatten(1), WHOLE, flat=flat)
    statistics = pred.detach() if found is None else found.statistics
    losses: Tensor = _GradientLoss.apply(pred, target, valid, statistics, scales, floor, normalize)
    return losses
