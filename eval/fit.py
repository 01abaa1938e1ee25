"""Align one prediction to one ground truth and sum up its errors: the arithmetic of a score.

The kinds of prediction and truth decide how they are compared. A truth in metres or up to a scale is scored in depth:
an affine disparity is fitted in disparity and inverted, an affine depth is fitted in depth, a map known up to a scale
gets a scale, a metric one is used unchanged; a protocol may require another fit. A truth with an unknown shift is
scored in its own quantity; predictions of the other quantity can be converted to it only if their own shift is known.

Least squares uses float64 moments over blocks: equal to core.align.fit_affine, in a tenth of its time and without a
float64 copy of a 24-megapixel map. Maps are numpy arrays here, since numpy's `take` gathers valid pixels six times as
fast as torch's masked selection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.core.depth import UNKNOWNS, DepthMap, Kind, KindError
from distill.eval.metrics import NUM_SUMS, block_sums
from distill.eval.protocol import Protocol, choice_of

MARIGOLD_FLOOR = 1e-3
_EPS = float(np.finfo(np.float64).eps)
_BLOCK = 65536  # pixels: float32 maps of this size stay in the cache with their temporaries


class NoGroundTruthError(ValueError):
    """The ground truth has no valid pixel, so no prediction can be scored on this image."""


@dataclass(frozen=True, slots=True)
class AlignmentPlan:
    """How a prediction is compared with a ground truth.

    quantity: what the metrics compare, "depth" or "disparity". fit: the quantity in which the prediction is aligned.
    invert: the prediction is inverted before the fit. unknown: what the fit finds: "metric" (nothing), "scale",
    "affine", "median" (a scale by the medians alone) or "l1" (the scale of least relative error).
    metres: the truth is in metres, so that the protocol's range applies.
    """

    quantity: str
    fit: str
    invert: bool
    unknown: str
    metres: bool


@dataclass(frozen=True, slots=True)
class ImageErrors:
    """The errors of one image.

    sums: (NUM_SUMS,) float64, see eval.metrics.sums. floors: the same for each disparity floor, by its name, where
    the prediction was aligned in disparity. scale, shift: of the alignment. notes: remarks for the reader.
    nonpositive: the share of scored pixels where an affine disparity is not positive, which Marigold's fit leaves out;
    0 for other kinds. metres: whether the truth is in metres; otherwise metrics with a unit are undefined.
    scale_error: the median of prediction / truth, less 1, of metric predictions scored without a fit; else None.
    """

    sums: Tensor
    floors: dict[str, Tensor]
    scale: float
    shift: float
    notes: tuple[str, ...]
    nonpositive: float = 0.0
    metres: bool = True
    scale_error: float | None = None


def alignment_plan(kind: Kind, truth: Kind, alignment: str = "") -> AlignmentPlan:
    """How a prediction of `kind` is compared with a truth of kind `truth`; raises KindError if it cannot be.

    alignment: a protocol's, which decides what to fit; "" fits what the kinds leave unknown.
    """
    requested = choice_of(alignment) or kind.unknown
    if requested in ("median", "l1") and truth.unknown == "affine":
        raise KindError(f"alignments median and l1 fit a scale only, but {truth} has an unknown shift too; use auto")
    unknown = requested if requested in ("median", "l1") else max(requested, truth.unknown, key=UNKNOWNS.index)
    if truth.unknown != "affine":
        return AlignmentPlan("depth", kind.quantity, False, unknown, truth.unknown == "metric")
    if kind.quantity != truth.quantity and kind.unknown == "affine":
        raise KindError(
            f"a prediction of kind {kind} cannot be scored against {truth}: both have an unknown shift, so neither can "
            f"be inverted. Score it where the truth is metric, or predict {truth.quantity}"
        )
    return AlignmentPlan(truth.quantity, truth.quantity, kind.quantity != truth.quantity, unknown, False)


def measure(pred: np.ndarray, truth: DepthMap, kind: Kind, protocol: Protocol) -> ImageErrors:
    """Align a prediction (H,W) float32 to a truth (1,H,W) and sum up its errors.

    Raises NoGroundTruthError, or ValueError if the prediction is not finite on a valid pixel or has not the truth's
    size; messages have one line.
    Source of the marigold mode: prs-eth/Marigold, script/depth/eval.py and src/util/alignment.py.
    """
    pred = _of_size(pred, truth)
    plan = alignment_plan(kind, truth.kind, protocol.alignment)
    if truth.kind.unknown != "affine":
        truth = as_depth(truth)
    values, valid = truth.values[0].numpy(), truth.valid[0].numpy()
    flat_pred, flat_truth = _gather(valid, pred, values)
    if plan.metres:
        flat_pred, flat_truth = _in_range(flat_pred, flat_truth, protocol)
    if not len(flat_truth):
        raise NoGroundTruthError("the truth has no valid pixel")
    if protocol.space == "disparity" and plan.quantity == "depth":
        if (kind.quantity, kind.unknown) == ("depth", "affine"):
            raise KindError(f"{kind} cannot be scored in disparity: its shift is unknown")
        flat_truth = 1.0 / np.maximum(flat_truth, 1e-6)
        plan = AlignmentPlan("disparity", "disparity", kind.quantity == "depth", plan.unknown, False)
    lowest, highest = float(flat_pred.min()), float(flat_pred.max())  # NaN if any is
    if not np.isfinite(lowest + highest):
        num_bad = int((~np.isfinite(flat_pred)).sum())
        raise ValueError(f"NaN or infinity in {num_bad} of the {len(flat_pred)} scored pixels")
    nonpositive = float((flat_pred <= 0).mean()) if lowest <= 0 and kind == Kind.AFFINE_DISPARITY else 0.0
    notes = _notes(flat_pred, lowest, highest, kind, plan, protocol)
    if plan.invert:
        flat_pred = 1.0 / np.maximum(flat_pred, 1e-6)
    scale, shift = 1.0, 0.0
    if plan.unknown != "metric":
        fit_pixels = (flat_pred, flat_truth)
        if protocol.fit_columns and not plan.invert and not protocol.space:
            fit_pixels = _fewer_columns(pred, values, valid, protocol.fit_columns)
        scale, shift = _fit(*fit_pixels, plan=plan, positive=protocol.fit_positive, offset=protocol.offset_positive)
        if scale < 0:
            notes.append(f"the fitted scale is negative ({scale:.3g}): is the prediction really {kind}?")
    sums, floors = _total(flat_pred, flat_truth, scale, shift, plan, protocol)
    error = _scale_error(flat_pred, flat_truth, kind) if plan.unknown == "metric" and plan.metres else None
    if error is not None and not 0.02 < error + 1 < 50:
        notes.append(f"its metres are {error + 1:.3g} times the truth's: is it in another unit?")
    return ImageErrors(sums, floors, scale, shift, tuple(notes), nonpositive, plan.metres, error)


def _of_size(pred: np.ndarray, truth: DepthMap) -> np.ndarray:
    """The prediction, float32 where it was half precision; ValueError unless it has the size of its one truth."""
    if tuple(pred.shape) != tuple(truth.values.shape[1:]) or len(truth) != 1:
        sizes = f"{tuple(pred.shape)} and {tuple(truth.values.shape)}"
        raise ValueError(f"a prediction (H,W) and its truth (1,H,W) must have one size, not {sizes}: resize it first")
    return pred.astype(np.float32) if pred.dtype == np.float16 else pred


def _scale_error(pred: np.ndarray, truth: np.ndarray, kind: Kind) -> float:
    """The overall scale error of a metric map: the median of depth / truth, less 1."""
    product = np.maximum(pred, 1e-6) * truth if kind.quantity == "disparity" else None
    ratio = np.median(pred / truth) if product is None else 1.0 / np.median(product)
    return float(ratio) - 1.0


def as_depth(truth: DepthMap) -> DepthMap:
    """Convert a truth (1,H,W) to depth; raises KindError if its shift is unknown."""
    if truth.kind.unknown == "affine":
        raise KindError(
            f"a truth of kind {truth.kind} gives no ratios of depths, since its shift is unknown: use another truth"
        )
    return truth.convert(Kind(f"{truth.kind.unknown}_depth"))


def aligned_depth(
    pred: np.ndarray, truth: DepthMap, kind: Kind, protocol: Protocol, *, scaled: bool = False
) -> tuple[np.ndarray, ImageErrors]:
    """A prediction (H,W) as depth (H,W), and how it was aligned: fitted if its shift is unknown, else unchanged.

    scaled: fits an unknown scale as well, which ratios of depths do not need. The fit uses the valid truth inside the
    protocol's range; the map is clipped as the protocol says. Without a fit the sums are empty. Raises KindError for a
    truth whose shift is unknown.
    """
    pred, truth = _of_size(pred, truth), as_depth(truth)
    fitted = protocol.with_kind(kind)
    plan = alignment_plan(kind, truth.kind, fitted.alignment)
    if plan.unknown != "affine" and (plan.unknown == "metric" or not scaled):
        depth = 1.0 / np.maximum(pred, 1e-6) if kind.quantity == "disparity" else pred
        if not np.isfinite(depth[truth.valid[0].numpy()]).all():
            raise ValueError("NaN or infinity among the scored pixels")
        return depth, ImageErrors(torch.zeros(0), {}, 1.0, 0.0, ())
    measured = measure(pred, truth, kind, fitted)
    aligned = pred * np.float32(measured.scale) + np.float32(measured.shift)
    depths, inside = truth.values[0].numpy(), truth.valid[0].numpy()
    low, high = (max(1e-6, protocol.min_depth), protocol.max_depth) if plan.metres else (1e-6, float("inf"))
    if plan.metres:
        inside = inside & (depths > protocol.min_depth) & (depths < protocol.max_depth)
    if plan.fit == "disparity":
        floor = 1.0 / float(depths[inside].max()) if protocol.disparity_floor is None else protocol.disparity_floor
        aligned = 1.0 / np.maximum(aligned, floor)
    if protocol.clip == "truth" and plan.unknown == "affine":
        low, high = max(low, float(depths[inside].min())), min(high, float(depths[inside].max()))
    return np.clip(aligned, low, high), measured


def _in_range(pred: np.ndarray, truth: np.ndarray, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    """The pixels whose truth lies strictly inside the protocol's range: usually all of them.

    Where the benchmark's mask decides alone, ValueError if it counts pixels that have no depth.
    """
    if not protocol.mask_range:
        if len(truth) and not (truth.min() > 0 and truth.max() < np.inf):
            bad = int((~((truth > 0) & (truth < np.inf))).sum())
            raise ValueError(f"{bad} of the {len(truth)} pixels in the truth's mask are 0, negative or not finite")
        return pred, truth
    if not len(truth) or (truth.min() > protocol.min_depth and truth.max() < protocol.max_depth):
        return pred, truth
    inside = (truth > protocol.min_depth) & (truth < protocol.max_depth)
    return pred[inside], truth[inside]


def _notes(
    pred: np.ndarray, lowest: float, highest: float, kind: Kind, plan: AlignmentPlan, protocol: Protocol
) -> list[str]:
    notes = ["constant prediction"] if lowest == highest and len(pred) > 1 else []
    if lowest <= 0 and plan.unknown != "affine":
        notes.append(f"{int((pred <= 0).sum())} of the {len(pred)} scored pixels are not positive")
    if highest <= 0 and kind == Kind.AFFINE_DISPARITY and protocol.fit_positive and not protocol.offset_positive:
        notes.append("no positive prediction: Marigold's fit uses positive pixels only, so there was nothing to fit")
    return notes


def _fewer_columns(pred: np.ndarray, truth: np.ndarray, valid: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The valid pixels of every n-th column: Marigold's `--alignment_max_res`.

    Its nn.Upsample gets a 3-D tensor and so decimates the width alone, by the ratio of `limit` to the LONGER side; all
    rows stay. Column i of the result is column floor(i * longer / limit), in float32 as torch computes it.
    """
    longer = max(pred.shape)
    if longer <= limit:
        return _gather(valid, pred, truth)
    factor = limit / longer
    index = np.floor(np.arange(int(pred.shape[1] * factor), dtype=np.float32) * np.float32(1.0 / factor)).astype(int)
    index = np.minimum(index, pred.shape[1] - 1)
    return _gather(np.take(valid, index, axis=1), np.take(pred, index, axis=1), np.take(truth, index, axis=1))


def _gather(valid: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The valid pixels of two maps as flat arrays, gathered in pieces to keep the index lists small."""
    flat, maps = valid.ravel(), (first.ravel(), second.ravel())
    chosen = np.empty((2, int(np.count_nonzero(flat))), np.float32)
    offset = 0
    for start in range(0, len(flat), 4 * _BLOCK):
        piece = slice(start, start + 4 * _BLOCK)
        index = np.flatnonzero(flat[piece])
        for row, values in zip(chosen, maps, strict=True):
            np.take(values[piece], index, out=row[offset : offset + len(index)], mode="clip")
        offset += len(index)
    return chosen[0], chosen[1]


def _fit(
    pred: np.ndarray, truth: np.ndarray, *, plan: AlignmentPlan, positive: bool, offset: bool
) -> tuple[float, float]:
    """Least-squares scale and shift (float32 numbers) from prediction to truth in the quantity of the fit.

    positive: use only pixels where both are positive. offset: as if a constant made the prediction positive first; an
    affine fit cancels the constant, so none is added.
    """
    offset = offset and plan.unknown == "affine"
    invert = plan.fit != plan.quantity
    if plan.unknown == "median":
        return _median_scale(pred, truth, invert=invert, positive=positive), 0.0
    if plan.unknown == "l1":
        return _l1_scale(pred, truth, invert=invert), 0.0
    origin = 0.0
    if len(pred) and plan.unknown == "affine":
        # A pixel that the fit uses: about a value that it leaves out, such as -1e9 for "none", the moments lose all.
        apart = plan.fit == "disparity" and positive and not offset and pred[0] <= 0
        origin = float(pred[np.argmax(pred > 0)] if apart else pred[0])
    count, moments = 0, torch.zeros(4, dtype=torch.float64)
    for p, t in _blocks(pred, truth):
        if plan.fit == "disparity" and positive and min(float(p.min()), float(t.min())) <= 0:
            usable = (t > 0) if offset else (p > 0) & (t > 0)
            p, t = p[usable], t[usable]
        if invert:
            t = t.reciprocal()
        p64, t64 = p.double().sub_(origin), t.double()
        count += len(p)
        moments += torch.stack([p64.sum(), t64.sum(), p64 @ p64, p64 @ t64])
    if not count:
        return 0.0, 0.0
    sum_p, sum_t, sum_pp, sum_pt = moments.tolist()
    if plan.unknown == "scale":
        return (float(np.float32(sum_pt / sum_pp)) if sum_pp > 0 else 0.0), 0.0
    return _solve(count, sum_p / count, sum_t / count, sum_pp / count, sum_pt / count, origin)


def _median_scale(pred: np.ndarray, truth: np.ndarray, *, invert: bool, positive: bool) -> float:
    """The ratio of the medians, as a float32 number; 0 if the prediction's median is not positive.

    invert: the prediction is a disparity, and the median of 1/truth is used. It equals one over the truth's median,
    except that for an even count the two middle values are averaged after the inversion.
    """
    if invert and positive and len(pred) and min(float(pred.min()), float(truth.min())) <= 0:
        usable = (pred > 0) & (truth > 0)
        pred, truth = pred[usable], truth[usable]
    if not len(pred):
        return 0.0
    middle = float(np.median(pred))
    target = float(np.median(1.0 / np.maximum(truth, 1e-6) if invert else truth))
    return float(np.float32(target / middle)) if middle > 0 else 0.0


def _l1_scale(pred: np.ndarray, truth: np.ndarray, *, invert: bool) -> float:
    """The scale of a depth that minimizes the sum of |scale * depth - truth| / truth; for a disparity, its inverse.

    It is the median of truth/depth weighted by |depth|/truth. Source: microsoft/MoGe, moge/utils/alignment.py.
    """
    depth = 1.0 / np.maximum(pred, 1e-6) if invert else pred
    usable = depth != 0
    if not usable.any():
        return 0.0
    ratio = truth[usable].astype(np.float64) / depth[usable]
    order = np.argsort(ratio, kind="stable")
    weight = np.cumsum(1.0 / np.abs(ratio[order]))
    best = ratio[order[np.searchsorted(weight, weight[-1] / 2)]]
    return float(np.float32(1.0 / best if invert else best))


def _solve(count: int, p: float, t: float, pp: float, pt: float, origin: float) -> tuple[float, float]:
    """Scale and shift from mean moments of (pred - origin); the minimum-norm solution for a constant prediction."""
    variance, covariance, mean = max(pp - p * p, 0.0), pt - p * t, p + origin
    norm = mean * mean + 1.0
    # The rank by numpy.linalg.lstsq's default: a spread of the last float32 digit, from 1e4 to 1e4 + 0.001, is fitted.
    if count == 1 or math.sqrt(variance) <= (norm + variance) * max(count, 2) * _EPS:
        return float(np.float32(t * mean / norm)), float(np.float32(t / norm))
    scale = covariance / variance
    return float(np.float32(scale)), float(np.float32(t - scale * mean))


def _total(
    pred: np.ndarray, truth: np.ndarray, scale: float, shift: float, plan: AlignmentPlan, protocol: Protocol
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sums of the aligned and clipped prediction, and those under each disparity floor with the plain range."""
    low, high = 1e-6, float("inf")
    if plan.metres:
        low, high = max(low, protocol.min_depth), protocol.max_depth
    tight = (low, high)
    if protocol.clip == "truth" and plan.unknown == "affine":
        tight = (max(low, float(truth.min())), min(high, float(truth.max())))
    if plan.fit == plan.quantity:
        total = torch.zeros(NUM_SUMS, dtype=torch.float64)
        for p, t in _blocks(pred, truth):
            total += block_sums(_scaled(p, scale, shift).clamp_(*tight), t)
        return total, {}
    least = 1.0 / max(float(truth.max()), low)
    clips = {
        "chosen": (least if protocol.disparity_floor is None else protocol.disparity_floor, *tight),
        f"{MARIGOLD_FLOOR:g}": (MARIGOLD_FLOOR, low, high),
        "1/max truth": (least, low, high),
    }
    totals = {clip: torch.zeros(NUM_SUMS, dtype=torch.float64) for clip in clips.values()}
    least = max(max(floor, 1.0 / above) for floor, _, above in totals)
    limit = min(1.0 / below for _, below, _ in totals)
    for p, t in _blocks(pred, truth):
        aligned = _scaled(p, scale, shift)
        smallest, largest = torch.aminmax(aligned)
        if float(smallest) >= least and float(largest) <= limit:  # no clip affects this block: all sums are equal
            shared = block_sums(aligned.reciprocal_(), t)
            for total in totals.values():
                total += shared
            continue
        for (floor, below, above), total in totals.items():
            total += block_sums(aligned.clamp(min=floor).reciprocal_().clamp_(below, above), t)
    return totals[clips.pop("chosen")], {name: totals[clip] for name, clip in clips.items()}


def _scaled(pred: Tensor, scale: float, shift: float) -> Tensor:
    return (pred * scale).add_(shift)


def _blocks(pred: np.ndarray, truth: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Both arrays as torch blocks that share their memory."""
    p, t = torch.from_numpy(pred), torch.from_numpy(truth)
    for start in range(0, len(p), _BLOCK):
        yield p[start : start + _BLOCK], t[start : start + _BLOCK]
