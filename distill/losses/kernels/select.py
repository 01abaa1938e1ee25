"""Medians and mean deviations of every context of a label and of a prediction, exactly, by a radix select.

Seven launches for a whole batch, none of which waits for the host:

    range    least and greatest key of both maps; clears the histograms
    first    histograms of the keys' first digit, for each finest part of the label's range
    pick     each context adds up its parts' histograms: in which bin its median lies
    second   histograms of the second digit, of the pixels in that bin
    pick     the same again
    third    histograms of the last digit; the sum of |x - m| outside the bin, m being the bin's least value
    moments  the median, and the mean deviation from it: what is inside the bin is known value by value from its
             histogram, and the sum outside moves with m by the number of pixels above and below

Digits are of the distance from the least key of the image, so that the first one spreads however the maps are scaled.
Many pixels can share the least value (sky, a clamped prediction): they are counted block by block instead of one by
one. Histograms are integers, and sums of floats are added in a fixed order: the same bits every time.

Shapes: B images, N pixels of each, C contexts, F finest parts; maps: the label and, where asked for, the prediction.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.losses.kernels.keys import (
    BINS,
    HEADER,
    LAST_BINS,
    Cut,
    above_least,
    fold_greatest,
    fold_least,
    fold_sum,
    header_of,
    key_value,
    label_of,
    order_key,
    raised,
    spread,
)
from distill.losses.kernels.launch import Launcher

WHOLE = Cut((1,))
BLOCK = 2048
CHUNK = 256
# Multiplications and additions are not fused: where label and prediction are equal their difference is 0.
HOW = {"num_warps": 8, "enable_fp_fusion": False}
# Left alone, the compiler spends so many registers on these that one block fills a multiprocessor.
CROWDED = {**HOW, "maxnreg": 128}
# Rows of a context's statistics, float32 each: the four, 1.0 where it is live, 1.0 where its label is not flat (however
# few its pixels), their number, and how many more of the prediction's lie above its median than below. The loss and
# its gradient (contexts.py) add three.
LABEL_MEDIAN, LABEL_DEVIATION, MEDIAN, DEVIATION, LIVE, SHAPED, COUNT, BALANCE = range(8)
ROWS = 11


@triton.jit(do_not_specialize=["blocks"])
def _range(
    pred, target, valid, ranges, histograms, pixels, blocks,
    MAPS: tl.constexpr, CHECK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    there = at < pixels
    label = tl.load(target + image * pixels + at, mask=there, other=0.0)
    inside = there & (tl.load(valid + image * pixels + at, mask=there, other=0) != 0)
    if CHECK:
        inside = inside & (tl.abs(label) < float("inf"))
    out = ranges + image * (MAPS * 2) * blocks + block
    for m in tl.static_range(MAPS):
        keys = order_key(label)
        if m == 1:
            keys = order_key(tl.load(pred + image * pixels + at, mask=there, other=0.0))
        tl.store(out + (2 * m) * blocks, tl.min(tl.where(inside, keys, 0x7FFFFFFF), 0))
        tl.store(out + (2 * m + 1) * blocks, tl.max(tl.where(inside, keys, -0x80000000), 0))
    for start in range(block * BLOCK, SIZE, blocks * BLOCK):
        bins = start + tl.arange(0, BLOCK)
        tl.store(histograms + image * SIZE + bins, tl.zeros([BLOCK], tl.int32), mask=bins < SIZE)


@triton.jit
def _shifts(least, greatest):
    """By how much a distance from the least key is shifted for the first, and for the first two digits."""
    distance = greatest.to(tl.uint32, bitcast=True) - least.to(tl.uint32, bitcast=True)
    # The exponent of a float says how many bits a number has, or one more where rounding carries.
    bits = (distance.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    return tl.maximum(bits - 12, 0), tl.maximum(bits - 24, 0)


@triton.jit
def _count_first(keys_above, shift, inside, part, histogram, lows, BINS: tl.constexpr, FINEST: tl.constexpr):
    """Adds the pixels of each finest part to its histogram; those with the least key to `lows` instead."""
    least = inside & (keys_above == 0)
    bins = part * BINS + (keys_above >> shift).to(tl.int32)
    tl.atomic_add(histogram + bins, tl.full(bins.shape, 1, tl.int32), mask=inside & (keys_above != 0), sem="relaxed")
    for k in tl.static_range(FINEST):
        number = tl.sum((least & (part == k)).to(tl.int32), 0)
        tl.atomic_add(lows + k, number, mask=number > 0, sem="relaxed")


# Where `pixels` is not specialized, loads are one value a thread: the layout that scattered additions have, so that
# nothing is exchanged between threads before each of them.
@triton.jit(do_not_specialize=["pixels", "blocks"])
def _first(
    pred, target, valid, ranges, headers, histograms, pixels, blocks, flat,
    MAPS: tl.constexpr, CHECK: tl.constexpr, GATE: tl.constexpr, FINEST: tl.constexpr, SIZE: tl.constexpr,
    LOWS: tl.constexpr, BINS: tl.constexpr, HEADER: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ranges += image * (MAPS * 2) * blocks
    header, histogram = headers + image * HEADER, histograms + image * SIZE
    least = fold_least(ranges, blocks, CHUNK)
    greatest = fold_greatest(ranges + blocks, blocks, CHUNK)
    low, high = key_value(least), key_value(greatest)
    threshold = flat * tl.maximum(tl.abs(low), tl.abs(high))
    counts = least <= greatest
    if GATE:
        counts = counts & (high - low > threshold)
    limit = tl.where(counts, pixels, 0)
    per_unit = tl.div_rn(FINEST * 1.0, high - low)
    at = block * BLOCK + tl.arange(0, BLOCK)
    label, inside, part = label_of(
        target + image * pixels, valid + image * pixels, at, pixels, limit, low, per_unit, FINEST, CHECK
    )  # fmt: skip
    if block == 0:
        tl.store(header, limit)
        tl.store(header + 1, low.to(tl.int32, bitcast=True))
        tl.store(header + 2, per_unit.to(tl.int32, bitcast=True))
        tl.store(header + 3, threshold.to(tl.int32, bitcast=True))
    for m in tl.static_range(MAPS):
        values = label
        if m == 1:
            values = tl.load(pred + image * pixels + at, mask=at < pixels, other=0.0)
            least = fold_least(ranges + 2 * blocks, blocks, CHUNK)
            greatest = fold_greatest(ranges + 3 * blocks, blocks, CHUNK)
        first, second = _shifts(least, greatest)
        if block == 0:
            tl.store(header + 4 + 3 * m, least)
            tl.store(header + 5 + 3 * m, first)
            tl.store(header + 6 + 3 * m, second)
        own, lows = histogram + m * FINEST * BINS, histogram + LOWS + m * FINEST
        _count_first(above_least(values, least), first, inside, part, own, lows, BINS, FINEST)


@triton.jit
def _parts_of(context, LEVELS: tl.constexpr, FIRSTS: tl.constexpr, NUMBER: tl.constexpr, FINEST: tl.constexpr):
    """The first finest part of a context, and the first that is no longer in it."""
    start, stop = context * 0, context * 0
    for i in tl.static_range(NUMBER):
        own = context >= ((FIRSTS >> (8 * i)) & 255)
        width = FINEST // ((LEVELS >> (8 * i)) & 255)
        start = tl.where(own, (context - ((FIRSTS >> (8 * i)) & 255)) * width, start)
        stop = tl.where(own, start + width, stop)
    return start, stop


@triton.jit
def _pick(
    headers, histograms, states,
    STAGE: tl.constexpr, KEEP: tl.constexpr, MAPS: tl.constexpr, LEVELS: tl.constexpr, FIRSTS: tl.constexpr,
    NUMBER: tl.constexpr, CONTEXTS: tl.constexpr, FINEST: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
    LOWS: tl.constexpr, BINS: tl.constexpr, HEADER: tl.constexpr
):  # fmt: skip
    """State of a context: the digits found so far, its rank among the pixels that share them, and number of pixels.

    KEEP: 0 for the lower median, else the rank is that of the last of this share of the pixels.
    """
    context, m, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    header, histogram = headers + image * HEADER, histograms + image * SIZE
    state = states + (image * MAPS + m) * 3 * CONTEXTS + context
    start, stop = _parts_of(context, LEVELS, FIRSTS, NUMBER, FINEST)
    bins, parts = tl.arange(0, BINS), start + tl.arange(0, PARTS)
    lowest = tl.sum(tl.load(histogram + LOWS + m * FINEST + parts, mask=parts < stop, other=0), 0)
    if STAGE == 1:
        each = histogram + (m * FINEST + parts[:, None]) * BINS + bins[None, :]
        numbers = tl.sum(tl.load(each, mask=parts[:, None] < stop, other=0), 0)
        numbers += tl.where(bins == 0, lowest, 0)
        count = tl.sum(numbers, 0)
        rank = tl.maximum(count - 1, 0) // 2
        if KEEP > 0:
            rank = tl.maximum(_nearest(count.to(tl.float32) * KEEP), 1) - 1
        prefix = 0
        tl.store(state + 2 * CONTEXTS, count)
    else:
        known = tl.load(state)
        rank = tl.load(state + CONTEXTS)
        numbers = tl.load(histogram + (MAPS * FINEST + m * CONTEXTS + context) * BINS + bins)
        numbers += tl.where((bins == 0) & (known == 0), lowest, 0)
        prefix = known << (tl.load(header + 5 + 3 * m) - tl.load(header + 6 + 3 * m))
    digit = tl.minimum(tl.sum((tl.cumsum(numbers, 0) <= rank).to(tl.int32), 0), BINS - 1)
    tl.store(state, prefix + digit)
    tl.store(state + CONTEXTS, rank - tl.sum(tl.where(bins < digit, numbers, 0), 0))


@triton.jit
def _nearest(number):
    """A float32 rounded to int32, halves to even."""
    down = tl.floor(number)
    odd = (down.to(tl.int32) & 1) == 1
    up = (number - down > 0.5) | ((number - down == 0.5) & odd)
    return down.to(tl.int32) + up.to(tl.int32)


@triton.jit
def _count_next(
    keys, known, shift, inside, part, state, histogram,
    BINS: tl.constexpr, LEVEL: tl.constexpr, FIRST: tl.constexpr, FINEST: tl.constexpr
):  # fmt: skip
    """Adds to the histograms of a level's contexts the digit of `keys` at `shift`, where the digits from `known` up
    are those found so far.
    """
    mine = inside & (keys != 0) & ((keys >> known).to(tl.int32) == spread(state, part, LEVEL, FIRST, FINEST))
    digit = (keys >> shift).to(tl.int32) & ((1 << (known - shift)) - 1)
    context = FIRST + part // (FINEST // LEVEL)
    ones = tl.full(digit.shape, 1, tl.int32)
    tl.atomic_add(histogram + context * BINS + digit, ones, mask=mine, sem="relaxed")


@triton.jit
def _sum_outside(
    values, keys, least, known, inside, part, state, sums, blocks,
    LEVEL: tl.constexpr, FIRST: tl.constexpr, FINEST: tl.constexpr
):  # fmt: skip
    """A block's sum of |value - m| of each context of a level, outside its bin, whose least value is m."""
    found = spread(state, part, LEVEL, FIRST, FINEST)
    distance = tl.abs(values - raised(least, found << known))
    distance = tl.where(inside & ((keys >> known).to(tl.int32) != found), distance, 0.0)
    for k in tl.static_range(LEVEL):
        own = tl.where(part // (FINEST // LEVEL) == k, distance, 0.0)
        tl.store(sums + (FIRST + k) * blocks, tl.sum(own, 0))


@triton.jit(do_not_specialize=["pixels", "blocks"])
def _next(
    pred, target, valid, headers, histograms, states, sums, pixels, blocks,
    STAGE: tl.constexpr, MAPS: tl.constexpr, CHECK: tl.constexpr, LEVELS: tl.constexpr, FIRSTS: tl.constexpr,
    NUMBER: tl.constexpr, CONTEXTS: tl.constexpr, FINEST: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
    BINS: tl.constexpr, LAST_BINS: tl.constexpr, HEADER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The second digit (STAGE 2), or the third with the sums outside its bin (STAGE 3)."""
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    header = headers + image * HEADER
    limit, low, per_unit = header_of(header)
    at = block * BLOCK + tl.arange(0, BLOCK)
    label, inside, part = label_of(
        target + image * pixels, valid + image * pixels, at, pixels, limit, low, per_unit, FINEST, CHECK
    )  # fmt: skip
    for m in tl.static_range(MAPS):
        values = label
        if m == 1:
            values = tl.load(pred + image * pixels + at, mask=at < pixels, other=0.0)
        least = tl.load(header + 4 + 3 * m)
        first, second = tl.load(header + 5 + 3 * m), tl.load(header + 6 + 3 * m)
        keys = above_least(values, least)
        state = states + (image * MAPS + m) * 3 * CONTEXTS
        histogram = histograms + image * SIZE + MAPS * FINEST * BINS
        for i in tl.static_range(NUMBER):
            if STAGE == 2:
                _count_next(
                    keys, first, second, inside, part, state, histogram + m * CONTEXTS * BINS,
                    BINS, (LEVELS >> (8 * i)) & 255, (FIRSTS >> (8 * i)) & 255, FINEST
                )  # fmt: skip
            else:
                _count_next(
                    keys, second, 0, inside, part, state,
                    histogram + MAPS * CONTEXTS * BINS + m * CONTEXTS * LAST_BINS,
                    LAST_BINS, (LEVELS >> (8 * i)) & 255, (FIRSTS >> (8 * i)) & 255, FINEST
                )  # fmt: skip
                _sum_outside(
                    values, keys, least, second, inside, part, state,
                    sums + (image * MAPS + m) * CONTEXTS * blocks + block, blocks,
                    (LEVELS >> (8 * i)) & 255, (FIRSTS >> (8 * i)) & 255, FINEST
                )  # fmt: skip


@triton.jit
def _moment(
    header, histogram, state, sums, blocks, lowest,
    CONTEXTS: tl.constexpr, LAST_BINS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Median, mean deviation from it, number of pixels, and by how much more of them lie above than below."""
    least, shift = tl.load(header), tl.load(header + 2)
    found, rank, count = tl.load(state), tl.load(state + CONTEXTS), tl.load(state + 2 * CONTEXTS)
    bins = tl.arange(0, LAST_BINS)
    numbers = tl.load(histogram + bins) + tl.where((bins == 0) & (found == 0), lowest, 0)
    digit = tl.minimum(tl.sum((tl.cumsum(numbers, 0) <= rank).to(tl.int32), 0), LAST_BINS - 1)
    values = raised(least, (found << shift) + bins)
    median = tl.sum(tl.where(bins == digit, values, 0.0), 0)
    below = tl.maximum(count - 1, 0) // 2 - rank
    above = count - below - tl.sum(numbers, 0)
    inside = tl.where(numbers > 0, tl.abs(values - median) * numbers.to(tl.float32), 0.0)
    moved = (median - raised(least, found << shift)) * (below - above).to(tl.float32)
    total = fold_sum(sums, blocks, CHUNK) + moved + tl.sum(inside, 0)
    deviation = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32))
    below += tl.sum(tl.where(bins < digit, numbers, 0), 0)
    equal = tl.sum(tl.where(bins == digit, numbers, 0), 0)
    some = count > 0
    return tl.where(some, median, 0.0), tl.where(some, deviation, 0.0), count, count - 2 * below - equal


@triton.jit(do_not_specialize=["blocks", "min_pixels"])
def _moments(
    headers, histograms, states, sums, statistics, blocks, min_pixels,
    MAPS: tl.constexpr, LEVELS: tl.constexpr, FIRSTS: tl.constexpr, NUMBER: tl.constexpr,
    CONTEXTS: tl.constexpr, FINEST: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, LOWS: tl.constexpr,
    BINS: tl.constexpr, LAST_BINS: tl.constexpr, HEADER: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The rows of a context's statistics that ROWS names, but the last three."""
    context, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    header, histogram = headers + image * HEADER, histograms + image * SIZE
    start, stop = _parts_of(context, LEVELS, FIRSTS, NUMBER, FINEST)
    parts = start + tl.arange(0, PARTS)
    row = statistics + image * ROWS * CONTEXTS + context
    for m in tl.static_range(MAPS):
        lowest = tl.sum(tl.load(histogram + LOWS + m * FINEST + parts, mask=parts < stop, other=0), 0)
        median, deviation, count, balance = _moment(
            header + 4 + 3 * m,
            histogram + MAPS * (FINEST + CONTEXTS) * BINS + (m * CONTEXTS + context) * LAST_BINS,
            states + (image * MAPS + m) * 3 * CONTEXTS + context,
            sums + ((image * MAPS + m) * CONTEXTS + context) * blocks,
            blocks, lowest, CONTEXTS, LAST_BINS, CHUNK
        )  # fmt: skip
        tl.store(row + 2 * m * CONTEXTS, median)
        tl.store(row + (2 * m + 1) * CONTEXTS, deviation)
        if m == 0:
            shaped = deviation > tl.load(header + 3).to(tl.float32, bitcast=True)
            tl.store(row + 4 * CONTEXTS, (shaped & (count >= min_pixels)).to(tl.float32))
            tl.store(row + 5 * CONTEXTS, shaped.to(tl.float32))
            tl.store(row + 6 * CONTEXTS, count.to(tl.float32))
        tl.store(row + 7 * CONTEXTS, balance.to(tl.float32))


@dataclass(frozen=True)
class Found:
    """statistics: (B,ROWS,C) float32. headers: (B,HEADER) int32. blocks: of BLOCK pixels to an image."""

    statistics: Tensor
    headers: Tensor
    blocks: int


@functools.lru_cache(maxsize=64)
def _kernels(cut: Cut, maps: int, label: bool, keep: float, block: int) -> tuple[int, dict[str, Launcher]]:
    """Words of an image's histograms, and the kernels for it, in the order of their launches."""
    finest = max(cut.levels)
    lows = maps * ((finest + cut.contexts) * BINS + cut.contexts * LAST_BINS)
    size = {"SIZE": lows + maps * finest, "MAPS": maps}
    visit, digits = {"CHECK": label, "BLOCK": block, **size}, {"BINS": BINS, "HEADER": HEADER}
    first = visit | digits | {"GATE": label, "FINEST": finest, "LOWS": lows, "CHUNK": CHUNK, **HOW}
    pick = size | digits | {"KEEP": keep, "LOWS": lows, **cut.constants, **HOW}
    more = visit | digits | {"LAST_BINS": LAST_BINS, **cut.constants, **CROWDED}
    moments = {"LOWS": lows, "LAST_BINS": LAST_BINS, "ROWS": ROWS, "CHUNK": CHUNK, **cut.constants, **HOW}
    return lows + maps * finest, {
        "range": Launcher(_range, visit | HOW),
        "first": Launcher(_first, first),
        "pick first": Launcher(_pick, pick | {"STAGE": 1}),
        "second": Launcher(_next, more | {"STAGE": 2}),
        "pick second": Launcher(_pick, pick | {"STAGE": 2}),
        "third": Launcher(_next, more | {"STAGE": 3}),
        "moments": Launcher(_moments, size | digits | moments),
    }


def find(
    target: Tensor,
    pred: Tensor | None,
    valid: Tensor,
    cut: Cut,
    *,
    flat: float = 0.0,
    min_pixels: int = 1,
    label: bool = True,
    keep: float = 0.0,
) -> Found:
    """Statistics of every context of each image; of `target` alone where `pred` is None.

    target, pred: (B,N) float32. valid: (B,N) uint8. All contiguous and on one device. label: target is a label: where
    it is not finite it does not count, nor does an image where its range is below `flat` of its magnitude. keep: see
    `_pick`; deviations mean nothing then.
    """
    (images, pixels), maps = target.shape, 1 if pred is None else 2
    blocks, (size, kernels) = -(-pixels // BLOCK), _kernels(cut, maps, label, keep, BLOCK)

    def space(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty((images, *shape), dtype=dtype, device=target.device)

    ranges, headers, histograms = space(maps * 2, blocks), space(HEADER), space(size)
    states, sums = space(maps, 3, cut.contexts), space(maps, cut.contexts, blocks, dtype=torch.float32)
    statistics = space(ROWS, cut.contexts, dtype=torch.float32)
    images_of = (target if pred is None else pred, target, valid)
    each = (*images_of, headers, histograms, states, sums, pixels, blocks)
    grid, contexts = (blocks, images), (cut.contexts, maps, images)
    kernels["range"](grid, *images_of, ranges, histograms, pixels, blocks)
    kernels["first"](grid, *images_of, ranges, headers, histograms, pixels, blocks, flat)
    kernels["pick first"](contexts, headers, histograms, states)
    kernels["second"](grid, *each)
    kernels["pick second"](contexts, headers, histograms, states)
    kernels["third"](grid, *each)
    kernels["moments"]((cut.contexts, images), headers, histograms, states, sums, statistics, blocks, min_pixels)
    return Found(statistics, headers, blocks)


def median_and_mean_abs_dev(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Median and mean deviation, (B,) each, no gradient. values: (B,N) float32, valid: (B,N) uint8, contiguous."""
    statistics = find(values, None, valid, WHOLE, label=False).statistics[:, :, 0]
    return statistics[:, LABEL_MEDIAN], statistics[:, LABEL_DEVIATION]
