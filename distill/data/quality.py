"""Quality scores of depth maps as training data: AnyDepth's two scores (arXiv 2601.02760, its data filter), and ours.

    s_dist      Depth Distribution Score, in [0, 1]: are the map's values spread over its range?
    s_grad      Gradient Continuity Score, in [0, 1]: is the map smooth away from its edges?

What the paper leaves open is ours: a gradient is the central difference, known where a pixel and its four neighbours
are valid (not at the image's border); of N gradients the floor(N / 10) largest are edges, whatever ties there are;
empty bins count in chi-square like any other; a constant map falls into one bin, and its CV of 0 / 0 makes s_grad 0,
because there is nothing to learn from it; a sloping plane has CV 0 and s_grad 1. With too few pixels a score is NaN.
The scores are defined on depth; an affine disparity cannot be converted and is scored as it is.

Shapes: H, W of a map. Values are float32, valid is bool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np

BINS = 20
"""K, bins of equal width over the range of the valid depth."""
EDGES = 0.1
"""The share of gradients, the largest, that count as edges."""
LEAST = 16
"""The fewest pixels that have a score. Ours."""
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_AROUND = np.ones((5, 5), np.uint8)


@dataclass(frozen=True, slots=True)
class Meaning:
    """The meaning of a score, and whether high values are good."""

    words: str
    high_is_good: bool = True


SCORES: Mapping[str, Meaning] = MappingProxyType(
    {
        "valid": Meaning("share of pixels with a value"),
        "s_dist": Meaning("Depth Distribution Score (AnyDepth)"),
        "s_grad": Meaning("Gradient Continuity Score (AnyDepth)"),
        "total": Meaning("the mean of s_dist and s_grad, by which AnyDepth ranks data sets"),
        "edges": Meaning("how little contrast the image has at depth edges: 0.5 is chance", high_is_good=False),
        "roughness": Meaning("curvature relative to slope: high for noise, low for surfaces", high_is_good=False),
        "sky": Meaning("share of the image that is sky: unknown or farthest, from the top down", high_is_good=False),
        "sharpness": Meaning("variance of the image's Laplacian: low is blurred"),
        "disagreement": Meaning("difference between two teachers' maps after the best scale and shift", False),
        "bridge": Meaning("residual of labels.bridge", high_is_good=False),
        "align": Meaning("residual of labels.align", high_is_good=False),
    }
)
"""Every score by name. The last three exist for labels only."""


def depth_scores(depth: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """valid, s_dist with its three parts, s_grad, total and roughness of a map (H,W)."""
    depth, valid = np.ascontiguousarray(depth, dtype=np.float32), np.ascontiguousarray(valid, dtype=bool)
    count = int(np.count_nonzero(valid))
    scores = {"valid": count / max(1, valid.size)}
    parts = distribution(depth, valid, count)
    s_dist = 0.5 * parts["chi2"] + 0.3 * parts["concentration"] + 0.2 * parts["range"]
    slopes = _slopes(depth, valid, count)
    roughness = _roughness(depth, slopes)
    s_grad = _continuity(slopes)  # last: it reorders them
    return scores | {
        "s_dist": s_dist,
        "s_grad": s_grad,
        "total": (s_dist + s_grad) / 2,
        **parts,
        "roughness": roughness,
    }


def distribution(depth: np.ndarray, valid: np.ndarray, count: int) -> dict[str, float]:
    """The three parts of s_dist: chi2, concentration and range, each in [0, 1]; NaN for fewer than LEAST pixels.

    count: the number of valid pixels.
    """
    if count < LEAST:
        return dict.fromkeys(("chi2", "concentration", "range"), math.nan)
    low, high = _ends(depth, valid, count)
    if not high > low:
        shares = np.zeros(BINS)
        shares[0] = 1.0
    else:
        with np.errstate(invalid="ignore", over="ignore"):  # invalid values may be NaN
            scaled = np.subtract(depth, np.float32(low))
            scaled *= np.float32(BINS / (high - low))
            bins = scaled.astype(np.uint8)
        if count < valid.size:
            np.copyto(bins, 255, where=~valid)
        counts = _counts(bins)
        counts[BINS - 1] += counts[BINS]  # the upper bound belongs to the last bin
        shares = counts[:BINS] / count
    # sum (n_k - n)^2 / n over N, with n = N / K.
    chi2 = BINS * float(np.square(shares - 1 / BINS).sum())
    peak, even = float(shares.max()), 2 / BINS
    concentration = 1.0 if peak <= even else 1.0 - min(1.0, (peak - even) / (0.5 - even))
    return {"chi2": math.exp(-chi2), "concentration": concentration, "range": int(np.count_nonzero(shares)) / BINS}


def _counts(bins: np.ndarray) -> np.ndarray:
    """Histogram of the values 0 to BINS in an array of bytes, as (BINS + 1,) float64."""
    flat, quarter = bins.ravel(), bins.size // 4
    # Equal neighbours make consecutive increments of one counter wait: interleaving four distant parts halves the time.
    shuffled = cv2.merge([flat[part * quarter :][:quarter] for part in range(4)]) if quarter else flat
    counts = np.zeros(BINS + 1)
    for part in (shuffled.reshape(1, -1), flat[4 * quarter :].reshape(1, -1)):
        if part.size:
            counts += cv2.calcHist([part], [0], None, [BINS + 1], [0, BINS + 1]).ravel()
    return counts


@dataclass(frozen=True, slots=True)
class _Slopes:
    """Lengths of the gradients of a map (H,W).

    twice: (H-2,W) float32, doubled lengths of the rows inside the border; inf where unknown and in the outer columns.
    known: (H-2,W) bool; None: everywhere except in the outer columns. count: the number of known gradients.
    """

    twice: np.ndarray
    known: np.ndarray | None
    count: int


def _slopes(depth: np.ndarray, valid: np.ndarray, count: int) -> _Slopes:
    height, width = depth.shape
    if min(height, width) < 3:
        return _Slopes(np.zeros((0, width), np.float32), None, 0)
    # One subtraction over the flattened rows serves all rows; only the outer columns are wrong.
    flat, size = depth.ravel(), (height - 2) * width
    across = (flat[width + 1 :][:size] - flat[width - 1 :][:size]).reshape(-1, width)
    down = depth[2:] - depth[:-2]
    twice = cv2.magnitude(across, down, down)
    if count == valid.size:
        twice[:, [0, -1]] = np.inf
        return _Slopes(twice, None, (height - 2) * (width - 2))
    mask = cv2.erode(_mask(valid), _CROSS)[1:-1]
    mask[:, [0, -1]] = 0
    twice = cv2.copyTo(twice, mask, np.full(twice.shape, np.inf, np.float32))
    return _Slopes(twice, mask.view(bool), int(np.count_nonzero(mask)))


def _continuity(slopes: _Slopes) -> float:
    """s_grad: 1 / (1 + std / mean) of the gradient lengths without edges; NaN for fewer than LEAST gradients.

    Reorders slopes.twice in place, since a copy would take as long as everything else here.
    """
    if slopes.count < LEAST:
        return math.nan
    smooth = slopes.count - int(EDGES * slopes.count)
    flat = slopes.twice.ravel()
    _as_order(flat).partition(smooth - 1)
    mean, variance = _moments(flat[:smooth])
    return 1.0 / (1.0 + math.sqrt(variance) / mean) if mean > 0 else 0.0


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and variance by sums in double precision: the result of cv2.meanStdDev in a third of its time."""
    mean = cv2.sumElems(values)[0] / values.size
    return mean, max(0.0, cv2.norm(values, cv2.NORM_L2SQR) / values.size - mean**2)


def _as_order(values: np.ndarray) -> np.ndarray:
    """Non-negative float32 viewed as int32, which have the same order and compare faster."""
    return values.view(np.int32)


def _roughness(depth: np.ndarray, slopes: _Slopes) -> float:
    """Median magnitude of the Laplacian over the median gradient length, every 16th pixel; NaN with too few gradients.

    Ours. s_grad does not detect noise: the gradients of noise are similar in length (CV 0.46 without the largest tenth,
    so s_grad 0.69), more than those of a room's planes. A plane has 0 here, white noise about 3.6.
    """
    if slopes.count < LEAST:
        return math.nan
    # Every fourth row and column, except in small maps, which have too few.
    step = 4 if min(depth.shape) >= 256 else 1
    inside, before, after = slice(1, -1, step), slice(0, -2, step), slice(2, None, step)
    bends = depth[before, inside] + depth[after, inside] + depth[inside, before] + depth[inside, after]
    bends -= 4 * depth[inside, inside]
    lengths = slopes.twice[::step, inside]
    if slopes.known is not None:
        known = slopes.known[::step, inside]
        bends, lengths = bends[known], lengths[known]
    if lengths.size < LEAST:
        return math.nan
    slope = _median(lengths) / 2
    return _median(np.abs(bends)) / slope if slope > 0 else math.nan


def _median(values: np.ndarray) -> float:
    """The median of non-negative values; np.median takes five times as long."""
    half = values.size // 2
    parted = np.partition(_as_order(values.ravel()), half).view(np.float32)
    return float(parted[half]) if values.size % 2 else (float(parted[half]) + float(parted[:half].max())) / 2


# --- ours: the map beside its image -----------------------------------------------------------------------------------


def image_scores(
    image: np.ndarray, depth: np.ndarray, valid: np.ndarray, *, larger_is_nearer: bool
) -> dict[str, float]:
    """edges, sky and sharpness of an image (H,W,3) uint8 and its map (H,W)."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    depth, valid = np.ascontiguousarray(depth, dtype=np.float32), np.ascontiguousarray(valid, dtype=bool)
    nearness = _known(depth, valid) if larger_is_nearer else _inverse(depth, valid)
    return {
        "edges": misalignment(grey, nearness, valid),
        "sky": sky_share(nearness, valid),
        "sharpness": _moments(cv2.Laplacian(grey, cv2.CV_16S))[1],
    }


def _inverse(depth: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """One over the depth, 0 where it is invalid."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return _known(np.reciprocal(depth), valid & (depth > 0))


def _known(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The values (H,W) float32, 0 where they are invalid."""
    return values if valid.all() else cv2.copyTo(values, _mask(valid), np.zeros_like(values))


def misalignment(grey: np.ndarray, nearness: np.ndarray, valid: np.ndarray) -> float:
    """Rank of the contrast of an image (H,W) uint8 at the edges of its map (H,W) float32 (0 where invalid): 0 if it is
    higher there than anywhere else, 0.5 if it is as elsewhere; NaN without edges.

    Depth Anything 3 leaves out pictures of IRS whose Canny edges do not match; it gives no thresholds, and with any
    threshold a textured image matches every edge by chance. Ours: the share of pixels with a larger contrast than a
    depth edge has, averaged over depth edges; a pixel's contrast is the range in its 5 x 5 neighbourhood. Edges are
    Canny's with thresholds 50 and 100, in a map whose 2nd to 98th percentile is scaled to 0 to 255; edges between valid
    and invalid pixels do not count.
    """
    count = int(np.count_nonzero(valid))
    if count < LEAST:
        return math.nan
    low, high = _quantiles(_sample(nearness, valid), 0.02, 0.98)
    if not high > low:
        return math.nan
    inside = valid if count == valid.size else cv2.erode(_mask(valid), _AROUND).view(bool)
    # The gradients that Canny would compute itself, in half the time.
    slopes = cv2.spatialGradient(_bytes(nearness, low, high), borderType=cv2.BORDER_REPLICATE)
    edges = cv2.bitwise_and(cv2.Canny(*slopes, 50, 100), _mask(inside)).view(bool)
    contrast = cv2.subtract(cv2.dilate(grey, _AROUND), cv2.erode(grey, _AROUND))
    at_edges = contrast[edges]
    if at_edges.size < LEAST:
        return math.nan
    histogram = np.bincount(_sample(contrast, inside), minlength=256)
    # Ties count half: a flat image gets 0.5.
    ranks = (np.cumsum(histogram) - histogram / 2) / histogram.sum()
    return 1.0 - float(ranks[at_edges].mean())


def _bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale values (H,W) to uint8: low becomes 0, high 255; values beyond are clipped."""
    scale = 255.0 / (high - low)
    return cv2.addWeighted(values, scale, values, 0.0, -low * scale, dtype=cv2.CV_8U)


def sky_share(nearness: np.ndarray, valid: np.ndarray) -> float:
    """The share of pixels, connected to the top row, that are invalid or in the lowest 1 % of the range of nearness."""
    count = int(np.count_nonzero(valid))
    # An added row of sky above the map connects all regions that touch its top, so that one flood fill finds them.
    height, width = valid.shape
    far = np.ones((height + 1, width), bool)
    np.logical_not(valid, out=far[1:])
    if count:
        low, high = (np.float32(end) for end in _ends(nearness, valid, count))
        far[1:] |= nearness <= low + 0.01 * (high - low)
    area, *_ = cv2.floodFill(_mask(far), None, (0, 0), 2)
    return (area - width) / valid.size


# --- masks ------------------------------------------------------------------------------------------------------------


def _mask(valid: np.ndarray) -> np.ndarray:
    """A bool map as uint8 for OpenCV: the same bytes, 0 and 1."""
    return valid.view(np.uint8)


def _ends(values: np.ndarray, valid: np.ndarray, count: int) -> tuple[float, float]:
    """Minimum and maximum of the valid values (H,W), of which there are `count`."""
    low, high, _, _ = cv2.minMaxLoc(values, None if count == valid.size else _mask(valid))
    return low, high


def _sample(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """About 4096 of the values (H,W) where a mask is set, evenly spread."""
    step = max(1, int(np.count_nonzero(where)) // 4096)
    while math.gcd(step, values.shape[1]) > 1:  # else it would visit only a few columns
        step += 1
    return values.ravel()[::step][where.ravel()[::step]]


def _quantiles(values: np.ndarray, *shares: float) -> list[float]:
    """The result of np.quantile, faster."""
    ordered = np.sort(values)
    quantiles = []
    for share in shares:
        position = share * (ordered.size - 1)
        below, fraction = int(position), position % 1
        first, second = ordered[below], ordered[min(below + 1, ordered.size - 1)]
        step = second - first
        quantiles.append(
            float(first + step * np.float64(fraction) if fraction < 0.5 else second - step * np.float64(1 - fraction))
        )
    return quantiles
