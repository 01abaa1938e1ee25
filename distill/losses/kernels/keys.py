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

# Words of an image's header, float32 where not said otherwise: its pixels (int32), or 0 where it does not count; its
# label's least value, finest parts per unit of label, and flatness threshold; the least and the greatest key of the
# label and of the prediction (int32); and how many programs have done their part of the loss (int32).
HEADER = 9
# A program's threads, and pixels of a line of its tile: each thread has a column, so that sums of columns are its own.
WIDTH = 256


@dataclass(frozen=True)
class Cut:
    """In how many equal parts the label's range is cut, level by level, as the kernels are told."""

    levels: tuple[int, ...]

    @property
    def contexts(self) -> int:
        """Over all levels."""
        return sum(self.levels)

    @property
    def parts(self) -> int:
        """The finest level's, as a power of two."""
        return 1 << (max(self.levels) - 1).bit_length()

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
            "PARTS": self.parts,
        }


@functools.lru_cache
def cut_of(levels: tuple[int, ...]) -> Cut:
    """The one Cut of these levels, which remembers its constants."""
    return Cut(levels)


@triton.jit
def order_key(values):
    """int32 keys in the order of the float32 values; -0.0 is 0.0, NaN of either sign is above everything."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    bits = tl.where(values != values, 0x7FC00000, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_value(keys):
    """The float32 values of int32 keys."""
    bits = keys ^ ((keys >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def raised(least, by):
    """The value whose key is `by` (int32, read as uint32) above the key `least`."""
    key = least.to(tl.uint32, bitcast=True) + by.to(tl.uint32, bitcast=True)
    return key_value(key.to(tl.int32, bitcast=True))


@triton.jit
def tile(start, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The BLOCK numbers from `start` on, in lines of WIDTH."""
    return start + tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def table(numbers, CONTEXTS: tl.constexpr):
    """One number of each context, a tuple. numbers: where context 0's lies."""
    loaded = ()
    for c in tl.static_range(CONTEXTS):
        loaded = loaded + (tl.load(numbers + c),)  # type: ignore[assignment]
    return loaded


@triton.jit
def spread(numbers, share, LEVEL: tl.constexpr, FIRST: tl.constexpr, FINEST: tl.constexpr):
    """Of a table the number of each pixel's context of a level; a scalar where the level has but one.

    share: see `label_of`.
    """
    found = numbers[FIRST]
    for k in tl.static_range(1, LEVEL):
        found = tl.where(share >= k * (FINEST // LEVEL), numbers[FIRST + k], found)
    return found


@triton.jit
def own(share, inside, k: tl.constexpr, LEVEL: tl.constexpr, FINEST: tl.constexpr):
    """Whether the pixels count and lie in context k of a level. share: NaN where they do not count."""
    if LEVEL == 1:
        mine = inside
    elif k == 0:
        mine = share < FINEST // LEVEL
    elif k == LEVEL - 1:
        mine = share >= k * (FINEST // LEVEL)
    else:
        mine = (share >= k * (FINEST // LEVEL)) & (share < (k + 1) * (FINEST // LEVEL))
    return mine


@triton.jit
def word(header, number):
    """An int32 of a header."""
    return tl.load(header + number).to(tl.int32, bitcast=True)


@triton.jit
def label_of(target, valid, at, limit, low, per_unit, CHECK: tl.constexpr):
    """Label, whether it counts, and its share of the label's range in finest parts, NaN where it does not; at pixels
    `at` of an image.

    target, valid: where the image's lie. limit: past the last pixel that is asked for. low, per_unit: of the header.
    CHECK: a label that is not finite does not count.
    """
    there = at < limit
    values = tl.load(target + at, mask=there, other=0.0)
    inside = tl.load(valid + at, mask=there, other=0) != 0
    if CHECK:
        inside = inside & (tl.abs(values) < float("inf"))
    return values, inside, tl.where(inside, (values - low) * per_unit, float("nan"))


@triton.jit
def bin_of(values, low, per_unit, SCALE: tl.constexpr, top):
    """Which bin of equal width each value lies in: the whole part of this float, which rises with the key.

    low, per_unit: as `per_unit_of` has it, 0 where any value is not finite. SCALE: bins of a unit. top: the last bin.
    """
    place = (values - low) * per_unit * SCALE
    return tl.where(place > 0.0, tl.minimum(place, top), 0.0)


@triton.jit
def per_unit_of(units, least, greatest):
    """How many of these units the range between two keys has for each 1.0; never infinite, 0 if the range is or NaN."""
    per_unit = tl.div_rn(units, key_value(greatest) - key_value(least))
    return tl.where(per_unit == per_unit, tl.minimum(per_unit, 3.4028234e38), 0.0)


@triton.jit
def meet(counter):
    """Waits for all programs of the launch, which have to run at the same time; what each wrote is then seen by all."""
    tl.debug_barrier()
    programs = tl.num_programs(0)
    old = tl.atomic_add(counter, 1, sem="acq_rel")
    seen = old + 1
    while seen < (old // programs + 1) * programs:
        seen = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def fold_least(numbers, count, CHUNK: tl.constexpr):
    """The least of `count` int32, or float32 that are their bits."""
    lanes = tl.arange(0, CHUNK)
    found = tl.full([CHUNK], 0x7FFFFFFF, tl.int32)
    for start in range(0, count, CHUNK):
        more = tl.load(numbers + start + lanes, mask=start + lanes < count, other=0).to(tl.int32, bitcast=True)
        found = tl.minimum(found, tl.where(start + lanes < count, more, 0x7FFFFFFF))
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
    """The sum of `count` float32, or int32 that are their bits, in an order that `count` alone decides."""
    lanes = tl.arange(0, CHUNK)
    found = tl.zeros([CHUNK], tl.float32)
    for start in range(0, count, CHUNK):
        bits = tl.load(numbers + start + lanes, mask=start + lanes < count, other=0)
        found += bits.to(tl.float32, bitcast=True)
    return tl.sum(found, 0)
