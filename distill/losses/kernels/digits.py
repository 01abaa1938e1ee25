"""The passes over the pixels of the radix select (select.py): device functions, each for one piece of an image.

    count_first  in which of FIRST_BINS equal bins each value lies: histograms of the finest parts of the label's range
    count_next   of the pixels in a context's bin, a digit of their key's distance from the bin's least

A bin of equal width is a run of keys too, so that both say the same order. A pixel that has its bin's least key is not
counted: how many do is what the other counts lack. Sky and a clamped prediction are such, a third of an image at one
address otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distill.losses.kernels.keys import (
    bin_of,
    fold_greatest,
    fold_least,
    key_value,
    label_of,
    order_key,
    own,
    per_unit_of,
    spread,
    table,
    word,
)

# By ballots of a warp in one Triton, by shared memory in another: in the first each further bin costs.
FIRST_BINS = 256
# Of the digits after: a float's key has at most 32 bits, and what does not touch zero 23 after the first bin.
BITS = (12, 11, 10)
# Words of a context's state, for each map: its bin's least key; how far above it the greatest key lies; the shift of
# the next digit, DONE where there is none; the median's rank in the bin; the pixels of the bin, and of the context.
STATE = 6
DONE = 31


@triton.jit
def header_of(
    ranges, header, piece, pieces, pixels, flat,
    MAPS: tl.constexpr, GATE: tl.constexpr, FINEST: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """From the pieces' ranges an image's header, which the first piece writes down. Gives its first five words."""
    least, greatest = fold_least(ranges, pieces, CHUNK), fold_greatest(ranges + pieces, pieces, CHUNK)
    low, high = key_value(least), key_value(greatest)
    threshold = flat * tl.maximum(tl.abs(low), tl.abs(high))
    counts = least <= greatest
    if GATE:
        counts = counts & (high - low > threshold)
    limit = tl.where(counts, pixels, 0)
    per_unit = per_unit_of(FINEST * 1.0, least, greatest)
    pred_least, pred_greatest = least, greatest
    if MAPS == 2:
        pred_least = fold_least(ranges + 2 * pieces, pieces, CHUNK)
        pred_greatest = fold_greatest(ranges + 3 * pieces, pieces, CHUNK)
    if piece == 0:
        tl.store(header, limit.to(tl.float32, bitcast=True))
        tl.store(header + 1, low)
        tl.store(header + 2, per_unit)
        tl.store(header + 3, threshold)
        tl.store(header + 4, least.to(tl.float32, bitcast=True))
        tl.store(header + 5, greatest.to(tl.float32, bitcast=True))
        tl.store(header + 6, pred_least.to(tl.float32, bitcast=True))
        tl.store(header + 7, pred_greatest.to(tl.float32, bitcast=True))
        tl.store(header + 8, 0.0)
    return limit, low, per_unit, key_value(pred_least), per_unit_of(1.0, pred_least, pred_greatest)


@triton.jit
def count_first(
    pred, target, valid, ranges, histograms, header, piece, pieces, pixels, length, flat,
    MAPS: tl.constexpr, CHECK: tl.constexpr, FINEST: tl.constexpr, PARTS: tl.constexpr, FIRST_BINS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The label's bins cut each finest part alike; the prediction's the whole of its range, for each part anew."""
    limit, low, per_unit, pred_low, pred_unit = header_of(
        ranges, header, piece, pieces, pixels, flat, MAPS, CHECK, FINEST, CHUNK
    )  # fmt: skip
    each: tl.constexpr = FIRST_BINS // PARTS
    labels, preds = tl.zeros([FIRST_BINS], tl.int32), tl.zeros([FIRST_BINS], tl.int32)
    limit = tl.minimum(limit, (piece + 1) * length)
    for start in range(piece * length, limit, BLOCK):
        at = start + tl.arange(0, BLOCK)
        label, inside, _ = label_of(target, valid, at, limit, low, per_unit, CHECK)
        bins = bin_of(label, low, per_unit, each, FINEST * each - 1.0).to(tl.int32)
        labels += tl.histogram(bins, FIRST_BINS, mask=inside)
        if MAPS == 2:
            values = tl.load(pred + at, mask=at < limit, other=0.0)
            first = bins & (FIRST_BINS - each)
            bins = first + bin_of(values, pred_low, pred_unit, each, each - 1.0).to(tl.int32)
            preds += tl.histogram(bins, FIRST_BINS, mask=inside)
    bins = tl.arange(0, FIRST_BINS)
    tl.atomic_add(histograms + bins, labels, mask=labels > 0, sem="relaxed")
    if MAPS == 2:
        tl.atomic_add(histograms + FIRST_BINS + bins, preds, mask=preds > 0, sem="relaxed")


@triton.jit
def zeros(NUMBER: tl.constexpr, WIDTH: tl.constexpr):
    """NUMBER sums of each thread."""
    sums = ()
    for _ in tl.static_range(NUMBER):
        sums = sums + (tl.zeros([WIDTH], tl.float32),)  # type: ignore[assignment]
    return sums


@triton.jit
def columns(values, WIDTH: tl.constexpr):
    """Each thread's sum of a block that has lines of WIDTH, a value of it for each thread."""
    return tl.sum(tl.reshape(values, [values.shape[0] // WIDTH, WIDTH]), 0)


@triton.jit
def added(
    sums, values, share, inside,
    START: tl.constexpr, NUMBER: tl.constexpr, LEVEL: tl.constexpr, FINEST: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The NUMBER sums with `values` added by their contexts of a level, whose first is number START."""
    out = ()
    for c in tl.static_range(NUMBER):
        each = sums[c]
        if c >= START and c < START + LEVEL:
            each += columns(tl.where(own(share, inside, c - START, LEVEL, FINEST), values, 0.0), WIDTH)
        out = out + (each,)  # type: ignore[assignment]
    return out


@triton.jit
def _count_level(
    key, share, least, last, shift, histograms,
    BITS: tl.constexpr, LEVEL: tl.constexpr, FIRST: tl.constexpr, FINEST: tl.constexpr
):  # fmt: skip
    """Counts the digits in a level's contexts; key: the pixels', less one."""
    distance = (key - spread(least, share, LEVEL, FIRST, FINEST)).to(tl.uint32, bitcast=True)
    mine = distance < spread(last, share, LEVEL, FIRST, FINEST).to(tl.uint32, bitcast=True)
    context = tl.zeros_like(key) + FIRST
    for k in tl.static_range(1, LEVEL):
        context = tl.where(share >= k * (FINEST // LEVEL), FIRST + k, context)
    shift = spread(shift, share, LEVEL, FIRST, FINEST).to(tl.uint32, bitcast=True)
    bins = (context << BITS) + (distance >> shift).to(tl.int32)
    tl.atomic_add(histograms + bins, tl.full(bins.shape, 1, tl.int32), mask=mine, sem="relaxed")


@triton.jit
def count_next(
    pred, target, valid, states, histograms, sums, header, piece, pieces, length,
    BITS: tl.constexpr, SUMS: tl.constexpr, MAPS: tl.constexpr, CHECK: tl.constexpr, LEVELS: tl.constexpr,
    FIRSTS: tl.constexpr, NUMBER: tl.constexpr, CONTEXTS: tl.constexpr, FINEST: tl.constexpr, STATE: tl.constexpr,
    DONE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """SUMS: 1 to sum |value - m| of each context as well, whose bin's least value is m, for each piece; 2 to do so only
    where something is left to find.
    """
    limit = tl.minimum(word(header, 0), (piece + 1) * length)
    low, per_unit = tl.load(header + 1), tl.load(header + 2)
    total = zeros(MAPS * CONTEXTS if SUMS else 1, WIDTH)
    tables = ()
    for m in tl.static_range(MAPS):
        state = states + m * STATE * CONTEXTS
        least, last = table(state, CONTEXTS), table(state + CONTEXTS, CONTEXTS)
        each = least, last, table(state + 2 * CONTEXTS, CONTEXTS), word(header, 4 + 2 * m) - 1
        tables = tables + (each,)  # type: ignore[assignment]
    for start in range(piece * length, limit, TILE):
        at = start + tl.arange(0, TILE)
        label, inside, share = label_of(target, valid, at, limit, low, per_unit, CHECK)
        for m in tl.static_range(MAPS):
            values = label
            if m == 1:
                values = tl.load(pred + at, mask=at < limit, other=0.0)
            # The least of all is at most its bin's least, and what is that is not counted.
            key = tl.where(inside, order_key(values) - 1, tables[m][3])
            for i in tl.static_range(NUMBER):
                _count_level(
                    key, share, tables[m][0], tables[m][1], tables[m][2], histograms + ((m * CONTEXTS) << BITS),
                    BITS, (LEVELS >> (8 * i)) & 255, (FIRSTS >> (8 * i)) & 255, FINEST
                )  # fmt: skip
                if SUMS:
                    base = key_value(
                        spread(tables[m][0], share, (LEVELS >> (8 * i)) & 255, (FIRSTS >> (8 * i)) & 255, FINEST)
                    )
                    total = added(
                        total, tl.abs(values - base), share, inside,
                        m * CONTEXTS + ((FIRSTS >> (8 * i)) & 255), MAPS * CONTEXTS, (LEVELS >> (8 * i)) & 255, FINEST,
                        WIDTH
                    )  # fmt: skip
    if SUMS:
        for c in tl.static_range(MAPS * CONTEXTS):
            shift = tl.load(states + ((c // CONTEXTS) * STATE + 2) * CONTEXTS + c % CONTEXTS)
            bits = tl.sum(total[c], 0).to(tl.int32, bitcast=True)
            tl.store(sums + c * pieces + piece, bits, mask=(shift != DONE) | (SUMS == 1))
