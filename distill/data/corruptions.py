"""Synthetic teachers with known errors: ground truth, corrupted in the ways in which real teachers fail.

For experiments that need to know the right answer. A map is converted to disparity and corrupted in this order:
far noise, warp, blur, range. The random numbers are seeded with the crop's key, so that a rerun gives the same labels;
a fixed `layout` is seeded with its own number.

    blur       Gaussian sigma in pixels of the given map: a patch at native resolution keeps more detail than the region
    far_noise  noise on the farther half of the map: standard deviation of the log disparity at the farthest pixel
    warp       large-scale layout errors, smooth over a third of the map: standard deviation of the log disparity
    layout     0: every map has its own layout error, which a student averages away. Another number, used as a seed: all
               maps share one layout error, which can be learnt
    common     share of such a layout's variance that is the same for every teacher: the errors of two teachers
               correlate by the square root of the product of their shares
    own_range  each map is normalized to its own 2 to 98 % range, as by teachers of affine disparity; regions and
               patches then differ by a scale and a shift, and the kind becomes affine_disparity
    drift      in addition, a random scale (log-normal) and shift per map, as a fraction of its range
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.crops import generator
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Labels

FIELD = 3
"""Grid cells per side of the smooth random field of `warp`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corruptions:
    """Kinds and strengths of corruption, explained in the module's docstring. All 0: the ground truth as disparity."""

    blur: float = 0.0
    far_noise: float = 0.0
    warp: float = 0.0
    layout: int = 0
    common: float = 0.0
    own_range: bool = False
    drift: float = 0.0

    def __post_init__(self) -> None:
        if min(self.blur, self.far_noise, self.warp, self.drift) < 0:
            raise ValueError("blur, far_noise, warp and drift must not be negative")
        if not 0.0 <= self.common <= 1.0 or (self.common and not self.layout):
            raise ValueError("common, the share of a layout that all maps have, must be in [0, 1]; it needs layout > 0")
        if self.drift and not self.own_range:
            raise ValueError("drift is a fraction of a map's own range: it needs own_range = true")

    def apply(self, truth: DepthMap, key: str) -> DepthMap:
        """Corrupt one map (1,H,W) of depth or disparity without unknown shift. key: the seed of the random numbers."""
        disparity = truth.convert(Kind(f"{truth.kind.unknown}_disparity"))
        values, valid = disparity.values, disparity.valid
        if not valid.any():
            return DepthMap(values, valid, Kind.AFFINE_DISPARITY if self.own_range else disparity.kind)
        random = generator("faults", key)
        height, width = values.shape[-2:]
        pixels = torch.from_numpy(random.standard_normal((1, height, width))).float()
        cells = torch.from_numpy(random.standard_normal((1, 1, FIELD + 1, FIELD + 1))).float()
        scale, shift = random.standard_normal(2)
        if self.far_noise:
            values = values * torch.exp(self.far_noise * _farness(values, valid) * pixels)
        if self.warp:
            cells = self._layout() if self.layout else cells
            field = F.interpolate(cells, size=(height, width), mode="bicubic", align_corners=True)[0]
            values = values * torch.exp(self.warp * field)
        if self.blur:
            values = _blurred(values, valid, self.blur)
        if not self.own_range:
            return DepthMap(torch.where(valid, values, 0.0), valid, disparity.kind)
        low, high = torch.quantile(values[valid], torch.tensor([0.02, 0.98])).tolist()
        values = (values - low) / max(high - low, 1e-6)
        values = math.exp(self.drift * scale) * (values + self.drift * shift)
        return DepthMap(torch.where(valid, values, 0.0), valid, Kind.AFFINE_DISPARITY)

    def _layout(self) -> Tensor:
        """The grid (1,1,n,n) of the smooth error that all maps share: unit normal, as for single maps."""
        own, shared = (
            torch.from_numpy(generator("layout", number).standard_normal((1, 1, FIELD + 1, FIELD + 1))).float()
            for number in (self.layout, "common")
        )
        return math.sqrt(1 - self.common) * own + math.sqrt(self.common) * shared

    def labels(self, truth: Labels, key: str) -> Labels:
        """A region's truth (B = 1) as this teacher would label it; each patch is corrupted as a separate map."""
        shared = self.apply(truth.shared, f"{key}.shared")
        if truth.local is None:
            return Labels(shared, None, truth.boxes)
        maps = [self.apply(truth.local[i : i + 1], f"{key}.local{i}") for i in range(len(truth.local.values))]
        values, valid = torch.cat([m.values for m in maps]), torch.cat([m.valid for m in maps])
        return Labels(shared, DepthMap(values, valid, maps[0].kind), truth.boxes)


def _farness(values: Tensor, valid: Tensor) -> Tensor:
    """0 for the nearer half of the valid pixels, rising to 1 at the farthest, by rank."""
    ranks = torch.zeros_like(values)
    order = values[valid].argsort(descending=True)
    ranks[valid] = torch.empty(len(order)).index_copy(0, order, torch.linspace(0, 1, len(order)))
    return (2 * ranks - 1).clamp(min=0)


def _blurred(values: Tensor, valid: Tensor, sigma: float) -> Tensor:
    """Gaussian blur over valid pixels only."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1).float()
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    values_and_mask = torch.stack([torch.where(valid, values, 0.0), valid.float()], 1)  # (B,2,H,W)
    weight = kernel.expand(2, 1, -1)
    values_and_mask = F.conv2d(values_and_mask, weight[..., None, :], padding=(0, radius), groups=2)
    values_and_mask = F.conv2d(values_and_mask, weight[..., :, None], padding=(radius, 0), groups=2)
    return values_and_mask[:, 0] / values_and_mask[:, 1].clamp(min=1e-12)
