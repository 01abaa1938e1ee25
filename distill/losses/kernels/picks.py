"""The radix select's work between its passes over the pixels (select.py), context by context: device functions.

pick_first finds the bin of equal width that contains the median, and that bin's keys; pick_next the bin of a digit;
moments, after the last digit, the median and the mean deviation from it. The sum of distances from the bin's least
value becomes that from the median by the numbers of pixels above and below; inside the bin the histogram gives every
value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distill.losses.kernels.keys import bin_of, fold_sum, key_value, per_unit_of, raised, word


@triton.jit
def _parts_of(context, LEVELS: tl.constexpr, FIRSTS: tl.constexpr, NUMBER: tl.constexpr, FINEST: tl.constexpr):
    """A context's first finest part, and one past its last."""
    start, stop = 0, FINEST
    for i in tl.static_range(NUMBER):
        k = context - ((FIRSTS >> (8 * i)) & 255)
        mine = (k >= 0) & (k < ((LEVELS >> (8 * i)) & 255))
        width = FINEST // ((LEVELS >> (8 * i)) & 255)
        start = tl.where(mine, k * width, start)
        stop = tl.where(mine, (k + 1) * width, stop)
    return start, stop


@triton.jit
def _nearest(number):
    """A float32 rounded to int32, halves to even."""
    down = tl.floor(number)
    odd = (down.to(tl.int32) & 1) == 1
    up = (number - down > 0.5) | ((number - down == 0.5) & odd)
    return down.to(tl.int32) + up.to(tl.int32)


@triton.jit
def _bits(distance):
    """The number of bits of a uint32, or one more: the float's exponent, where rounding can carry."""
    return tl.maximum((distance.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)


@triton.jit
def _keys_below(least, span, low, per_unit, SCALE: tl.constexpr, top, limit):
    """The number (uint32) of keys from `least` to `least + span` whose bin is below `limit`."""
    one, bit = tl.full([], 1, tl.uint32), tl.full([], 0x80000000, tl.uint32)
    below = tl.full([], 0, tl.uint32)
    for _ in range(32):
        more = below + bit
        value = raised(least, (more - one).to(tl.int32, bitcast=True))
        fits = (more - one <= span) & (bin_of(value, low, per_unit, SCALE, top) < limit)
        below = tl.where(fits, more, below)
        bit = bit >> one
    return below


@triton.jit
def pick_first(
    histograms, header, states, context, m,
    KEEP: tl.constexpr, LEVELS: tl.constexpr, FIRSTS: tl.constexpr, NUMBER: tl.constexpr, CONTEXTS: tl.constexpr,
    FINEST: tl.constexpr, PARTS: tl.constexpr, FIRST_BINS: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """KEEP: 0 selects the lower median; otherwise the last of this fraction of the pixels in ascending order."""
    each: tl.constexpr = FIRST_BINS // PARTS
    start, stop = _parts_of(context, LEVELS, FIRSTS, NUMBER, FINEST)
    bins = tl.arange(0, FIRST_BINS)
    is_label = m == 0
    mine = is_label & (bins >= start * each) & (bins < stop * each)
    numbers = tl.load(histograms + bins, mask=mine, other=0)
    for k in tl.static_range(FINEST):
        mine = (m == 1) & (k >= start) & (k < stop) & (bins < each)
        numbers += tl.load(histograms + FIRST_BINS + k * each + bins, mask=mine, other=0)
    count = tl.sum(numbers, 0)
    rank = tl.maximum(count - 1, 0) // 2
    if KEEP > 0:
        rank = tl.maximum(_nearest(count.to(tl.float32) * KEEP), 1) - 1
    digit = tl.minimum(tl.sum((tl.cumsum(numbers, 0) <= rank).to(tl.int32), 0), FIRST_BINS - 1)
    rank -= tl.sum(tl.where(bins < digit, numbers, 0), 0)
    least, greatest = word(header, 4 + 2 * m), word(header, 5 + 2 * m)
    span = (greatest - least).to(tl.uint32, bitcast=True)
    per_unit = tl.where(is_label, tl.load(header + 2), per_unit_of(1.0, least, greatest))
    top = tl.where(is_label, FINEST * each - 1.0, each - 1.0)
    below = _keys_below(least, span, key_value(least), per_unit, each, top, digit)
    within = _keys_below(least, span, key_value(least), per_unit, each, top, digit + 1) - below
    last = tl.where(count > 0, (within - 1).to(tl.int32, bitcast=True), 0)
    state = states + context
    tl.store(state, least + below.to(tl.int32, bitcast=True))
    tl.store(state + 1 * CONTEXTS, last)
    tl.store(state + 2 * CONTEXTS, tl.maximum(_bits(last.to(tl.uint32, bitcast=True)) - BITS, 0))
    tl.store(state + 3 * CONTEXTS, rank)
    tl.store(state + 4 * CONTEXTS, tl.sum(tl.where(bins == digit, numbers, 0), 0))
    tl.store(state + 5 * CONTEXTS, count)


@triton.jit
def _digit_of(histogram, state, CONTEXTS: tl.constexpr, BINS: tl.constexpr):
    """Counts (BINS), the number of pixels with the bin's least key, the median's digit (-1: that key), and its rank."""
    numbers = tl.load(histogram + tl.arange(0, BINS))
    rank = tl.load(state + 3 * CONTEXTS)
    least = tl.load(state + 4 * CONTEXTS) - tl.sum(numbers, 0)
    digit = tl.sum((tl.cumsum(numbers, 0) <= rank - least).to(tl.int32), 0)
    digit = tl.where(rank < least, -1, tl.minimum(digit, BINS - 1))
    return numbers, least, digit, rank


@triton.jit
def pick_next(histogram, state, CONTEXTS: tl.constexpr, BINS: tl.constexpr, NEXT_BITS: tl.constexpr):
    """Updates the state after a digit."""
    numbers, number, digit, rank = _digit_of(histogram, state, CONTEXTS, BINS)
    bins = tl.arange(0, BINS)
    least, shift = tl.load(state), tl.load(state + 2 * CONTEXTS)
    last = tl.load(state + 1 * CONTEXTS).to(tl.uint32, bitcast=True)
    up = (digit.to(tl.uint32, bitcast=True) << shift.to(tl.uint32, bitcast=True)).to(tl.uint32)
    width = (tl.full([], 1, tl.uint32) << shift.to(tl.uint32, bitcast=True)) - 1
    width = tl.minimum(width, last - 1 - up)
    is_least = digit < 0
    width = tl.where(is_least | (last == 0), 0, width.to(tl.int32, bitcast=True))
    tl.debug_barrier()
    tl.store(state, tl.where(is_least, least, least + 1 + up.to(tl.int32, bitcast=True)))
    tl.store(state + 1 * CONTEXTS, width)
    tl.store(state + 2 * CONTEXTS, tl.maximum(_bits(width.to(tl.uint32, bitcast=True)) - NEXT_BITS, 0))
    before = number + tl.sum(tl.where(bins < digit, numbers, 0), 0)
    tl.store(state + 3 * CONTEXTS, tl.where(is_least, rank, rank - before))
    tl.store(state + 4 * CONTEXTS, tl.where(is_least, number, tl.sum(tl.where(bins == digit, numbers, 0), 0)))


@triton.jit
def moments(
    histogram, state, sums, row, header, pieces, m, min_pixels, floor,
    CONTEXTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Writes a map's rows of a context's statistics (select.py), from a digit whose bins hold one key each."""
    numbers, number, digit, rank = _digit_of(histogram, state, CONTEXTS, BINS)
    bins = tl.arange(0, BINS)
    least, inside, count = tl.load(state), tl.load(state + 4 * CONTEXTS), tl.load(state + 5 * CONTEXTS)
    base, values = key_value(least), raised(least, bins + 1)
    median = tl.where(digit < 0, base, raised(least, digit + 1))
    below = tl.maximum(count - 1, 0) // 2 - rank
    above = count - below - inside
    near = tl.abs(values - median) - (values - base)
    near = tl.where(numbers > 0, near * numbers.to(tl.float32), 0.0)
    moved = tl.where(digit < 0, 0.0, (median - base) * (below - above + number).to(tl.float32))
    total = fold_sum(sums, pieces, CHUNK) + moved + tl.sum(near, 0)
    deviation = tl.where(count > 0, tl.div_rn(total, tl.maximum(count, 1).to(tl.float32)), 0.0)
    below += tl.where(digit < 0, 0, number) + tl.sum(tl.where(bins < digit, numbers, 0), 0)
    equal = tl.where(digit < 0, number, tl.sum(tl.where(bins == digit, numbers, 0), 0))
    tl.store(row + 2 * m * CONTEXTS, tl.where(count > 0, median, 0.0))
    tl.store(row + (2 * m + 1) * CONTEXTS, deviation)
    if m == 0:
        shaped = deviation > tl.load(header + 3)
        live = shaped & (count >= min_pixels)
        tl.store(row + 4 * CONTEXTS, live.to(tl.float32))
        tl.store(row + 5 * CONTEXTS, shaped.to(tl.float32))
        tl.store(row + 6 * CONTEXTS, count.to(tl.float32))
        tl.store(row + 11 * CONTEXTS, tl.where(live, tl.div_rn(1.0, tl.where(live, deviation, 1.0)), 0.0))
    else:
        tl.store(row + 7 * CONTEXTS, (count - 2 * below - equal).to(tl.float32))
        tl.store(row + 12 * CONTEXTS, tl.div_rn(1.0, tl.where(deviation < floor, floor, deviation)))
