"""Device functions that the kernels share: integer keys in the order of floats, and the contexts of a pixel.

The cut of the range is passed as two compile-time integers with eight bits a level: LEVELS holds the number of parts of
each level, FIRSTS the index of each level's first context. (1, 2, 4) has the contexts 0, 1-2 and 3-6. A context is a
run of the finest parts, so that the finest part of a pixel determines all its contexts.

Conservative on purpose (a compiler may reject what Triton's interpreter accepts): block sizes are powers of two, every
load has a mask, loops over levels and contexts are unrolled.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

# Words of an image's header, float32 unless noted: its number of pixels (int32), or 0 if the image does not count; its
# label's least value, finest parts per unit of label, and flatness threshold; the least and the greatest key of the
# label and of the prediction (int32); and how many programs have finished their part of the loss (int32).
HEADER = 9
# A program's threads, and pixels of a line of its tile: each thread has a column and sums it without communication.
WIDTH = 256


@dataclass(frozen=True)
class Cut:
    """The number of equal parts of the label's range at each level, and the kernels' arguments for it."""

    levels: tuple[int, ...]

    @property
    def contexts(self) -> int:
        """The number of contexts of all levels."""
        return sum(self.levels)

    @property
    def parts(self) -> int:
        """The number of the finest parts, rounded up to a power of two."""
        return 1 << (max(self.levels) - 1).bit_length()

    @functools.cached_property
    def constants(self) -> dict[str, int]:
        """The compile-time arguments that describe the cut."""
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
    """The cached Cut of these levels, which caches its constants."""
    return Cut(levels)


@triton.jit
def order_key(values):
    """int32 keys in the order of the float32 values; -0.0 equals 0.0, NaN of either sign is the greatest."""
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
    """The BLOCK integers from `start` on, in lines of WIDTH."""
    return start + tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def table(numbers, CONTEXTS: tl.constexpr):
    """A tuple with one number of each context. numbers: pointer to context 0's."""
    loaded = ()
    for c in tl.static_range(CONTEXTS):
        loaded = loaded + (tl.load(numbers + c),)  # type: ignore[assignment]
    return loaded


@triton.jit
def spread(numbers, share, LEVEL: tl.constexpr, FIRST: tl.constexpr, FINEST: tl.constexpr):
    """For each pixel the table's number of its context of a level; a scalar if the level has only one context.

    share: see `label_of`.
    """
    found = numbers[FIRST]
    for k in tl.static_range(1, LEVEL):
        found = tl.where(share >= k * (FINEST // LEVEL), numbers[FIRST + k], found)
    return found


@triton.jit
def in_context(share, inside, k: tl.constexpr, LEVEL: tl.constexpr, FINEST: tl.constexpr):
    """Whether the pixels count and lie in context k of a level. share: NaN where they do not count."""
    if LEVEL == 1:
        member = inside
    elif k == 0:
        member = share < FINEST // LEVEL
    elif k == LEVEL - 1:
        member = share >= k * (FINEST // LEVEL)
    else:
        member = (share >= k * (FINEST // LEVEL)) & (share < (k + 1) * (FINEST // LEVEL))
    return member


@triton.jit
def word(header, number):
    """The int32 word at this index of a header."""
    return tl.load(header + number).to(tl.int32, bitcast=True)


@triton.jit
def label_of(target, valid, at, limit, low, per_unit, CHECK: tl.constexpr):
    """At pixels `at` of an image: label, whether it counts, and its position in the label's range in finest parts (NaN
    where it does not count).

    target, valid: pointers to the image's. limit: one past the last pixel. low, per_unit: of the header.
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
    """The bin of equal width of each value: the integer part of this float, which is monotonic in the key.

    low, per_unit: as in `per_unit_of`, 0 where any value is not finite. SCALE: bins of a unit. top: the last bin.
    """
    place = (values - low) * per_unit * SCALE
    return tl.where(place > 0.0, tl.minimum(place, top), 0.0)


@triton.jit
def per_unit_of(units, least, greatest):
    """`units` divided by the range between two keys; never infinite, 0 if the range is infinite or NaN."""
    per_unit = tl.div_rn(units, key_value(greatest) - key_value(least))
    return tl.where(per_unit == per_unit, tl.minimum(per_unit, 3.4028234e38), 0.0)


@triton.jit
def grid_barrier(counter):
    """Grid-wide barrier: waits for all programs, which must run concurrently; then the writes of each are visible."""
    tl.debug_barrier()
    programs = tl.num_programs(0)
    old = tl.atomic_add(counter, 1, sem="acq_rel")
    seen = old + 1
    while seen < (old // programs + 1) * programs:
        seen = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def fold_least(numbers, count, CHUNK: tl.constexpr):
    """The least of `count` int32, or of float32 that hold their bits."""
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
    """The sum of `count` float32, or of int32 that hold their bits, in an order that depends only on `count`."""
    lanes = tl.arange(0, CHUNK)
    found = tl.zeros([CHUNK], tl.float32)
    for start in range(0, count, CHUNK):
        bits = tl.load(numbers + start + lanes, mask=start + lanes < count, other=0)
        found += bits.to(tl.float32, bitcast=True)
    return tl.sum(found, 0)
