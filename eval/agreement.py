"""How far two depth maps of one image agree, whatever their scales: pure measures with known answers.

Every map is first brought to disparity without a known scale or shift (`to_disparity`), so that teachers of every kind
can meet. The measures know nothing of teachers: a ground truth is one more map. They are the same in both directions,
and an affine copy of a map agrees with it perfectly: error 0, order 1, edges 1, sky 0.

All of them are ours; where a known one stands behind it, the function says so.

Shapes: B batch, H height, W width. Maps are (B,H,W) float32 with a (B,H,W) bool mask; answers are (B,), NaN where two
maps say nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.align import apply_affine, fit_affine
from distill.core.depth import DepthMap, Kind

JUMPS = (0.02, 0.04, 0.06, 0.08, 0.10)
"""Thresholds of an edge: what a map jumps by within `reach`, as a fraction of its own range."""
DETAIL = 0.04
"""The one threshold where a single map of edges is needed."""
SKY = 0.02
"""A pixel is at a map's far end within this fraction of its range."""
CELLS = 8
"""An image is cut into CELLS x CELLS regions to ask where one map is better than another."""
_MARGIN = 0.03
_OFFSETS = 36
_MOST = 100_000  # pixels that a quantile is taken of, evenly spread: sorting them all is most of the time


# --- one space for all ------------------------------------------------------------------------------------------------


def to_disparity(depth: DepthMap, reference: DepthMap | None = None) -> DepthMap:
    """The same maps as affine disparity.

    Depth whose shift is known is inverted. Depth with an unknown shift (affine_depth) has no disparity of its own: it
    becomes 1 / (d + c), d from 0 to 1, with the c of 36 between 0.01 and 30 whose result is closest to `reference` (a
    disparity) up to scale and shift. So it is shown in its best light. Without a reference it is negated: its order and
    its edges are right, its distances are not.
    """
    if depth.kind.quantity == "disparity":
        return DepthMap(depth.values, depth.valid & torch.isfinite(depth.values), Kind.AFFINE_DISPARITY)
    if depth.kind.unknown != "affine":
        turned = depth.convert(f"{depth.kind.unknown}_disparity")
        return DepthMap(turned.values, turned.valid, Kind.AFFINE_DISPARITY)
    valid = depth.valid & torch.isfinite(depth.values)
    low, high = _range(depth.values, valid, (0.0, 1.0))
    unit = (depth.values - low[:, None, None]) / (high - low).clamp(min=1e-12)[:, None, None]
    if reference is None:
        return DepthMap(-unit, valid, Kind.AFFINE_DISPARITY)
    both = valid & reference.valid
    best, chosen = torch.full((len(unit),), -2.0), torch.zeros_like(unit)
    for offset in torch.logspace(-2, 1.5, _OFFSETS).tolist():
        turned_values = 1.0 / (unit.clamp(min=0.0) + offset)
        parts = correlation(turned_values, reference.values, both).cpu()
        better = parts > best
        best = torch.where(better, parts, best)
        chosen = torch.where(better.to(unit.device)[:, None, None], turned_values, chosen)
    return DepthMap(chosen, valid, Kind.AFFINE_DISPARITY)


def _range(values: Tensor, valid: Tensor, ends: tuple[float, float] = (0.02, 0.98)) -> tuple[Tensor, Tensor]:
    """The values at two quantiles of each map's valid pixels, (B,) each; 0 and 0 where there is none."""
    lows, highs = [], []
    for one, usable in zip(values, valid, strict=True):
        kept = one[usable]
        if not len(kept):
            kept = one.new_zeros(1)
        if ends == (0.0, 1.0):
            low, high = kept.aminmax()
        else:
            low, high = torch.quantile(kept[:: -(-len(kept) // _MOST)], kept.new_tensor(ends))
        lows.append(low)
        highs.append(high)
    return torch.stack(lows), torch.stack(highs)


# --- how far apart ----------------------------------------------------------------------------------------------------


def correlation(first: Tensor, second: Tensor, valid: Tensor) -> Tensor:
    """Pearson's r over the valid pixels; NaN below two of them, 0 where one map is constant and 1 where both are."""
    count = valid.sum((-2, -1)).clamp(min=1).double()
    centred = []
    for values in (first, second):
        values64 = torch.where(valid, values, 0.0).double()
        mean = values64.sum((-2, -1)) / count
        centred.append((torch.where(valid, values64 - mean[:, None, None], 0.0), mean))
    (a, mean_a), (b, mean_b) = centred
    power_a, power_b = (v.square().sum((-2, -1)) for v in (a, b))
    # Below float32 resolution a spread is rounding, not signal.
    flat_a = power_a <= count * mean_a.square() * 1e-13
    flat_b = power_b <= count * mean_b.square() * 1e-13
    r = (a * b).sum((-2, -1)) / (power_a * power_b).clamp(min=1e-300).sqrt()
    r = torch.where(flat_a | flat_b, (flat_a & flat_b).double(), r.clamp(-1, 1))
    return torch.where(valid.sum((-2, -1)) >= 2, r, torch.nan).float()


def alignment_error(first: Tensor, second: Tensor, valid: Tensor) -> Tensor:
    """What is left after the best scale (not negative) and shift, as a fraction of the target's spread: 0 to 1.

    Root mean square over standard deviation, sqrt(1 - r^2): least squares gives the same whichever map is fitted.
    """
    r = correlation(first, second, valid).double().clamp(min=0.0)
    return (1 - r.square()).clamp(min=0.0).sqrt().float()


def residual(pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """(B,H,W) what is left of `target` after `pred` is fitted to it, over the target's spread; 0 where not valid."""
    scale, shift = fit_affine(pred, target, valid)
    count = valid.sum((-2, -1)).clamp(min=1)
    mean = torch.where(valid, target, 0.0).sum((-2, -1)) / count
    power = torch.where(valid, target - mean[:, None, None], 0.0).square().sum((-2, -1)) / count
    left = apply_affine(pred, scale, shift) - target
    return torch.where(valid, left / power.sqrt().clamp(min=1e-12)[:, None, None], 0.0)


def ordinal_agreement(first: Tensor, second: Tensor, valid: Tensor, *, pairs: int = 4096, seed: int = 0) -> Tensor:
    """How often two maps agree which of two random points is nearer, as DA-2K asks it: 1 always, 0.5 by chance.

    A pair counts where either map puts 3 % of its range between the points; a pair that one of the maps holds for equal
    is half an agreement.
    """
    parts = []
    spreads = [(high - low).clamp(min=1e-12) for low, high in (_range(m, valid) for m in (first, second))]
    for i, usable in enumerate(valid):
        index = usable.flatten().nonzero().flatten()
        if len(index) < 2:
            parts.append(first.new_tensor(torch.nan))
            continue
        rng = torch.Generator().manual_seed(seed)
        chosen = index[torch.randint(len(index), (2, pairs), generator=rng).to(index.device)]
        steps = []
        for values, spread in zip((first, second), spreads, strict=True):
            near, far = values[i].flatten()[chosen] / spread[i]
            steps.append(near - far)
        counts = torch.maximum(steps[0].abs(), steps[1].abs()) > _MARGIN
        same = 0.5 + 0.5 * steps[0].sign() * steps[1].sign()
        parts.append(same[counts].mean() if counts.any() else first.new_tensor(torch.nan))
    return torch.stack(parts)


# --- edges ------------------------------------------------------------------------------------------------------------


def reach(height: int, width: int) -> int:
    """The pixels across which a jump is measured: a hundredth of the longer side, so that size changes no measure."""
    return max(1, round(max(height, width) / 100))


def _across(values: Tensor, valid: Tensor, pixels: int) -> Tensor:
    """(B,H,W): the larger of the differences across `pixels` columns and rows, centred; 0 beside invalid pixels."""
    before, after = pixels // 2, pixels - pixels // 2
    columns = (values[..., pixels:] - values[..., :-pixels]).abs() * (valid[..., pixels:] & valid[..., :-pixels])
    rows = (values[:, pixels:] - values[:, :-pixels]).abs() * (valid[:, pixels:] & valid[:, :-pixels])
    return torch.maximum(F.pad(columns, (before, after)), F.pad(rows, (0, 0, before, after)))


def _jumps(values: Tensor, valid: Tensor) -> Tensor:
    """(B,H,W): how far a map jumps within `reach`, over its range."""
    low, high = _range(values, valid)
    unit = torch.where(valid, values, 0.0) / (high - low).clamp(min=1e-12)[:, None, None]
    unit = torch.where((high > low)[:, None, None], unit, 0.0)
    return _across(unit, valid, reach(*valid.shape[-2:]))


def _around(edges: Tensor) -> Tensor:
    """Edges grown by half the reach, a pixel at least."""
    pixels = max(1, reach(*edges.shape[-2:]) // 2)
    return F.max_pool2d(edges.float()[:, None], 2 * pixels + 1, stride=1, padding=pixels)[:, 0] > 0


def edges(values: Tensor, valid: Tensor, *, jump: float = DETAIL) -> Tensor:
    """(B,H,W) bool: where a map jumps by more than `jump` of its own range within `reach`, along a row or a column."""
    return _jumps(values, valid) > jump


def edge_agreement(first: Tensor, second: Tensor, valid: Tensor) -> Tensor:
    """F1 of two maps' edges, half the reach of tolerance; the mean over JUMPS, weighted by them.

    A threshold at which neither map has an edge is left out; NaN where that holds for all of them. The weights are
    Depth Pro's (distill.eval.boundary).
    """
    jumps = _jumps(first, valid), _jumps(second, valid)
    total, weights = torch.zeros(len(first)), torch.zeros(len(first))
    for threshold in JUMPS:
        a, b = (jump > threshold for jump in jumps)
        num_a, num_b = (edge.sum((-2, -1)).cpu() for edge in (a, b))
        hit_a = (a & _around(b)).sum((-2, -1)).cpu() / num_a.clamp(min=1)
        hit_b = (b & _around(a)).sum((-2, -1)).cpu() / num_b.clamp(min=1)
        f1 = 2 * hit_a * hit_b / (hit_a + hit_b).clamp(min=1e-12)
        there = (num_a + num_b > 0).float()
        total, weights = total + threshold * f1 * there, weights + threshold * there
    return torch.where(weights > 0, total / weights.clamp(min=1e-12), torch.nan)


def sharpness(values: Tensor, valid: Tensor) -> Tensor:
    """How steep a map's steps are: the mean jump within `reach`, weighted by the jumps; 1 is the map's whole range.

    A step of height h gives h, the same step smeared over w times the reach h / w. Noise is steep too; see
    `edges_on_image`.
    """
    jumps = _jumps(values, valid).flatten(1)
    return jumps.square().sum(1) / jumps.sum(1).clamp(min=1e-12)


def image_edges(images: Tensor, *, jump: float = 0.05) -> Tensor:
    """(B,H,W) bool of images (B,3,H,W) in [0,1]: near a step in brightness above `jump` between neighbours."""
    grey = images.mean(1)
    return _around(_across(grey, torch.ones_like(grey, dtype=torch.bool), 1) > jump)


def edges_on_image(values: Tensor, valid: Tensor, image: Tensor) -> Tensor:
    """The share of a map's edges that lie on the image's (see `image_edges`); NaN where the map has none."""
    own_edges = edges(values, valid)
    return torch.where(
        own_edges.any(-1).any(-1), (own_edges & image).sum((-2, -1)) / own_edges.sum((-2, -1)).clamp(min=1), torch.nan
    )


# --- the far end ------------------------------------------------------------------------------------------------------


def far_end(values: Tensor, valid: Tensor) -> Tensor:
    """(B,H,W) bool: what a map calls sky: declared invalid, or within SKY of its range from its farthest value."""
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
    left = residual(pred, truth, valid).abs()
    height, width = valid.shape[-2:]
    rows, columns = (torch.arange(side, device=pred.device) * cells // side for side in (height, width))
    place = (rows[:, None] * cells + columns).flatten().expand(len(pred), -1)
    zero = left.new_zeros(len(pred), cells * cells)
    total = zero.scatter_add(1, place, left.flatten(1))
    count = zero.scatter_add(1, place, valid.flatten(1).float())
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def oracle_gain(primary: Tensor, assistant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(gain, mixing, share), each (B,): how much less error if the better of two maps were known in each region.

    primary, assistant: `region_errors`. gain: 1 - mean(min(primary, assistant)) / mean(primary), 0 where the assistant
    is nowhere better. mixing: the same over the better of the two: 0 where one is better everywhere, and the only one
    that says they belong together. Both are upper bounds of what a rule of choosing can win; two equally good maps with
    independent errors mix well too. share: of the regions where the assistant is better.
    """
    usable = ~(primary.isnan() | assistant.isnan())
    count = usable.sum(1).clamp(min=1)
    base, other = (torch.where(usable, errors, 0.0).sum(1) / count for errors in (primary, assistant))
    best = torch.where(usable, torch.minimum(primary, assistant), 0.0).sum(1) / count
    share = (usable & (assistant < primary)).sum(1) / count
    there = usable.any(1)
    lesser = torch.minimum(base, other)
    gain, mixing = (torch.where(of > 0, 1 - best / of.clamp(min=1e-12), 0.0) for of in (base, lesser))
    parts = [torch.where(there, value, torch.nan) for value in (gain, mixing, share)]
    return parts[0], parts[1], parts[2]


def new_edges(primary: Tensor, assistant: Tensor, valid: Tensor, image: Tensor) -> Tensor:
    """How many of the assistant's edges on the image's edges are not half as steep in the primary nearby, as a share.

    What needs no truth: an edge that both the picture and the assistant show, and the primary lacks or blurs, is news.
    Noise has edges everywhere, and so on the picture's too: as many as the assistant has off the picture's edges, by
    area, are taken for chance and not counted. The share is of such edges of the assistant or of the primary, whichever
    has more, so that a few odd ones beside a sharp primary are little. NaN where neither has one.
    """
    steep, known = _jumps(assistant, valid), _jumps(primary, valid)
    confirmed = (steep > DETAIL) & image
    near = max(2, reach(*valid.shape[-2:]))
    nearby = F.max_pool2d(known[:, None], 2 * near + 1, stride=1, padding=near)[:, 0]
    lacking = (steep > DETAIL) & (nearby < 0.5 * steep)
    on, off = (lacking & image).sum((-2, -1)), (lacking & ~image).sum((-2, -1))
    area_on, area_off = (valid & image).sum((-2, -1)), (valid & ~image).sum((-2, -1))
    news = (on - off * area_on / area_off.clamp(min=1)).clamp(min=0)
    count = torch.maximum(confirmed.sum((-2, -1)), ((known > DETAIL) & image).sum((-2, -1)))
    return torch.where(count > 0, news / count.clamp(min=1), torch.nan)
