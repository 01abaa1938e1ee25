"""A map's values in boxes, and the gradient in the map: `crops.sample_boxes` in one launch each way.

torch writes a grid of twice the values, and its gradient adds floats atomically, in any order. Here a program of the
backward pass gathers, for some pixels of a row of the map, the gradients of all samples less than a pixel away.
Shapes: B maps, H rows, W columns, N boxes of each, S x S samples of a box.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.core.crops import INSIDE_TOLERANCE
from distill.core.launch import Launcher, differentiable_once

BLOCK = 512
WIDE = 256


@triton.jit
def _position(first, last, index, size, count):
    """Where the sample `index` of `size` between a box's edges lies on a side of `count` pixels, by the operations of
    `crops.sample_boxes`.
    """
    return (first + (last - first) * tl.div_rn(index + 0.5, size * 1.0)) * count


@triton.jit
def _clamped(position, count):
    """In pixels from the first one's centre, not beyond the last one's."""
    return tl.minimum(tl.maximum(position - 0.5, 0.0), count - 1.0)


@triton.jit
def _is_inside(position, count, TOLERANCE: tl.constexpr):
    return (position >= 0.5 - TOLERANCE) & (position <= count - 0.5 + TOLERANCE)


@triton.jit(do_not_specialize=["number", "height", "width", "size"])
def _sample(maps, boxes, values, inside, number, height, width, size, TOLERANCE: tl.constexpr, BLOCK: tl.constexpr):
    box = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there, edges = at < size * size, boxes + 4 * box
    row = _position(tl.load(edges), tl.load(edges + 2), at // size, size, height)
    column = _position(tl.load(edges + 1), tl.load(edges + 3), at % size, size, width)
    y, x = _clamped(row, height), _clamped(column, width)
    top, left = tl.floor(y), tl.floor(x)
    down, across = y - top, x - left
    first = maps + (box // number) * height * width + top.to(tl.int32) * width + left.to(tl.int32)
    right, below = there & (left + 1.0 < width), there & (top + 1.0 < height)
    upper = tl.load(first, mask=there, other=0.0) * (1.0 - across)
    upper += tl.where(right, tl.load(first + 1, mask=right, other=0.0) * across, 0.0)
    lower = tl.load(first + width, mask=below, other=0.0) * (1.0 - across)
    lower += tl.where(right & below, tl.load(first + width + 1, mask=right & below, other=0.0) * across, 0.0)
    value = upper * (1.0 - down) + tl.where(below, lower * down, 0.0)
    tl.store(values + box * size * size + at, value, mask=there)
    counts = _is_inside(row, height, TOLERANCE) & _is_inside(column, width, TOLERANCE)
    tl.store(inside + box * size * size + at, counts.to(tl.uint8), mask=there)


@triton.jit
def _near(pixel, first, last, size, count):
    """The samples that may be less than a pixel away from `pixel`: from the first to before the second result.

    Those beyond a map's first or last pixel have that pixel's value.
    """
    step = tl.maximum((last - first) * tl.div_rn(count * 1.0, size * 1.0), 1e-6)
    zero = pixel - (first * count + 0.5 * step - 0.5)  # how far the pixel is from the sample 0
    start, end = tl.floor(tl.div_rn(zero - 1.01, step)), tl.ceil(tl.div_rn(zero + 1.01, step))
    start = tl.where(pixel <= 0, 0.0, tl.minimum(tl.maximum(start, 0.0), size * 1.0))
    end = tl.where(pixel >= count - 1, size * 1.0, tl.minimum(tl.maximum(end, 0.0), size * 1.0))
    return start.to(tl.int32), end.to(tl.int32)


@triton.jit
def _weight(pixel, first, last, index, size, count):
    """The pixel's weight in the sample `index`."""
    return tl.maximum(1.0 - tl.abs(_clamped(_position(first, last, index, size, count), count) - pixel), 0.0)


@triton.jit(do_not_specialize=["number", "height", "width", "size"])
def _gather(upstream, boxes, slopes, number, height, width, size, WIDE: tl.constexpr):
    row, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros([WIDE], tl.float32)
    for n in range(number):
        edges = boxes + 4 * (image * number + n)
        top, left, bottom, right = tl.load(edges), tl.load(edges + 1), tl.load(edges + 2), tl.load(edges + 3)
        first_row, end_row = _near(row, top, bottom, size, height)
        first, end = _near(column, left, right, size, width)
        taps = tl.max(end - first)
        for i in range(first_row, end_row):
            row_weight = _weight(row, top, bottom, i, size, height)
            line = upstream + ((image * number + n) * size + i) * size
            for k in range(taps):
                at = first + k
                there = at < end
                weight = row_weight * _weight(column, left, right, at, size, width)
                total += tl.where(there, weight * tl.load(line + at, mask=there, other=0.0), 0.0)
    tl.store(slopes + (image * height + row) * width + column, total, mask=column < width)


@functools.cache
def _kernels() -> tuple[Launcher, Launcher]:
    # Without fusion: `inside` is exact, so positions must have the bits of torch's.
    plain = {"enable_fp_fusion": False}
    return Launcher(_sample, {"TOLERANCE": INSIDE_TOLERANCE, "BLOCK": BLOCK, **plain}), Launcher(
        _gather, {"WIDE": WIDE, **plain}
    )


class _Samples(torch.autograd.Function):
    """Values and inside; differentiable once, in `maps`."""

    @staticmethod
    def forward(ctx, maps, boxes, size):
        (images, height, width), number = maps.shape, boxes.shape[1]
        values = maps.new_empty((images, number, size, size))
        inside = torch.empty(values.shape, dtype=torch.bool, device=maps.device)
        if values.numel():
            grid = (-(-size * size // BLOCK), images * number, 1)
            tensors = (maps, boxes, values, inside.view(torch.uint8))
            _kernels()[0](grid, tensors, (number, height, width, size))
        ctx.save_for_backward(boxes)
        ctx.sizes = (number, height, width, size)
        ctx.mark_non_differentiable(inside)
        ctx.set_materialize_grads(False)
        return values, inside

    @staticmethod
    @differentiable_once
    def backward(ctx, upstream, _inside):
        (boxes,), (_, height, width, _) = ctx.saved_tensors, ctx.sizes
        if upstream is None:
            return None, None, None
        slopes = upstream.new_empty((len(boxes), height, width))
        grid = (height, len(boxes), -(-width // WIDE))
        _kernels()[1](grid, (upstream.contiguous(), boxes, slopes), ctx.sizes)
        return slopes, None, None


def sample_boxes(maps: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """As `crops.sample_boxes`. maps: (B,H,W), boxes: (B,N,4), float32, contiguous, on one device."""
    values, inside = _Samples.apply(maps, boxes, size)
    return values, inside
