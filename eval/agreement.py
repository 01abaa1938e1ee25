"""Scale-free measures of how far two depth maps of one image agree.

Every map is first converted to disparity of unknown scale and shift (`to_disparity`), so that teachers of every kind
can be compared. The measures do not depend on teachers: a ground truth is one more map. The agreement measures are
symmetric, and an affine copy of a map agrees with it perfectly: error 0, order 1, edges 1, sky 0.

All of them are ours; where one is based on a known measure, the function's docstring says so.

Shapes: B batch, H height, W width. Maps are (B,H,W) float32 with a (B,H,W) bool mask; results are (B,), NaN where a
measure is undefined.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.align import apply_affine, fit_affine
from distill.core.depth import DepthMap, Kind

JUMPS = (0.02, 0.04, 0.06, 0.08, 0.10)
"""Edge thresholds: the change of a map within `reach`, as a fraction of its own range."""
DETAIL = 0.04
"""The threshold used where a single edge map is needed."""
SKY = 0.02
"""A pixel within this fraction of a map's range from its farthest value is at the map's far end."""
CELLS = 8
"""An image is cut into CELLS x CELLS regions to find where one map is better than another."""
_MARGIN = 0.03
_OFFSETS = 36
_QUANTILE_PIXELS = 100_000  # evenly spread pixels that a quantile is taken of: sorting all takes most of the time


# --- conversion to disparity ------------------------------------------------------------------------------------------


def to_disparity(depth: DepthMap, reference: DepthMap | None = None) -> DepthMap:
    """Convert maps to affine disparity.

    Depth with a known shift is inverted. Depth with an unknown shift (affine_depth) has no unique disparity: it becomes
    1 / (d + c), d scaled to 0..1, where c is the one of 36 values between 0.01 and 30 whose result is closest to
    `reference` (a disparity) up to scale and shift, the most favourable choice. Without a reference the depth is
    negated: its order and its edges are right, its distances are not.
    """
    if depth.kind.quantity == "disparity":
        return DepthMap(depth.values, depth.valid & torch.isfinite(depth.values), Kind.AFFINE_DISPARITY)
    if depth.kind.unknown != "affine":
        converted = depth.convert(f"{depth.kind.unknown}_disparity")
        return DepthMap(converted.values, converted.valid, Kind.AFFINE_DISPARITY)
    valid = depth.valid & torch.isfinite(depth.values)
    low, high = _range(depth.values, valid, (0.0, 1.0))
    unit = (depth.values - low[:, None, None]) / (high - low).clamp(min=1e-12)[:, None, None]
    if reference is None:
        return DepthMap(-unit, valid, Kind.AFFINE_DISPARITY)
    both = valid & reference.valid
    best, best_values = torch.full((len(unit),), -2.0), torch.zeros_like(unit)
    for offset in torch.logspace(-2, 1.5, _OFFSETS).tolist():
        candidate = 1.0 / (unit.clamp(min=0.0) + offset)
        similarity = correlation(candidate, reference.values, both).cpu()
        better = similarity > best
        best = torch.where(better, similarity, best)
        best_values = torch.where(better.to(unit.device)[:, None, None], candidate, best_values)
    return DepthMap(best_values, valid, Kind.AFFINE_DISPARITY)


def _range(values: Tensor, valid: Tensor, ends: tuple[float, float] = (0.02, 0.98)) -> tuple[Tensor, Tensor]:
    """The values at two quantiles of each map's valid pixels, (B,) each; 0 and 0 without a valid pixel."""
    lows, highs = [], []
    for map_values, mask in zip(values, valid, strict=True):
        usable = map_values[mask]
        if not len(usable):
            usable = map_values.new_zeros(1)
        if ends == (0.0, 1.0):
            low, high = usable.aminmax()
        else:
            low, high = torch.quantile(usable[:: -(-len(usable) // _QUANTILE_PIXELS)], usable.new_tensor(ends))
        lows.append(low)
        highs.append(high)
    return torch.stack(lows), torch.stack(highs)


# --- agreement of values ----------------------------------------------------------------------------------------------


def correlation(first: Tensor, second: Tensor, valid: Tensor) -> Tensor:
    """Pearson's r over the valid pixels; NaN for fewer than two, 0 if one map is constant, 1 if both are."""
    count = valid.sum((-2, -1)).clamp(min=1).double()
    centred = []
    for values in (first, second):
        values64 = torch.where(valid, values, 0.0).double()
        mean = values64.sum((-2, -1)) / count
        centred.append((torch.where(valid, values64 - mean[:, None, None], 0.0), mean))
    (a, mean_a), (b, mean_b) = centred
    power_a, power_b = (v.square().sum((-2, -1)) for v in (a, b))
    # A spread below float32 resolution is rounding error, not signal.
    flat_a = power_a <= count * mean_a.square() * 1e-13
    flat_b = power_b <= count * mean_b.square() * 1e-13
    r = (a * b).sum((-2, -1)) / (power_a * power_b).clamp(min=1e-300).sqrt()
    r = torch.where(flat_a | flat_b, (flat_a & flat_b).double(), r.clamp(-1, 1))
    return torch.where(valid.sum((-2, -1)) >= 2, r, torch.nan).float()


def alignment_error(first: Tensor, second: Tensor, valid: Tensor) -> Tensor:
    """The residual after the best scale (not negative) and shift, as a fraction of the target's spread: 0 to 1.

    Root mean square over standard deviation, sqrt(1 - r^2): least squares gives the same value whichever map is fitted.
    """
    r = correlation(first, second, valid).double().clamp(min=0.0)
    return (1 - r.square()).clamp(min=0.0).sqrt().float()


def residual(pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """The residual (B,H,W) of `pred` fitted to `target`, over the target's spread; 0 where not valid."""
    scale, shift = fit_affine(pred, target, valid)
    count = valid.sum((-2, -1)).clamp(min=1)
    mean = torch.where(valid, target, 0.0).sum((-2, -1)) / count
    power = torch.where(valid, target - mean[:, None, None], 0.0).square().sum((-2, -1)) / count
    error = apply_affine(pred, scale, shift) - target
    return torch.where(valid, error / power.sqrt().clamp(min=1e-12)[:, None, None], 0.0)


def ordinal_agreement(first: Tensor, second: Tensor, valid: Tensor, *, pairs: int = 4096, seed: int = 0) -> Tensor:
    """How often two maps agree on which of two random points is nearer, as in DA-2K: 1 always, 0.5 by chance.

    A pair counts if the points differ by more than 3 % of the range in either map; a pair that is a tie in one of the
    maps is half an agreement.
    """
    agreements = []
    spreads = [(high - low).clamp(min=1e-12) for low, high in (_range(m, valid) for m in (first, second))]
    for i, usable in enumerate(valid):
        index = usable.flatten().nonzero().flatten()
        if len(index) < 2:
            agreements.append(first.new_tensor(torch.nan))
            continue
        rng = torch.Generator().manual_seed(seed)
        points = index[torch.randint(len(index), (2, pairs), generator=rng).to(index.device)]
        differences = []
        for values, spread in zip((first, second), spreads, strict=True):
            near, far = values[i].flatten()[points] / spread[i]
            differences.append(near - far)
        counted = torch.maximum(differences[0].abs(), differences[1].abs()) > _MARGIN
        same = 0.5 + 0.5 * differences[0].sign() * differences[1].sign()
        agreements.append(same[counted].mean() if counted.any() else first.new_tensor(torch.nan))
    return torch.stack(agreements)


# --- edges ------------------------------------------------------------------------------------------------------------


def reach(height: int, width: int) -> int:
    """Pixels across which a jump is measured: a hundredth of the longer side, so that size changes no measure."""
    return max(1, round(max(height, width) / 100))


def _across(values: Tensor, valid: Tensor, pixels: int) -> Tensor:
    """The larger of the centred differences across `pixels` columns and rows, (B,H,W); 0 next to invalid pixels."""
    before, after = pixels // 2, pixels - pixels // 2
    columns = (values[..., pixels:] - values[..., :-pixels]).abs() * (valid[..., pixels:] & valid[..., :-pixels])
    rows = (values[:, pixels:] - values[:, :-pixels]).abs() * (valid[:, pixels:] & valid[:, :-pixels])
    return torch.maximum(F.pad(columns, (before, after)), F.pad(rows, (0, 0, before, after)))


def _jumps(values: Tensor, valid: Tensor) -> Tensor:
    """How far a map jumps within `reach`, as a fraction of its range, (B,H,W)."""
    low, high = _range(values, valid)
    unit = torch.where(valid, values, 0.0) / (high - low).clamp(min=1e-12)[:, None, None]
    unit = torch.where((high > low)[:, None, None], unit, 0.0)
    return _across(unit, valid, reach(*valid.shape[-2:]))


def _dilated(edges: Tensor) -> Tensor:
    """Edges dilated by half the reach, at least by one pixel."""
    pixels = max(1, reach(*edges.shape[-2:]) // 2)
    return F.max_pool2d(edges.float()[:, None], 2 * pixels + 1, stride=1, padding=pixels)[:, 0] > 0


def edges(values: Tensor, valid: Tensor, *, jump: float = DETAIL) -> Tensor:
    """(B,H,W) bool: where a map jumps by more than `jump` of its own range within `reach`, along a row or a column."""
    return _jumps(values, valid) > jump


def edge_agreement(first: Tensor, second: Tensor, valid: Tensor) -> Tensor:
    """F1 of two maps' edges with a tolerance of half the reach; the mean over JUMPS, weighted by threshold.

    A threshold at which neither map has an edge is left out; NaN where that holds for all of them. The weights are
    Depth Pro's (distill.eval.boundary).
    """
    jumps = _jumps(first, valid), _jumps(second, valid)
    total, weights = torch.zeros(len(first)), torch.zeros(len(first))
    for threshold in JUMPS:
        a, b = (jump > threshold for jump in jumps)
        num_a, num_b = (edge.sum((-2, -1)).cpu() for edge in (a, b))
        hit_a = (a & _dilated(b)).sum((-2, -1)).cpu() / num_a.clamp(min=1)
        hit_b = (b & _dilated(a)).sum((-2, -1)).cpu() / num_b.clamp(min=1)
        f1 = 2 * hit_a * hit_b / (hit_a + hit_b).clamp(min=1e-12)
        has_edges = (num_a + num_b > 0).float()
        total, weights = total + threshold * f1 * has_edges, weights + threshold * has_edges
    return torch.where(weights > 0, total / weights.clamp(min=1e-12), torch.nan)


def sharpness(values: Tensor, valid: Tensor) -> Tensor:
    """How steep a map's steps are: the mean jump within `reach`, weighted by the jumps; 1 is the map's whole range.

    A step of height h gives h; the same step smeared over w times the reach gives h / w. Noise is steep too; see
    `edges_on_image`.
    """
    jumps = _jumps(values, valid).flatten(1)
    return jumps.square().sum(1) / jumps.sum(1).clamp(min=1e-12)


def image_edges(images: Tensor, *, jump: float = 0.05) -> Tensor:
    """(B,H,W) bool of images (B,3,H,W) in [0,1]: pixels near a brightness step above `jump` between neighbours."""
    grey = images.mean(1)
    return _dilated(_across(grey, torch.ones_like(grey, dtype=torch.bool), 1) > jump)


def edges_on_image(values: Tensor, valid: Tensor, image: Tensor) -> Tensor:
    """The share of a map's edges that lie on the image's edges (`image_edges`); NaN if the map has none."""
    own_edges = edges(values, valid)
    return torch.where(
        own_edges.any(-1).any(-1), (own_edges & image).sum((-2, -1)) / own_edges.sum((-2, -1)).clamp(min=1), torch.nan
    )


# --- the far end ------------------------------------------------------------------------------------------------------


def far_end(values: Tensor, valid: Tensor) -> Tensor:
    """(B,H,W) bool: pixels that a map treats as sky: invalid, or within SKY of its range from its farthest value."""
    low, _ = _range(values, valid, (0.0, 1.0))
    _, high = _range(values, valid)
    limit = low + SKY * (high - low).clamp(min=0.0)
    return ~valid | (values <= limit[:, None, None])


def sky_disagreement(first: DepthMap, second: DepthMap) -> Tensor:
    """The share of the image that one map puts at its far end and the other does not."""
    a, b = (far_end(m.values, m.valid) for m in (first, second))
    return (a ^ b).float().mean((-2, -1))


# --- what a second map adds -------------------------------------------------------------------------------------------


def region_errors(pred: Tensor, truth: Tensor, valid: Tensor, *, cells: int = CELLS) -> Tensor:
    """(B, cells x cells) mean absolute `residual` of a map against the truth, by regions; NaN where no pixel is valid.

    The map is aligned once, to the whole image.
    """
    error = residual(pred, truth, valid).abs()
    height, width = valid.shape[-2:]
    rows, columns = (torch.arange(side, device=pred.device) * cells // side for side in (height, width))
    cell = (rows[:, None] * cells + columns).flatten().expand(len(pred), -1)
    zero = error.new_zeros(len(pred), cells * cells)
    total = zero.scatter_add(1, cell, error.flatten(1))
    count = zero.scatter_add(1, cell, valid.flatten(1).float())
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def oracle_gain(primary: Tensor, assistant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much choosing the better of two maps in each region reduces the error: (gain, mixing, share), each (B,).

    primary, assistant: `region_errors`. gain: 1 - mean(min(primary, assistant)) / mean(primary), 0 where the assistant
    is nowhere better. mixing: the same relative to the better of the two maps: 0 where one is better everywhere; only
    this number shows that they complement each other. Both are upper bounds of what a selection rule can gain; two
    equally good maps with independent errors also mix well. share: the share of regions where the assistant is better.
    """
    usable = ~(primary.isnan() | assistant.isnan())
    count = usable.sum(1).clamp(min=1)
    base, other = (torch.where(usable, errors, 0.0).sum(1) / count for errors in (primary, assistant))
    best = torch.where(usable, torch.minimum(primary, assistant), 0.0).sum(1) / count
    share = (usable & (assistant < primary)).sum(1) / count
    defined = usable.any(1)
    smaller = torch.minimum(base, other)
    gain, mixing = (torch.where(error > 0, 1 - best / error.clamp(min=1e-12), 0.0) for error in (base, smaller))
    results = [torch.where(defined, value, torch.nan) for value in (gain, mixing, share)]
    return results[0], results[1], results[2]


def new_edges(primary: Tensor, assistant: Tensor, valid: Tensor, image: Tensor) -> Tensor:
    """The share of the assistant's edges on image edges that are less than half as steep in the primary nearby.

    It needs no ground truth: an edge that both the image and the assistant show, and the primary lacks or blurs, is
    new. Noise has edges everywhere, on image edges too: as many as lie off the image edges, by area, are attributed to
    chance and subtracted. The share is relative to the edges on image edges of the assistant or of the primary,
    whichever has more, so that a few odd ones beside a sharp primary count little. NaN where neither has one.
    """
    assistant_jumps, primary_jumps = _jumps(assistant, valid), _jumps(primary, valid)
    confirmed = (assistant_jumps > DETAIL) & image
    radius = max(2, reach(*valid.shape[-2:]))
    nearby = F.max_pool2d(primary_jumps[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]
    lacking = (assistant_jumps > DETAIL) & (nearby < 0.5 * assistant_jumps)
    on, off = (lacking & image).sum((-2, -1)), (lacking & ~image).sum((-2, -1))
    area_on, area_off = (valid & image).sum((-2, -1)), (valid & ~image).sum((-2, -1))
    new = (on - off * area_on / area_off.clamp(min=1)).clamp(min=0)
    count = torch.maximum(confirmed.sum((-2, -1)), ((primary_jumps > DETAIL) & image).sum((-2, -1)))
    return torch.where(count > 0, new / count.clamp(min=1), torch.nan)
