"""The passes over the pixels of the radix select (select.py): device functions, each for one piece of an image.

    count_first  histograms of the values in FIRST_BINS bins of equal width, for the finest parts of the label's range
    count_next   for the pixels in a context's bin, histograms of a digit of their key's distance from the bin's least

A bin of equal width is a run of keys too, so that both passes agree on the order. Pixels with their bin's least key are
not counted: their number is the bin's total minus the other counts. Sky and clamped predictions have such keys;
counting them would send a third of an image's atomics to one address.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distill.losses.kernels.keys import (
    bin_of,
    fold_greatest,
    fold_least,
    in_context,
    key_value,
    label_of,
    order_key,
    per_unit_of,
    spread,
    table,
    word,
)

# One Triton version counts with warp ballots, where each bin costs time, another in shared memory.
FIRST_BINS = 256
# Of the digits after that: a float's key has at most 32 bits, of which 23 are left after the first bin unless that bin
# touches zero.
BITS = (12, 11, 10)
# Words of a context's state, for each map: its bin's least key; the greatest key's distance from it; the shift of the
# next digit, or DONE if there is none; the median's rank in the bin; the pixels of the bin, and of the context.
STATE = 6
DONE = 31


@triton.jit
def header_of(
    ranges, header, piece, pieces, pixels, flat,
    MAPS: tl.constexpr, GATE: tl.constexpr, FINEST: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Computes an image's header from the pieces' ranges; the first piece stores it. Returns the limit, and least value
    and bins per unit of the label and of the prediction.
    """
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
    """The label's bins divide each finest part equally; the prediction's divide its whole range, for each part."""
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
    """NUMBER sums per thread, all 0."""
    sums = ()
    for _ in tl.static_range(NUMBER):
        sums = sums + (tl.zeros([WIDTH], tl.float32),)  # type: ignore[assignment]
    return sums


@triton.jit
def columns(values, WIDTH: tl.constexpr):
    """Each thread's sum over its column of a block with lines of WIDTH."""
    return tl.sum(tl.reshape(values, [values.shape[0] // WIDTH, WIDTH]), 0)


@triton.jit
def added(
    sums, values, share, inside,
    START: tl.constexpr, NUMBER: tl.constexpr, LEVEL: tl.constexpr, FINEST: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The NUMBER sums with `values` added to those of their contexts of a level, whose first context is START."""
    out = ()
    for c in tl.static_range(NUMBER):
        each = sums[c]
        if c >= START and c < START + LEVEL:
            each += columns(tl.where(in_context(share, inside, c - START, LEVEL, FINEST), values, 0.0), WIDTH)
        out = out + (each,)  # type: ignore[assignment]
    return out


@triton.jit
def _count_level(
    key, share, least, last, shift, histograms,
    BITS: tl.constexpr, LEVEL: tl.constexpr, FIRST: tl.constexpr, FINEST: tl.constexpr
):  # fmt: skip
    """Counts the digits in a level's contexts. key: the pixels' keys minus one."""
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
    """SUMS: 1 to also sum |value - m| over each context, for each piece, m being its bin's least value; 2 to store
    these sums only for contexts that are not done.
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
            # The image's least key is at most any bin's least, and pixels with that key are not counted.
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
