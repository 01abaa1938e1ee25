"""How well a depth map teaches: AnyDepth's two scores (arXiv 2601.02760, its data filter), and more of ours.

    s_dist      Depth Distribution Score, in [0, 1]: are the map's values spread over its range?
    s_grad      Gradient Continuity Score, in [0, 1]: is the map even away from its edges?

Where the paper is silent, ours: a gradient is the central difference, known where a pixel and its four neighbours are
(the image's border has none); of N gradients the floor(N / 10) largest are edges, whatever ties there are; empty bins
count in chi-square as any other; a constant map, whose range is nothing, falls into one bin, and its CV of 0 / 0 makes
s_grad 0, for there is nothing to learn from it; a sloping plane has CV 0 and s_grad 1. Without enough pixels a score is
NaN. Depth is meant; an affine disparity cannot become depth and is scored as it is.

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
"""The share of the largest gradients that are taken for edges."""
LEAST = 16
"""Fewer pixels than this have no score. Ours."""
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a score says, and whether a high one is good."""

    words: str
    high_is_good: bool = True


SCORES: Mapping[str, Meaning] = MappingProxyType(
    {
        "valid": Meaning("share of pixels with a value"),
        "s_dist": Meaning("Depth Distribution Score (AnyDepth)"),
        "s_grad": Meaning("Gradient Continuity Score (AnyDepth)"),
        "total": Meaning("the mean of the two, with which AnyDepth ranks data sets"),
        "edges": Meaning("how little the image is steep at the depth's edges: 0.5 is chance", high_is_good=False),
        "roughness": Meaning("bends over slopes: what noise has and surfaces have not", high_is_good=False),
        "sky": Meaning("share of the image that is sky: unknown or farthest, from the top down", high_is_good=False),
        "sharpness": Meaning("variance of the image's Laplacian: low is blurred"),
        "disagreement": Meaning("what is left between two teachers' maps after the best scale and shift", False),
        "bridge": Meaning("residual of labels.bridge", high_is_good=False),
        "align": Meaning("residual of labels.align", high_is_good=False),
    }
)
"""Every score by name. The last three are of labels alone."""


def depth_scores(depth: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """valid, s_dist with its three parts, s_grad, total and roughness of a map (H,W)."""
    depth = np.ascontiguousarray(depth, dtype=np.float32)
    count = int(np.count_nonzero(valid))
    found = {"valid": count / max(1, valid.size)}
    parts = distribution(depth, valid, count)
    s_dist = 0.5 * parts["chi2"] + 0.3 * parts["concentration"] + 0.2 * parts["range"]
    lengths, known = _slopes(depth, valid, count)
    s_grad = _continuity(lengths, known)
    found |= {"s_dist": s_dist, "s_grad": s_grad, "total": (s_dist + s_grad) / 2, **parts}
    return found | {"roughness": _roughness(depth, lengths, known)}


def distribution(depth: np.ndarray, valid: np.ndarray, count: int) -> dict[str, float]:
    """The three parts of s_dist: chi2, concentration and range, each in [0, 1]; NaN of fewer than LEAST pixels.

    count: the number of valid pixels.
    """
    if count < LEAST:
        return dict.fromkeys(("chi2", "concentration", "range"), math.nan)
    mask = None if count == valid.size else valid.view(np.uint8) if valid.dtype == np.bool_ else valid.astype(np.uint8)
    low, high, _, _ = cv2.minMaxLoc(depth, mask)
    if not high > low:
        shares = np.zeros(BINS)
        shares[0] = 1.0
    else:
        # OpenCV counts bytes twice as fast as it finds the bins of floats; what is not valid may be no number.
        with np.errstate(invalid="ignore", over="ignore"):
            bins = ((depth - np.float32(low)) * np.float32(BINS / (high - low))).astype(np.uint8)
        counts = cv2.calcHist([bins], [0], mask, [BINS + 1], [0, BINS + 1]).ravel().astype(np.float64)
        counts[BINS - 1] += counts[BINS]  # the upper end belongs to the last bin
        shares = counts[:BINS] / count
    # sum (n_k - n)^2 / n over N, with n = N / K.
    chi2 = BINS * float(np.square(shares - 1 / BINS).sum())
    peak, even = float(shares.max()), 2 / BINS
    concentration = 1.0 if peak <= even else 1.0 - min(1.0, (peak - even) / (0.5 - even))
    return {"chi2": math.exp(-chi2), "concentration": concentration, "range": int(np.count_nonzero(shares)) / BINS}


def continuity(depth: np.ndarray, valid: np.ndarray, count: int) -> float:
    """s_grad: 1 / (1 + std / mean) of the gradient's length where it is no edge; NaN of fewer than LEAST gradients."""
    return _continuity(*_slopes(depth, valid, count))


def _slopes(depth: np.ndarray, valid: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The gradient's length inside the border, (H-2,W-2), and where it is known, None for everywhere."""
    if min(depth.shape) < 3:
        return np.zeros((0, 0), np.float32), None
    across = np.subtract(depth[1:-1, 2:], depth[1:-1, :-2])
    down = np.subtract(depth[2:, 1:-1], depth[:-2, 1:-1])
    lengths = cv2.magnitude(across, down)
    lengths *= 0.5
    return lengths, None if count == valid.size else cv2.erode(valid.astype(np.uint8), _CROSS)[1:-1, 1:-1] > 0


def _continuity(lengths: np.ndarray, known: np.ndarray | None) -> float:
    flat = lengths.ravel() if known is None else lengths[known]
    if flat.size < LEAST:
        return math.nan
    kept = flat.size - int(EDGES * flat.size)
    inner = np.partition(flat, kept - 1)[:kept] if kept < flat.size else flat
    mean, std = (float(value.ravel()[0]) for value in cv2.meanStdDev(inner))
    return 1.0 / (1.0 + std / mean) if mean > 0 else 0.0


def _roughness(depth: np.ndarray, lengths: np.ndarray, known: np.ndarray | None) -> float:
    """Median of the Laplacian's size over the median of the gradient's length, every 16th pixel; NaN without slopes.

    Ours. s_grad cannot see noise: the gradients of noise are all alike in length (CV 0.52, so s_grad 0.66), more so
    than those of a room's planes. A plane has no Laplacian; white noise has about five times its gradient.
    """
    if not lengths.size:
        return math.nan
    # Every fourth row and column, but for small maps, which have too few.
    step = 4 if min(depth.shape) >= 256 else 1
    inside, before, after = slice(1, -1, step), slice(0, -2, step), slice(2, None, step)
    bends = depth[before, inside] + depth[after, inside] + depth[inside, before] + depth[inside, after]
    bends -= 4 * depth[inside, inside]
    slopes = lengths[::step, ::step]
    if known is not None:
        bends, slopes = bends[known[::step, ::step]], slopes[known[::step, ::step]]
    if slopes.size < LEAST:
        return math.nan
    slope = _median(slopes)
    return _median(np.abs(bends)) / slope if slope > 0 else math.nan


def _median(values: np.ndarray) -> float:
    """numpy's median, which takes five times as long."""
    half = values.size // 2
    parted = np.partition(values.ravel(), half)
    return float(parted[half]) if values.size % 2 else (float(parted[half]) + float(parted[:half].max())) / 2


# --- ours: the map beside its image -----------------------------------------------------------------------------------


def image_scores(
    image: np.ndarray, depth: np.ndarray, valid: np.ndarray, *, larger_is_nearer: bool
) -> dict[str, float]:
    """edges, sky and sharpness of an image (H,W,3) uint8 and the map (H,W) of it."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    nearness = depth if larger_is_nearer else _inverse(depth, valid)
    return {
        "edges": misalignment(grey, nearness, valid),
        "sky": sky_share(nearness, valid),
        "sharpness": float(cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_32F))[1].ravel()[0] ** 2),
    }


def _inverse(depth: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """One over the depth, 0 where it is unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.reciprocal(depth)
    found[~(valid & (depth > 0))] = 0.0
    return found


def misalignment(grey: np.ndarray, nearness: np.ndarray, valid: np.ndarray) -> float:
    """How the image looks at the depth's edges: 0 if it is steeper there than anywhere else, 0.5 if as anywhere; NaN
    without edges.

    Depth Anything 3 leaves out pictures of IRS whose Canny edges do not meet; it gives no thresholds, and with any a
    textured image meets every edge by chance. Ours: the share of pixels whose image gradient (the largest within two
    pixels) is above that of a depth edge, the mean over depth edges. Edges are Canny's with 50 and 100 in a map whose
    2nd to 98th percentile is 0 to 255; one between valid and not is none.
    """
    known = nearness.ravel() if valid.all() else nearness[valid]
    if known.size < LEAST:
        return math.nan
    low, high = np.quantile(known[:: max(1, known.size // 4096)], (0.02, 0.98))
    if not high > low:
        return math.nan
    scaled = ((np.where(valid, nearness, low) - low) * (255.0 / (high - low))).clip(0, 255).astype(np.uint8)
    around = np.ones((5, 5), np.uint8)
    everywhere = known.size == valid.size
    inside = valid if everywhere else cv2.erode(valid.astype(np.uint8), around) > 0
    edges = (cv2.Canny(scaled, 50, 100) > 0) & inside
    if np.count_nonzero(edges) < LEAST:
        return math.nan
    smooth = cv2.GaussianBlur(grey, (0, 0), 0.8)
    steep = cv2.magnitude(cv2.Sobel(smooth, cv2.CV_32F, 1, 0, ksize=3), cv2.Sobel(smooth, cv2.CV_32F, 0, 1, ksize=3))
    steep = cv2.dilate(steep, around)
    every = steep.ravel() if everywhere else steep[inside]
    every = np.sort(every[:: max(1, every.size // 4096)])
    at = steep[edges]
    # Ties count half: a flat image says nothing.
    ranks = np.searchsorted(every, at, "left") + np.searchsorted(every, at, "right")
    return 1.0 - float(ranks.mean()) / (2 * every.size)


def sky_share(nearness: np.ndarray, valid: np.ndarray) -> float:
    """The share of pixels that are unknown, or no nearer than a hundredth of the range, and joined to the top row."""
    known = nearness[valid]
    far = ~valid
    if known.size:
        far = far | (nearness <= known.min() + 0.01 * (known.max() - known.min()))
    if not far[0].any():
        return 0.0
    _, parts = cv2.connectedComponents(far.astype(np.uint8), connectivity=4)
    top = np.unique(parts[0][far[0]])
    return float(np.isin(parts, top).mean())
