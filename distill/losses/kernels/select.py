"""Medians and mean deviations of every context of a label and of a prediction, exactly, by a radix select.

Two launches for a whole batch, neither of which waits for the host:

    range    least and greatest key of both maps, piece by piece; clears the histograms
    select   eight steps, after each of which all programs synchronize:
      0      histograms of bins of equal width, for each finest part of the label's range
      1      each context adds up its parts' histograms and finds its median's bin and that bin's keys
      2, 3   histograms of a digit of the distance from the bin's least key, for the pixels in that bin; the digit's bin
      4, 5   the next digit, and the sum of |x - m|, m being the bin's least value; if this digit was the last one,
             median and mean deviation
      6, 7   the same for bins so wide that a digit is left: those that touch zero, or those of an image whose outlier
             puts all other values in one bin. Usually there are none, and the steps are skipped

Passes over pixels are in digits.py, the work per context in between in picks.py. Histograms are integers, and floats
are summed in a fixed order, so that results are bitwise deterministic.

Programs that synchronize must run concurrently: a cooperative launch of as many as the card holds, which loop over
pieces of images. Where that is impossible (Triton's interpreter runs programs one after another), SEPARATE_LAUNCHES
gives each step a launch. Shapes: B images, N pixels of each, C contexts, F finest parts; maps: the label and,
optionally, the prediction.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.core.launch import Grid, Launcher
from distill.losses.kernels.digits import BITS, DONE, FIRST_BINS, STATE, count_first, count_next
from distill.losses.kernels.keys import HEADER, WIDTH, Cut, grid_barrier, order_key, tile
from distill.losses.kernels.picks import moments, pick_first, pick_next

WHOLE = Cut((1,))
BLOCK = 2048
# Pieces of an image consist of whole grains; no image has more pieces than CHUNK, so one load reads a number of each.
GRAIN = 512
CHUNK = 256
# Words of the scratch before the images': the barrier's counter, and the contexts that are left after step 5.
COUNTERS = 16
# Launch each step separately.
SEPARATE_LAUNCHES = False
# Multiplications and additions are not fused, so that equal label and prediction have the difference 0.
HOW = {"num_warps": 8, "enable_fp_fusion": False}
# Without this limit the compiler uses so many registers that one block fills a multiprocessor.
CROWDED = {**HOW, "maxnreg": 128}
# Programs of 256 threads that then fit into a multiprocessor's 65536 registers.
PROGRAMS_EACH = 2
# Rows of a context's statistics, float32 each: the four medians and deviations; 1.0 if it is live; 1.0 if its label is
# not flat (however few its pixels); the number of pixels; how many more of the prediction's pixels lie above its median
# than below. Three rows are written by the loss and its gradient (contexts.py). Then 1 / the label's deviation, 0 if
# the context is not live, and 1 / the prediction's, clamped to at least FLOOR; the first pixel at the median (int32, by
# contexts.py). The image's header follows.
LABEL_MEDIAN, LABEL_DEVIATION, MEDIAN, DEVIATION, LIVE, SHAPED, COUNT, BALANCE = range(8)
ROWS = 14


@triton.jit(do_not_specialize=["pixels", "length", "pieces", "size"])
def _range(
    pred, target, valid, scratch, pixels, length, pieces, size,
    MAPS: tl.constexpr, CHECK: tl.constexpr, CLEARED: tl.constexpr, RANGES: tl.constexpr, COUNTERS: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    piece, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    counters = tl.arange(0, COUNTERS)
    tl.store(scratch + counters, tl.zeros_like(counters), mask=counters < tl.where(piece + image == 0, COUNTERS, 0))
    area = scratch + COUNTERS + image * size
    least, greatest = tl.full([WIDTH], 0x7FFFFFFF, tl.int32), tl.full([WIDTH], -0x80000000, tl.int32)
    pred_least, pred_greatest = least, greatest
    limit = tl.minimum(pixels, (piece + 1) * length)
    for start in range(piece * length, limit, BLOCK):
        at = tile(start, BLOCK, WIDTH)
        label = tl.load(target + image * pixels + at, mask=at < limit, other=0.0)
        inside = tl.load(valid + image * pixels + at, mask=at < limit, other=0) != 0
        if CHECK:
            inside = inside & (tl.abs(label) < float("inf"))
        keys = order_key(label)
        least = tl.minimum(least, tl.min(tl.where(inside, keys, 0x7FFFFFFF), 0))
        greatest = tl.maximum(greatest, tl.max(tl.where(inside, keys, -0x80000000), 0))
        if MAPS == 2:
            keys = order_key(tl.load(pred + image * pixels + at, mask=at < limit, other=0.0))
            pred_least = tl.minimum(pred_least, tl.min(tl.where(inside, keys, 0x7FFFFFFF), 0))
            pred_greatest = tl.maximum(pred_greatest, tl.max(tl.where(inside, keys, -0x80000000), 0))
    out = area + RANGES + piece
    tl.store(out, tl.min(least, 0))
    tl.store(out + pieces, tl.max(greatest, 0))
    if MAPS == 2:
        tl.store(out + 2 * pieces, tl.min(pred_least, 0))
        tl.store(out + 3 * pieces, tl.max(pred_greatest, 0))
    for start in range(piece * BLOCK, CLEARED, pieces * BLOCK):
        bins = tile(start, BLOCK, WIDTH)
        tl.store(area + bins, tl.zeros_like(bins), mask=bins < CLEARED)


@triton.jit
def _count(
    pred, target, valid, scratch, statistics, images, pixels, length, pieces, size, flat,
    STEP: tl.constexpr, MAPS: tl.constexpr, CHECK: tl.constexpr, LEVELS: tl.constexpr, FIRSTS: tl.constexpr,
    NUMBER: tl.constexpr, CONTEXTS: tl.constexpr, FINEST: tl.constexpr, PARTS: tl.constexpr, SECOND: tl.constexpr,
    THIRD: tl.constexpr, STATES: tl.constexpr, RANGES: tl.constexpr, STRIDE: tl.constexpr, HEADER_AT: tl.constexpr,
    FIRST_BINS: tl.constexpr, BITS: tl.constexpr, NEXT_BITS: tl.constexpr, STATE: tl.constexpr, DONE: tl.constexpr,
    COUNTERS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """A step over the pixels."""
    for item in range(tl.program_id(0), images * pieces, tl.num_programs(0)):
        piece, image = item % pieces, tl.cast(item // pieces, tl.int64)
        area, header = scratch + COUNTERS + image * size, statistics + image * STRIDE + HEADER_AT
        ranges, states, start = area + RANGES, area + STATES, image * pixels
        sums = ranges + 2 * MAPS * pieces
        if STEP == 0:
            count_first(
                pred + start, target + start, valid + start, ranges, area, header, piece, pieces, pixels, length, flat,
                MAPS, CHECK, FINEST, PARTS, FIRST_BINS, BLOCK, CHUNK
            )  # fmt: skip
        else:
            count_next(
                pred + start, target + start, valid + start, states, area + (THIRD if STEP == 4 else SECOND), sums,
                header, piece, pieces, length,
                NEXT_BITS if STEP == 4 else BITS, STEP // 2 - 1, MAPS, CHECK, LEVELS, FIRSTS, NUMBER, CONTEXTS, FINEST,
                STATE, DONE, TILE, WIDTH
            )  # fmt: skip


@triton.jit
def _pick(
    scratch, statistics, images, pieces, size, min_pixels, floor,
    STEP: tl.constexpr, MAPS: tl.constexpr, KEEP: tl.constexpr, LEVELS: tl.constexpr, FIRSTS: tl.constexpr,
    NUMBER: tl.constexpr, CONTEXTS: tl.constexpr, FINEST: tl.constexpr, PARTS: tl.constexpr, SECOND: tl.constexpr,
    THIRD: tl.constexpr, STATES: tl.constexpr, RANGES: tl.constexpr, STRIDE: tl.constexpr, HEADER_AT: tl.constexpr,
    FIRST_BINS: tl.constexpr, BITS: tl.constexpr, NEXT_BITS: tl.constexpr, LAST_BITS: tl.constexpr,
    STATE: tl.constexpr, DONE: tl.constexpr, COUNTERS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """A step over the contexts of both maps."""
    for item in range(tl.program_id(0), images * (MAPS * CONTEXTS), tl.num_programs(0)):
        each, image = item % (MAPS * CONTEXTS), tl.cast(item // (MAPS * CONTEXTS), tl.int64)
        m, context = each // CONTEXTS, each % CONTEXTS
        area, row = scratch + COUNTERS + image * size, statistics + image * STRIDE + context
        header, states = statistics + image * STRIDE + HEADER_AT, area + STATES + m * STATE * CONTEXTS
        state, sums = states + context, area + RANGES + (2 * MAPS + each) * pieces
        second, third = area + SECOND + (each << BITS), area + THIRD + (each << NEXT_BITS)
        if STEP == 1:
            pick_first(
                area, header, states, context, m,
                KEEP, LEVELS, FIRSTS, NUMBER, CONTEXTS, FINEST, PARTS, FIRST_BINS, BITS
            )  # fmt: skip
        elif STEP == 3:
            pick_next(second, state, CONTEXTS, 1 << BITS, NEXT_BITS)
            bins = tl.arange(0, 1 << LAST_BITS)  # the last digit's histogram reuses this memory
            tl.store(second + bins, tl.zeros_like(bins))
        elif tl.load(state + 2 * CONTEXTS) == 0:
            moments(
                third if STEP == 5 else second, state, sums, row, header, pieces, m, min_pixels, floor,
                CONTEXTS, 1 << (NEXT_BITS if STEP == 5 else LAST_BITS), CHUNK
            )  # fmt: skip
            tl.debug_barrier()
            tl.store(state + 1 * CONTEXTS, 0)
            tl.store(state + 2 * CONTEXTS, DONE)
        elif STEP == 5:
            pick_next(third, state, CONTEXTS, 1 << NEXT_BITS, LAST_BITS)
            tl.atomic_add(scratch + 1, 1, sem="relaxed")


@triton.jit
def _step(
    pred, target, valid, scratch, statistics, images, pixels, length, pieces, size, flat, min_pixels, floor,
    STEP: tl.constexpr, MAPS: tl.constexpr, CHECK: tl.constexpr, KEEP: tl.constexpr, LEVELS: tl.constexpr,
    FIRSTS: tl.constexpr, NUMBER: tl.constexpr, CONTEXTS: tl.constexpr, FINEST: tl.constexpr, PARTS: tl.constexpr,
    SECOND: tl.constexpr, THIRD: tl.constexpr, STATES: tl.constexpr, RANGES: tl.constexpr, STRIDE: tl.constexpr,
    HEADER_AT: tl.constexpr, FIRST_BINS: tl.constexpr, BITS: tl.constexpr, NEXT_BITS: tl.constexpr,
    LAST_BITS: tl.constexpr, STATE: tl.constexpr, DONE: tl.constexpr, COUNTERS: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    if STEP % 2 == 0:
        _count(
            pred, target, valid, scratch, statistics, images, pixels, length, pieces, size, flat,
            STEP, MAPS, CHECK, LEVELS, FIRSTS, NUMBER, CONTEXTS, FINEST, PARTS, SECOND, THIRD, STATES, RANGES, STRIDE,
            HEADER_AT, FIRST_BINS, BITS, NEXT_BITS, STATE, DONE, COUNTERS, BLOCK, TILE, WIDTH, CHUNK
        )  # fmt: skip
    else:
        _pick(
            scratch, statistics, images, pieces, size, min_pixels, floor,
            STEP, MAPS, KEEP, LEVELS, FIRSTS, NUMBER, CONTEXTS, FINEST, PARTS, SECOND, THIRD, STATES, RANGES, STRIDE,
            HEADER_AT, FIRST_BINS, BITS, NEXT_BITS, LAST_BITS, STATE, DONE, COUNTERS, CHUNK
        )  # fmt: skip


@triton.jit(do_not_specialize=["images", "pixels", "length", "pieces", "size", "min_pixels"])
def _select(
    pred, target, valid, scratch, statistics, images, pixels, length, pieces, size, flat, min_pixels, floor,
    START: tl.constexpr, STOP: tl.constexpr, MAPS: tl.constexpr, CHECK: tl.constexpr, KEEP: tl.constexpr,
    LEVELS: tl.constexpr, FIRSTS: tl.constexpr, NUMBER: tl.constexpr, CONTEXTS: tl.constexpr, FINEST: tl.constexpr,
    PARTS: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, STATES: tl.constexpr, RANGES: tl.constexpr,
    STRIDE: tl.constexpr, HEADER_AT: tl.constexpr, FIRST_BINS: tl.constexpr, BITS: tl.constexpr,
    NEXT_BITS: tl.constexpr, LAST_BITS: tl.constexpr, STATE: tl.constexpr, DONE: tl.constexpr,
    COUNTERS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The steps from START (inclusive) to STOP (exclusive)."""
    for step in tl.static_range(START, STOP):
        wanted = True
        if step >= 6:
            wanted = tl.load(scratch + 1) > 0
        if wanted:
            _step(
                pred, target, valid, scratch, statistics, images, pixels, length, pieces, size, flat, min_pixels, floor,
                step, MAPS, CHECK, KEEP, LEVELS, FIRSTS, NUMBER, CONTEXTS, FINEST, PARTS, SECOND, THIRD, STATES,
                RANGES, STRIDE, HEADER_AT, FIRST_BINS, BITS, NEXT_BITS, LAST_BITS, STATE, DONE, COUNTERS, BLOCK, TILE,
                WIDTH, CHUNK
            )  # fmt: skip
            if step + 1 < STOP:
                grid_barrier(scratch)


class ContextStatistics(NamedTuple):
    """statistics: (B,rows,C) float32, the rows listed at ROWS and then the image's header.

    pieces: the number per image. length: pixels per piece.
    """

    statistics: Tensor
    pieces: int
    length: int


def tile_of(cut: Cut) -> int:
    """Pixels per iteration: with several contexts a thread has registers for the predicates of only two pixels."""
    return 512 if max(cut.levels) > 1 else 1024


@functools.lru_cache(maxsize=64)
def _kernels(
    cut: Cut, maps: int, label: bool, keep: float, block: int, apart: bool
) -> tuple[int, int, Launcher, list[Launcher]]:
    """Words of an image's scratch without those per piece, rows of its statistics, and the kernels in order."""
    number = maps * cut.contexts
    second = maps * FIRST_BINS
    third = second + (number << BITS[0])
    states = third + (number << BITS[1])
    ranges, rows = states + number * STATE, ROWS + -(-HEADER // cut.contexts)
    visit = {"MAPS": maps, "CHECK": label, "RANGES": ranges, "COUNTERS": COUNTERS, "BLOCK": block, "WIDTH": WIDTH}
    select = visit | {
        "KEEP": keep, "SECOND": second, "THIRD": third, "STATES": states, "STRIDE": rows * cut.contexts,
        "HEADER_AT": ROWS * cut.contexts, "FIRST_BINS": FIRST_BINS, "BITS": BITS[0], "NEXT_BITS": BITS[1],
        "LAST_BITS": BITS[2], "STATE": STATE, "DONE": DONE, "TILE": tile_of(cut), "CHUNK": CHUNK, **cut.constants,
        **CROWDED,
    }  # fmt: skip
    steps = [(step, step + 1) for step in range(8)] if apart else [(0, 8)]
    sync_options = {} if apart else {"launch_cooperative_grid": True}
    kernels = [Launcher(_select, select | {"START": start, "STOP": stop, **sync_options}) for start, stop in steps]
    return ranges, rows, Launcher(_range, visit | {"CLEARED": states, **HOW}), kernels


@functools.lru_cache(maxsize=16)
def _programs(device: torch.device) -> int:
    """The number of programs that the device runs concurrently; arbitrary for a CPU, which interprets them."""
    if device.type != "cuda":
        return 5
    return torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_EACH


@functools.lru_cache(maxsize=256)
def pieces_of(images: int, pixels: int, programs: int, grain: int) -> tuple[int, int]:
    """The number of pieces per image and of pixels per piece that leave the fewest of `programs` idle."""
    grains = -(-pixels // grain)

    def cost(each: int) -> tuple[int, int]:
        return -(-images * -(-grains // each) // programs) * (each + 2), -each  # 2: a piece's fixed cost, in grains

    least = -(-grains // CHUNK)
    each = min(range(least, min(grains, 64 * least) + 1), key=cost)
    return -(-grains // each), each * grain


class _Plan(NamedTuple):
    """All that `context_statistics` needs beside the maps, because working it out takes longer than the launches."""

    first: Launcher
    grid: Grid
    sizes: tuple[int, ...]
    steps: list[Launcher]
    programs: Grid
    numbers: tuple[float, ...]
    scratch: int
    statistics: tuple[int, int, int]
    pieces: int
    length: int


@functools.lru_cache(maxsize=256)
def _plan(
    images: int, pixels: int, device: torch.device, maps: int, cut: Cut, flat: float, floor: float, min_pixels: int,
    label: bool, keep: float, block: int, apart: bool,
) -> _Plan:  # fmt: skip
    programs = _programs(device)
    words, rows, first, steps = _kernels(cut, maps, label, keep, block, apart)
    pieces, length = pieces_of(images, pixels, programs, GRAIN)
    size = words + maps * (2 + cut.contexts) * pieces
    return _Plan(
        first, (pieces, images, 1), (pixels, length, pieces, size),
        steps, (programs, 1, 1), (images, pixels, length, pieces, size, flat, min_pixels, floor),
        COUNTERS + images * size, (images, rows, cut.contexts), pieces, length,
    )  # fmt: skip


def context_statistics(
    target: Tensor,
    pred: Tensor | None,
    valid: Tensor,
    cut: Cut,
    *,
    flat: float = 0.0,
    floor: float = 0.0,
    min_pixels: int = 1,
    label: bool = True,
    keep: float = 0.0,
) -> ContextStatistics:
    """Statistics of every context of each image; of `target` alone where `pred` is None.

    target, pred: (B,...) float32. valid: (B,...) uint8. All contiguous and on one device. label: target is a label:
    values that are not finite do not count, nor do images whose range is below `flat` of their magnitude. keep: see
    `pick_first`; the deviations are meaningless then.
    """
    images = target.shape[0]
    plan = _plan(
        images, target.numel() // images, target.device, 1 if pred is None else 2, cut, flat, floor, min_pixels,
        label, keep, BLOCK, SEPARATE_LAUNCHES,
    )  # fmt: skip
    scratch = valid.new_empty(plan.scratch, dtype=torch.int32)
    statistics = target.new_empty(plan.statistics)
    prediction = target if pred is None else pred
    plan.first(plan.grid, (prediction, target, valid, scratch), plan.sizes)
    tensors = (prediction, target, valid, scratch, statistics)
    for step in plan.steps:
        step(plan.programs, tensors, plan.numbers)
    return ContextStatistics(statistics, plan.pieces, plan.length)


def median_and_mean_abs_dev(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Median and mean deviation, (B,) each, no gradient. values: (B,N) float32, valid: (B,N) uint8, contiguous."""
    statistics = context_statistics(values, None, valid, WHOLE, label=False).statistics[:, :, 0]
    return statistics[:, LABEL_MEDIAN], statistics[:, LABEL_DEVIATION]
