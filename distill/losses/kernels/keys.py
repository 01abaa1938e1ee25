"""Device functions that the kernels share: floats in the order of integers, and the contexts of a pixel.

How the range is cut travels as two compile-time integers of eight bits a level: LEVELS holds in how many parts each
level cuts it, FIRSTS the number of each level's first context. (1, 2, 4) has the contexts 0, 1-2 and 3-6. A context
is a run of the finest parts, so that the finest part of a pixel says all its contexts.

Conservative on purpose (what Triton's interpreter accepts, a compiler may not): block sizes are powers of two, every
load has a mask, loops over levels and contexts are unrolled.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

# Words of an image's header: its pixels, or 0 where it does not count; its label's least value, parts per unit, and
# flatness threshold (bits of float32); then for label and prediction each the least key and the shifts of the first and
# of the second digit.
HEADER = 16
# Radix digits of 12, 12 and 8 bits.
BINS = 4096
LAST_BINS = 256


@dataclass(frozen=True)
class Cut:
    """In how many equal parts the label's range is cut, level by level, as the kernels are told."""

    levels: tuple[int, ...]

    @property
    def contexts(self) -> int:
        """Over all levels."""
        return sum(self.levels)

    @functools.cached_property
    def constants(self) -> dict[str, int]:
        """The compile-time arguments that name it."""
        firsts = [sum(self.levels[:i]) for i in range(len(self.levels))]
        return {
            "LEVELS": sum(level << (8 * i) for i, level in enumerate(self.levels)),
            "FIRSTS": sum(first << (8 * i) for i, first in enumerate(firsts)),
            "NUMBER": len(self.levels),
            "CONTEXTS": self.contexts,
            "FINEST": max(self.levels),
            "PARTS": 1 << (max(self.levels) - 1).bit_length(),
        }


@functools.lru_cache
def cut_of(levels: tuple[int, ...]) -> Cut:
    """The one Cut of these levels, which remembers its constants."""
    return Cut(levels)


@triton.jit
def order_key(values):
    """int32 keys in the order of the float32 values; -0.0 is 0.0, NaN of either sign is above everything."""
    bits = values.to(tl.int32, bitcast=True)
    bits = tl.where(values == 0.0, 0, bits)
    bits = tl.where(values != values, 0x7FC00000, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_value(keys):
    """The float32 values of int32 keys."""
    bits = keys ^ ((keys >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def above_least(values, least):
    """uint32: how many keys each value lies above the key `least`, which is the smallest."""
    return order_key(values).to(tl.uint32, bitcast=True) - least.to(tl.uint32, bitcast=True)


@triton.jit
def raised(least, by):
    """The value whose key is `by` (int32, read as uint32) above the key `least`."""
    key = least.to(tl.uint32, bitcast=True) + by.to(tl.uint32, bitcast=True)
    return key_value(key.to(tl.int32, bitcast=True))


@triton.jit
def spread(numbers, part, LEVEL: tl.constexpr, FIRST: tl.constexpr, FINEST: tl.constexpr):
    """One number of each context of a level, at the pixels of the context. numbers: where context 0's lies."""
    found = tl.full(part.shape, tl.load(numbers + FIRST), numbers.dtype.element_ty)
    for k in tl.static_range(1, LEVEL):
        found = tl.where(part // (FINEST // LEVEL) == k, tl.load(numbers + FIRST + k), found)
    return found


@triton.jit
def header_of(header):
    """An image's pixels that may count, its label's least value, and finest parts of the range per unit of label."""
    low = tl.load(header + 1).to(tl.float32, bitcast=True)
    return tl.load(header), low, tl.load(header + 2).to(tl.float32, bitcast=True)


@triton.jit
def label_of(target, valid, at, pixels, limit, low, per_unit, FINEST: tl.constexpr, CHECK: tl.constexpr):
    """Label, whether it counts, and the finest part of its range that it lies in, at pixels `at` of an image.

    target, valid: where the image's lie. pixels: of an image. limit, low, per_unit: see `header_of`. CHECK: a label
    that is not finite does not count.
    """
    there = at < pixels
    values = tl.load(target + at, mask=there, other=0.0)
    inside = (at < limit) & (tl.load(valid + at, mask=there, other=0) != 0)
    if CHECK:
        inside = inside & (tl.abs(values) < float("inf"))
    part = tl.zeros_like(at)
    if FINEST > 1:
        share = tl.where(inside, (values - low) * per_unit, 0.0)
        part = tl.minimum(tl.maximum(share, 0.0), FINEST - 1.0).to(tl.int32)
    return values, inside, part


@triton.jit
def fold_least(numbers, count, CHUNK: tl.constexpr):
    """The least of `count` int32."""
    lanes = tl.arange(0, CHUNK)
    found = tl.full([CHUNK], 0x7FFFFFFF, tl.int32)
    for start in range(0, count, CHUNK):
        more = tl.load(numbers + start + lanes, mask=start + lanes < count, other=0x7FFFFFFF)
        found = tl.minimum(found, more)
    return tl.min(found, 0)


@triton.jit
def fold_greatest(numbers, count, CHUNK: tl.constexpr):
    """The greatest of `count` int32."""
    lanes = tl.arange(0, CHUNK)
    found = tl.full([CHUNK], -0x80000000, tl.int32)
    for start in range(0, count, CHUNK):
        more = tl.load(numbers + start + lanes, mask=start + lanes < count, other=-0x80000000)
        found = tl.maximum(found, more)
    return tl.max(found, 0)


@triton.jit
def fold_sum(numbers, count, CHUNK: tl.constexpr):
    """The sum of `count` float32, in an order that `count` alone decides."""
    lanes = tl.arange(0, CHUNK)
    found = tl.zeros([CHUNK], tl.float32)
    for start in range(0, count, CHUNK):
        found += tl.load(numbers + start + lanes, mask=start + lanes < count, other=0.0)
    return tl.sum(found, 0)
