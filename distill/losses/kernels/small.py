"""Median and mean absolute deviation of maps that fit into one block: one launch, for the training log."""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from distill.core.launch import Launcher
from distill.losses.kernels.keys import key_value, order_key

LARGEST = 8192


@triton.jit
def _small(
    values, valid, medians, deviations, width, pixels, image_step, row_step, column_step, valid_image_step,
    valid_row_step, valid_column_step, BLOCK: tl.constexpr
):  # fmt: skip
    """Finds the median's key bit by bit: the largest key with at most `rank` keys below it."""
    image = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    row, column, there = at // width, at % width, at < pixels
    numbers = tl.load(values + image * image_step + row * row_step + column * column_step, mask=there, other=0.0)
    flags = valid + image * valid_image_step + row * valid_row_step + column * valid_column_step
    counts = there & (tl.load(flags, mask=there, other=0) != 0)
    known = counts & (numbers == numbers)
    keys = tl.where(known, order_key(numbers), 0x7FFFFFFF)
    rank = tl.maximum(tl.sum(known.to(tl.int32), 0) - 1, 0) // 2
    found = tl.where(tl.sum((keys < 0).to(tl.int32), 0) <= rank, 0, -0x80000000)
    for i in tl.static_range(31):
        candidate = found + (1 << (30 - i))
        found = tl.where(tl.sum((keys < candidate).to(tl.int32), 0) <= rank, candidate, found)
    median = tl.where(tl.sum(known.to(tl.int32), 0) > 0, key_value(found), 0.0)
    number = tl.maximum(tl.sum(counts.to(tl.int32), 0), 1).to(tl.float32)
    distance = tl.sum(tl.where(counts, tl.abs(numbers - median), 0.0), 0)
    tl.store(medians + image, median)
    tl.store(deviations + image, tl.div_rn(distance, number))


@functools.lru_cache(maxsize=64)
def _kernels(pixels: int) -> Launcher:
    block = max(32, triton.next_power_of_2(pixels))
    return Launcher(_small, {"BLOCK": block, "num_warps": 8, "enable_fp_fusion": False})


def small_mean_deviation(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Median and mean deviation, (B,) each, no gradient. values: (B,H,W) float32, valid: (B,H,W) uint8, any strides."""
    images, height, width = values.shape
    medians, deviations = values.new_empty(images), values.new_empty(images)
    numbers = (width, height * width, *values.stride(), *valid.stride())
    _kernels(height * width)((images, 1, 1), (values, valid, medians, deviations), numbers)
    return medians, deviations
