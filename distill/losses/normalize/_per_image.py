"""The loss in contexts of one image and its gradient, in closed form: the version for the CPU.

Pixels are ordered once by the finest parts of the label's range; after that every context is one contiguous slice.
Medians are exact selections: a sample brackets the value, one pass counts the values below, and only the few values
inside the bracket are partitioned. Loss and gradient are computed together, so only the gradient outlives the call.
The arrays are numpy views of the tensors: numpy selects and compresses several times faster than torch on a CPU, and
releases the GIL, so that images run in threads.

Shapes: N pixels of an image, M of them valid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

MIN_PIXELS = 5
# A mean deviation below this fraction of the label's magnitude is attributed to rounding: the label is flat.
FLAT = 1e-6
# The student's scale is clamped to at least this: a constant prediction gives a finite loss and gradient.
FLOOR = 1e-6
# Selection: below this many values a plain partition is as fast; the sample's size; half the bracket, in samples.
_FEW = 8192
_SAMPLE = 1024
_HALF = 48


class Workspace:
    """Buffers that all images and contexts of a thread reuse: new pages would cost more than the arithmetic."""

    def __init__(self, pixels: int, dtype: Any) -> None:
        floats = [np.empty(pixels, dtype) for _ in range(8)]
        self.pred, self.target, self.weight, self.gradient, self.centred, self.residual, self.other, self.e = floats
        self.order, self.index = np.empty(pixels, np.intp), np.empty(pixels, np.intp)


@dataclass(frozen=True, slots=True)
class _Context:
    """A slice [start, stop) of the ordered pixels, with the label's statistics over it."""

    start: int
    stop: int
    median: Any
    deviation: Any


def lower_median(values: Array) -> Any:
    """The lower median of (M,) values, M > 0, exactly torch.median's."""
    return _select(values, (len(values) - 1) // 2)


def _select(values: Array, rank: int) -> Any:
    """The value at 0-based `rank` of the sorted values."""
    count = len(values)
    if count >= _FEW:
        sample = np.sort(values[:: count // _SAMPLE])
        middle = rank * len(sample) // count
        low, high = sample[max(0, middle - _HALF)], sample[min(len(sample) - 1, middle + _HALF)]
        above = values >= low
        rank_inside = rank - (count - np.count_nonzero(above))
        inside = values.take(np.flatnonzero(np.logical_and(above, values <= high, out=above)))
        # Otherwise the bracket missed (sample aligned with the image's columns, NaN among the values): partition all.
        if 0 <= rank_inside < len(inside):
            return np.partition(inside, rank_inside)[rank_inside]
    return np.partition(values, rank)[rank]


def _ordered(target: Array, low: Any, high: Any, finest: int, w: Workspace) -> tuple[Array, list[int]]:
    """The order that groups pixels by the `finest` equal parts of the range, and the parts' boundaries in it."""
    order, share = w.order[: len(target)], w.other[: len(target)]
    np.multiply(np.subtract(target, low, out=share), finest / (high - low), out=share)
    part = np.minimum(share, finest - 1, out=share).astype(np.uint8)
    bounds = [0]
    for k in range(finest):
        members = np.flatnonzero(part == k)
        bounds.append(bounds[-1] + len(members))
        order[bounds[-2] : bounds[-1]] = members
    return order, bounds


def _live_contexts(
    target: Array, bounds: list[int], levels: tuple[int, ...], flat: Any, w: Workspace
) -> tuple[list[_Context], list[int]]:
    """The contexts with information, and for each finest part how many of them contain it."""
    finest = len(bounds) - 1
    contexts, shares = [], [0] * finest
    for level in levels:
        width = finest // level
        for k in range(level):
            start, stop = bounds[k * width], bounds[(k + 1) * width]
            if stop - start < MIN_PIXELS:
                continue
            part, buffer = target[start:stop], w.other[: stop - start]
            median = lower_median(part)
            deviation = np.abs(np.subtract(part, median, out=buffer), out=buffer).mean()
            if not deviation > flat:
                continue
            contexts.append(_Context(start, stop, median, deviation))
            for j in range(k * width, (k + 1) * width):
                shares[j] += 1
    return contexts, shares


def _residual(pred: Array, target: Array, c: _Context, label_only: bool, w: Workspace) -> tuple[Array, Array, Any]:
    """N(student) - N(label) over one context, the centred student, and the student's scale."""
    p, t, count = pred[c.start : c.stop], target[c.start : c.stop], c.stop - c.start
    centred, residual, other = w.centred[:count], w.residual[:count], w.other[:count]
    np.subtract(p, c.median if label_only else lower_median(p), out=centred)
    scale = c.deviation if label_only else np.maximum(np.abs(centred, out=other).mean(), p.dtype.type(FLOOR))
    np.divide(centred, scale, out=residual)
    np.divide(np.subtract(t, c.median, out=other), c.deviation, out=other)
    np.subtract(residual, other, out=residual)
    return residual, centred, scale


def _untrimmed(
    pred: Array, target: Array, contexts: list[_Context], trim_top: float, label_only: bool, w: Workspace, share: Array
) -> Array:
    """True for the pixels in a live context that are not among the `trim_top` with the largest loss."""
    pixel = np.zeros_like(pred)
    for c in contexts:
        residual, _, _ = _residual(pred, target, c, label_only, w)
        pixel[c.start : c.stop] += np.abs(residual, out=residual)
    pixel *= share
    live = share > 0
    counted = int(np.count_nonzero(live))
    num_kept = max(1, round(counted * (1.0 - trim_top)))
    return live & (pixel <= _select(pixel[live], num_kept - 1))


def _add_gradient(
    gradient: Array, e: Array, centred: Array, scale: Any, c: _Context, label_only: bool, w: Workspace
) -> None:
    """Adds d/dpred of sum(weight * |residual|) where residual = (pred - median(pred)) / scale(pred) - label.

    With e = weight * sign(residual), n = (pred - median) / scale and a floor that is not active:
        d/dpred_i = e_i / scale - sum(e * n) / scale * d scale / dpred_i - [i is the median] * sum(e) / scale
        d scale / dpred_i = (sign(pred_i - median) - [i is the median] * sum(sign)) / count
    """
    count, out, other = len(e), gradient[c.start : c.stop], w.other[: len(e)]
    if not label_only:
        floored = bool(scale <= FLOOR)
        pull = 0.0 * scale if floored else np.multiply(e, centred, out=other).sum() / (scale * scale * count)
        at_median = int(np.argmax(centred == 0))
        above = np.sign(centred, out=centred)
        median_gradient = pull * above.sum() - e.sum() / scale
        out -= np.multiply(above, pull, out=above)
        out[at_median] += median_gradient
    out += np.divide(e, scale, out=other)


def _shares(
    each: Array, weight: Array | None, bounds: list[int], shares: list[int], kept: Callable[[Array], Array] | None
) -> bool:
    """Writes each ordered pixel's weight in each of its contexts into `each` (M,); returns whether any is positive.

    weight: of the ordered pixels, or None. kept: a function of the shares that gives the untrimmed pixels, or None.
    """
    total: Any = 0
    for start, stop, number in zip(bounds[:-1], bounds[1:], shares, strict=True):
        each[start:stop] = 1.0 / number if number else 0.0
        total += stop - start if number else 0
    if total and (weight is not None or kept is not None):
        counts = (each > 0).astype(each.dtype) if weight is None else weight * (each > 0)
        if kept is not None:
            counts *= kept(each)
        total = counts.sum()
        each *= counts
    if not total > 0:
        return False
    each /= total
    return True


def image_loss(
    pred: Array,
    target: Array,
    valid: Array,
    weight: Array | None,
    gradient: Array | None,
    *,
    levels: tuple[int, ...],
    trim_top: float,
    label_only: bool,
    workspace: Workspace,
) -> tuple[float, int]:
    """Loss and number of live contexts of one image; its gradient is written into `gradient`, which must be zeros.

    pred, target, valid (bool), weight (each pixel's, or None: all equal), gradient: (N,).
    """
    w = workspace
    with np.errstate(all="ignore"):
        valid_index = None if valid.all() else np.flatnonzero(valid)
        number = len(valid) if valid_index is None else len(valid_index)
        t = target if valid_index is None else target.take(valid_index, out=w.target[:number], mode="clip")
        if number == 0:
            return 0.0, 0
        low, high = t.min(), t.max()
        flat = FLAT * max(abs(low), abs(high))
        if not high - low > flat:
            return 0.0, 0
        index, bounds = _ordered(t, low, high, max(levels), w)
        if valid_index is not None:
            index = valid_index.take(index, out=w.index[:number], mode="clip")
        # mode="clip" clips nothing here: it lets numpy write into `out` without a copy.
        p = pred.take(index, out=w.pred[:number], mode="clip")
        t = target.take(index, out=w.target[:number], mode="clip")
        contexts, shares = _live_contexts(t, bounds, levels, flat, w)
        each = w.weight[:number]
        untrimmed = partial(_untrimmed, p, t, contexts, trim_top, label_only, w) if trim_top > 0.0 else None
        if not _shares(each, None if weight is None else weight.take(index), bounds, shares, untrimmed):
            return 0.0, len(contexts)
        loss, ordered = 0.0, w.gradient[:number]
        ordered.fill(0.0)
        for c in contexts:
            residual, centred, scale = _residual(p, t, c, label_only, w)
            e = np.sign(residual, out=w.e[: len(residual)])
            e *= each[c.start : c.stop]
            loss += float(np.multiply(e, residual, out=residual).sum())
            if gradient is not None:
                _add_gradient(ordered, e, centred, scale, c, label_only, w)
        if gradient is not None:
            gradient[index] = ordered
        return loss, len(contexts)
