"""A baseline that ignores the image, as a reference for every score.

`PlaneBaseline` is the best fixed map over the image plane (floors are near the bottom, far things near the horizon):
the mean of the training truths' disparities, each standardised, on a coarse grid. It behaves like a teacher: affine
disparity, aligned at scoring like any other prediction. A model that does not beat it has learnt how cameras are held,
not what they see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.depth import DepthMap, Kind
from distill.eval.benchmarks import BenchmarkSample
from distill.teachers import Card, check_images

ROWS, COLUMNS = 24, 32


@dataclass(frozen=True, slots=True)
class PlaneBaseline:
    """A fixed disparity map over the image plane, (ROWS, COLUMNS), stretched to any image."""

    grid: Tensor
    num_images: int

    @property
    def card(self) -> Card:
        """The card, as a teacher has one."""
        return Card(
            name="plane_baseline",
            weights="",
            kind=Kind.AFFINE_DISPARITY,
            licence="none: a table of numbers",
            code_licence="Apache-2.0",
            commercial=True,
            note=f"fitted to {self.num_images} training truths; ignores the image",
        )

    def predict(self, images: Tensor) -> DepthMap:
        """The same affine disparity for every image (B,3,H,W), bilinearly stretched to (B,H,W)."""
        images = check_images(images)
        plane = F.interpolate(self.grid[None, None].to(images), images.shape[-2:], mode="bilinear", align_corners=False)
        values = plane[:, 0].expand(len(images), -1, -1).contiguous()
        return DepthMap(values, torch.ones_like(values, dtype=torch.bool), Kind.AFFINE_DISPARITY)


def fit_plane(samples: Sequence[BenchmarkSample]) -> PlaneBaseline:
    """Fit the plane baseline to the samples' ground truths.

    Each truth is converted to disparity (KindError for affine depth), standardised over its valid pixels, and averaged
    in each cell of the grid; cells are averaged over images, weighted by the valid share of the cell. A cell without
    valid pixels takes its row's mean. Truths without a valid pixel, or with a constant value, are left out.
    """
    total, weight = torch.zeros(2, ROWS, COLUMNS, dtype=torch.float64)
    used = 0
    for sample in samples:
        truth = sample.truth()
        disparity = truth.convert(Kind(f"{truth.kind.unknown}_disparity"))
        values, valid = disparity.values.double(), disparity.valid
        if not valid.any() or float(deviation := values[valid].std(correction=0)) == 0.0:
            continue
        standard = torch.where(valid, (values - values[valid].mean()) / deviation, 0.0)
        coverage = F.adaptive_avg_pool2d(valid.double(), (ROWS, COLUMNS))[0]
        total += F.adaptive_avg_pool2d(standard, (ROWS, COLUMNS))[0]
        weight += coverage
        used += 1
    if not used:
        raise ValueError(f"none of the {len(samples)} truths has two different valid values: no plane can be fitted")
    rows = total.sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1e-9)
    grid = torch.where(weight > 0, total / weight.clamp(min=1e-9), rows)
    return PlaneBaseline(grid.float(), used)
