"""Crop plans: square regions and local patches of an image, deterministic and invertible.

A region is a square of the image, resized to `size`: the shared context that teacher and student both see. Patches
are squares of the same region at native resolution: the local context that only the teacher sees.

A plan is a pure function of (seed, image key, draw), so it is the same on any number of processes and in any order.
Source: Distill-Any-Depth, Sec. 4.1 (region side in [644, short side], 560 x 560 crops and patches). Inferred: sides and
places are uniform, and patches keep the image's resolution. The number and placement of the patches are ours: `grid`
covers the region with at least 1/8 overlap; `random` draws N.

Coordinates are half-pixel: pixel i covers [i, i + 1) and its centre is i + 0.5. Shapes: B batch, N patches, H, W.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.crop_settings import CropSettings
from distill.core.division import divide
from distill.core.resample import read_boxes


class ImageTooSmallError(ValueError):
    """The image is smaller than the smallest region; the message gives both sizes."""


@dataclass(frozen=True, slots=True)
class Square:
    """A square of pixels: rows [top, top + side), columns [left, left + side).

    width: the number of columns of a rectangle with `side` rows; 0 for a square.
    """

    top: int
    left: int
    side: int
    width: int = 0

    @property
    def columns(self) -> int:
        """The number of columns."""
        return self.width or self.side

    @property
    def record(self) -> dict[str, int]:
        """Plain values; a square has no "width", as in earlier versions."""
        plain = {"top": self.top, "left": self.left, "side": self.side}
        return plain | ({"width": self.width} if self.width else {})


@dataclass(frozen=True, slots=True)
class Plan:
    """One region of one image, and the patches inside it.

    region: in image pixels. patches: in native pixels relative to the region's corner.
    size: the side that the region is resized to, or its height if it has a width. patch_size: the side that every patch
    is resized to (a no-op for full patches).
    """

    region: Square
    patches: tuple[Square, ...]
    size: int
    patch_size: int
    width: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width that the region is resized to."""
        return self.size, self.width or self.size

    def boxes(self) -> Tensor:
        """(N,4) float32: top, left, bottom, right of each patch as fractions of the region."""
        rows = [[p.top, p.left, p.top + p.side, p.left + p.side] for p in self.patches]
        return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4) / self.region.side


def generator(*parts: object) -> np.random.Generator:
    """Return a random generator that depends on `parts` alone: not on order, process or Python's hash seed."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def _grid(side: int, patch: int, overlap: float) -> list[tuple[int, int]]:
    if side <= patch:
        return [(0, 0)]
    count = math.ceil((side - patch) / (patch * (1.0 - overlap))) + 1
    starts = [round(i * (side - patch) / (count - 1)) for i in range(count)]
    return [(top, left) for top in starts for left in starts]


def plan(height: int, width: int, settings: CropSettings, *, key: str, seed: int = 0, draw: int = 0) -> Plan:
    """Return the region and patches of image `key` at its `draw`-th visit.

    height, width: of the image, in pixels; with settings.region = "whole" those of the image squashed to a square.
    Raises ImageTooSmallError for an image that settings.on_small refuses.
    """
    c, short = settings, min(height, width)
    if c.width:  # the rows of the largest region of this shape
        short = min(height, int(width * c.size / c.width))
    if short < c.min_side and c.on_small == "refuse":
        raise ImageTooSmallError(f"{width}x{height} is smaller than the smallest crop, {c.min_side}x{c.min_side}")
    rng = generator("crop", seed, key, draw)
    smallest = short if c.region == "whole" else min(c.min_side, short)
    side = int(rng.integers(smallest, short + 1))
    columns = min(width, round(side * c.width / c.size)) if c.width else side
    top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - columns + 1))
    region = Square(top, left, side, columns if c.width else 0)
    patch_size = c.patch_size or c.size
    patch = min(patch_size, side)
    corners: list[tuple[int, int]] = []
    if c.patches == "grid":
        corners = _grid(side, patch, c.overlap)
    elif c.patches == "random":
        drawn = rng.integers(0, side - patch + 1, size=(c.num_patches, 2))
        corners = [(int(top), int(left)) for top, left in drawn]
    return Plan(region, tuple(Square(t, left, patch) for t, left in corners), c.size, patch_size, c.width)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """(..., C, H, W) uint8 or float resized to height x width: bilinear, antialiased when shrinking, half-pixel."""
    if images.shape[-2:] == (height, width):
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    out = F.interpolate(flat, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return out.reshape(*images.shape[:-2], height, width)


def native_shape(height: int, width: int, size: int, multiple: int) -> tuple[int, int]:
    """Return height and width with the short side at `size`, aspect kept, sides rounded to `multiple` (at least one).

    Ours: the long side is at most 8 times `size`. A strip beyond 8:1 is squashed, because one of 1x1000 pixels would
    otherwise exhaust the memory.
    """
    scale = size / min(height, width)
    rows, columns = (max(1, round(min(side * scale, 8 * size) / multiple)) * multiple for side in (height, width))
    return rows, columns


def cut_region(image: Tensor, plan: Plan) -> Tensor:
    """The region of `image` (C,H,W) as (C,size,size), or (C,size,width); ValueError if it is not in the image."""
    r = _region_of(image, plan)
    return resize(image[:, r.top : r.top + r.side, r.left : r.left + r.columns], *plan.shape)


def cut_patches(image: Tensor, plan: Plan) -> Tensor:
    """The patches of `image` (C,H,W) as (N,C,patch_size,patch_size), at native resolution unless the image is small."""
    r, size = _region_of(image, plan), plan.patch_size
    parts = [
        image[:, r.top + p.top : r.top + p.top + p.side, r.left + p.left : r.left + p.left + p.side]
        for p in plan.patches
    ]
    if not parts:
        return image.new_zeros(0, image.shape[0], size, size)
    # Copying channels-last, the layout of a decoded photograph, takes half the time of copying planes.
    return torch.stack([resize(part, size, size).movedim(0, -1) for part in parts]).movedim(-1, 1)


def _region_of(image: Tensor, plan: Plan) -> Square:
    """The plan's region; ValueError if the image (C,H,W) does not hold it, of which a slice would be cut silently."""
    r = plan.region
    if image.ndim != 3 or r.top + r.side > image.shape[1] or r.left + r.columns > image.shape[2]:
        needed = f"{r.top + r.side} rows and {r.left + r.columns} columns"
        raise ValueError(f"the plan is of another image: it needs (C,H,W) of {needed}, not {tuple(image.shape)}")
    return r


INSIDE_TOLERANCE = 1e-4
"""In pixels: how far beyond the outermost pixel centres a sample still counts as inside."""


def sample_boxes(maps: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sample each box of each map at size x size, bilinear, differentiable.

    maps: (B,H,W). boxes: (B,N,4) fractions (top, left, bottom, right). Returns values (B,N,size,size) and a bool of
    the same shape that is False where a pixel's centre lies outside the outermost pixel centres of the map: there
    interpolation would be extrapolation, and a linear ramp would no longer be exact.
    """
    height, width = maps.shape[1:]
    centres = divide(torch.arange(size, device=maps.device, dtype=maps.dtype) + 0.5, size)
    top, left, bottom, right = (boxes[..., i, None].to(maps) for i in range(4))
    rows = top + (bottom - top) * centres
    columns = left + (right - left) * centres
    values = read_boxes(maps, rows, columns)
    row_inside = (rows * height >= 0.5 - INSIDE_TOLERANCE) & (rows * height <= height - 0.5 + INSIDE_TOLERANCE)
    column_inside = (columns * width >= 0.5 - INSIDE_TOLERANCE) & (columns * width <= width - 0.5 + INSIDE_TOLERANCE)
    return values, row_inside[..., :, None] & column_inside[..., None, :]


def student_blocks(boxes: Tensor, size: int) -> tuple[Tensor, Tensor, int]:
    """Return the student's own pixels that cover each patch, as boxes that `sample_boxes` reads without interpolation.

    boxes: (B,N,4) fractions of the region, whose student map is size x size. Returns the same n x n pixels twice, as
    fractions of the region and as fractions of the patch, (B,N,4) each, and n, which the largest patch determines.
    Pixels of a block may lie outside a smaller patch, or outside the centres of its outermost pixels; `sample_boxes`
    on the patch's map reports them as outside.
    """
    sides = (boxes[..., 2:] - boxes[..., :2]).double()
    number = min(size, math.ceil(float(sides.amax()) * size - 1e-4)) if boxes.numel() else 0
    first = torch.ceil(boxes[..., :2].double() * size - 0.5 - 1e-4).clamp(0, size - number)
    blocks = divide(torch.cat([first, first + number], -1), size)
    within = (blocks - boxes[..., :2].repeat(1, 1, 2)) / sides.clamp(min=1e-9).repeat(1, 1, 2)
    return blocks.to(boxes), within.to(boxes), number
