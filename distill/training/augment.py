"""Augmentation of a batch: flips, rotations, crops, colours.

Each is a pure function of (seed, stream position), so a sample is augmented differently in every epoch, but equally on
any number of processes and after a resume. Geometry changes image, shared map, patches and boxes together; colour
changes the image only, because the teacher saw the true colours (Depth Anything, Sec. 3.2). Random crops are square; a
patch that reaches beyond the crop keeps its position (its box may leave [0,1]) and is valid where the student sees it.

Shapes: B regions, N patches per region, S region size, P patch size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.crops import generator, resize
from distill.core.depth import DepthMap, Kind
from distill.core.division import divide
from distill.core.labels import Batch, Labels

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Draw(NamedTuple):
    """The random draws for an image; numbers in [0, 1). square: three for the crop; colors: one per property."""

    square: tuple[float, ...] = ()
    angle: float = 0.5
    mirrored: bool = False
    colors: tuple[float, ...] = ()


def draw(
    position: int, *, seed: int, hflip: bool, color_jitter: float, random_resized_crop: float, rotation: float
) -> Draw:
    """The draws at a position of the stream, for `augment` with the same arguments.

    In this order, and only what is used: a new draw must come last, or old runs would no longer reproduce.
    """
    rng = generator("augment", seed, position)
    square = tuple(rng.random(3).tolist()) if random_resized_crop < 1.0 else ()
    angle = float(rng.random()) if rotation else 0.5
    mirrored = hflip and bool(rng.random() < 0.5)
    return Draw(square, angle, mirrored, tuple(rng.random(3).tolist()) if color_jitter else ())


def augment(
    batch: Batch,
    draws: Sequence[Draw],
    *,
    color_jitter: float = 0.0,
    random_resized_crop: float = 1.0,
    rotation: float = 0.0,
    canonical: bool = False,
) -> Batch:
    """The batch as the student sees it, each of its B images by its draw, which also decides whether it is mirrored.

    color_jitter: brightness, contrast and saturation are each multiplied by 1 + color_jitter * U(-1, 1); 0 = off.
    random_resized_crop: smallest area fraction of a random square of the region; 1 = off. rotation: the largest angle
    in degrees, either way; 0 = off. canonical: metric depth is that of the canonical camera (core.focal), so a crop,
    which acts as a longer lens, brings it nearer. Raises ValueError for a rotation of labels with patches.
    """
    images, labels = batch.images, dict(batch.labels)
    if random_resized_crop < 1.0:
        squares = [_square(draw.square, images.shape[-1], random_resized_crop) for draw in draws]
        cut = [resize(_cut(image, square), *images.shape[-2:]) for image, square in zip(images, squares, strict=True)]
        images = torch.stack(cut)
        labels = {name: _crop_labels(part, squares, images.shape[-1], canonical) for name, part in labels.items()}
    if rotation:
        angles = [math.radians(rotation * (2.0 * draw.angle - 1.0)) for draw in draws]
        images, labels = _turned(images, labels, angles)
    if any(draw.mirrored for draw in draws):
        to_flip = torch.tensor([draw.mirrored for draw in draws]).to(images.device, non_blocking=True)
        images = _mirror(images, to_flip)
        labels = {name: _mirror_labels(part, to_flip) for name, part in labels.items()}
    if color_jitter:
        strengths = [[1.0 + color_jitter * (2.0 * number - 1.0) for number in draw.colors] for draw in draws]
        images = torch.stack([_jitter(image, part) for image, part in zip(images, strengths, strict=True)])
    return Batch(batch.keys, images, labels)


def _square(numbers: Sequence[float], size: int, smallest: float) -> tuple[int, int, int]:
    """Top, left and side of a square of a size x size region whose area fraction is uniform in [smallest, 1]."""
    side = max(1, round(size * math.sqrt(smallest + (1.0 - smallest) * numbers[0])))
    top, left = (int(fraction * (size - side + 1)) for fraction in numbers[1:])
    return top, left, side


def _cut(maps: Tensor, square: tuple[int, int, int]) -> Tensor:
    top, left, side = square
    return maps[..., top : top + side, left : left + side]


def _crop_map(values: Tensor, valid: Tensor, square: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(S,S) values and valid, cropped and resized back to S x S; valid where only valid pixels were interpolated."""
    size = values.shape[-1]
    pair = torch.stack([torch.where(valid, values, 0.0), valid.float()])
    mixed, weight = resize(_cut(pair, square)[None], size, size)[0]
    usable = weight > 0.999
    return torch.where(usable, mixed / weight.clamp(min=0.5), 0.0), usable


def _crop_labels(labels: Labels, squares: Sequence[tuple[int, int, int]], size: int, canonical: bool) -> Labels:
    shared = labels.shared
    cropped = [_crop_map(v, m, square) for v, m, square in zip(shared.values, shared.valid, squares, strict=True)]
    values, valid = (torch.stack(part) for part in zip(*cropped, strict=True))
    lens = _tensor_like(
        [side / size if canonical and shared.kind is Kind.METRIC_DEPTH else 1.0 for *_, side in squares], values
    )
    values = values * lens[:, None, None]
    corners = _tensor_like([[top, left, top, left] for top, left, _ in squares], labels.boxes)
    sides = _tensor_like([side for *_, side in squares], labels.boxes)
    boxes = (labels.boxes * size - corners[:, None]) / sides[:, None, None]
    local = labels.local
    if local is not None:
        each = lens.repeat_interleave(len(local) // len(lens))[:, None, None]
        local = DepthMap(local.values * each, local.valid & _in_region(boxes, local.values.shape[-1]), local.kind)
    return Labels(DepthMap(values, valid, shared.kind), local, boxes, supervision=labels.supervision)


def _in_region(boxes: Tensor, patch: int) -> Tensor:
    """(B*N,P,P) bool: which pixels of each patch have their centre inside the region."""
    flat = boxes.reshape(-1, 4)
    centres = divide(torch.arange(patch, dtype=boxes.dtype, device=boxes.device) + 0.5, patch)
    top, left, bottom, right = (flat[:, i, None] for i in range(4))
    rows = top + (bottom - top) * centres
    columns = left + (right - left) * centres
    rows_in, columns_in = (rows >= 0) & (rows <= 1), (columns >= 0) & (columns <= 1)
    return rows_in[:, :, None] & columns_in[:, None, :]


def _turned(images: Tensor, labels: dict[str, Labels], angles: Sequence[float]) -> tuple[Tensor, dict[str, Labels]]:
    """Images (B,3,H,W) and labels rotated about the centre, each by its angle in radians: images bilinearly, labels by
    nearest neighbour, so that no depth is invented. Depth along the axis is unchanged. Outside: black, invalid.
    """
    height, width = images.shape[-2:]
    cos, sin = (torch.tensor([f(a) for a in angles], dtype=images.dtype) for f in (math.cos, math.sin))
    zeros = torch.zeros_like(cos)
    # affine_grid's coordinates run from -1 to 1 on either axis, whatever the aspect.
    rows = [cos, -sin * (height / width), zeros, sin * (width / height), cos, zeros]
    turns = torch.stack(rows, 1).view(-1, 2, 3).to(images.device, non_blocking=True)
    grid = F.affine_grid(turns, [len(images), 1, height, width], align_corners=False)
    turned_labels = {}
    for name, part in labels.items():
        if part.local is not None:
            raise ValueError('train.rotation: labels of patches cannot be rotated; label with crops.patches = "none"')
        shared = part.shared
        valid_turned = (
            F.grid_sample(shared.valid[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0] > 0.5
        )
        known = torch.where(shared.valid, shared.values, 0.0)[:, None]
        values = F.grid_sample(known, grid, mode="nearest", align_corners=False)[:, 0]
        turned_labels[name] = replace(part, shared=DepthMap(values, valid_turned, shared.kind))
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False), turned_labels


def _mirror(maps: Tensor, mirrored: Tensor) -> Tensor:
    """`maps` (R,...,W) with the rows whose `mirrored` (R,) is True reversed along W."""
    return torch.where(mirrored.reshape(-1, *[1] * (maps.ndim - 1)), maps.flip(-1), maps)


def _mirror_labels(labels: Labels, mirrored: Tensor) -> Labels:
    shared, local, boxes = labels.shared, labels.local, labels.boxes
    other_side = torch.stack([boxes[..., 0], 1 - boxes[..., 3], boxes[..., 2], 1 - boxes[..., 1]], dim=-1)
    if local is not None:
        each = mirrored.repeat_interleave(len(local) // len(mirrored))
        local = DepthMap(_mirror(local.values, each), _mirror(local.valid, each), local.kind)
    return Labels(
        DepthMap(_mirror(shared.values, mirrored), _mirror(shared.valid, mirrored), shared.kind),
        local,
        torch.where(mirrored[:, None, None], other_side, boxes),
        supervision=labels.supervision,
    )


def _tensor_like(numbers: Sequence[object], like: Tensor) -> Tensor:
    """Numbers as a tensor of the type and device of `like`; like.new_tensor would wait for the GPU's queued work."""
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)


@functools.lru_cache
def _luma(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(LUMA, dtype=dtype, device=device)[:, None, None]


def _jitter(image: Tensor, strengths: Sequence[float]) -> Tensor:
    """(3,H,W) with brightness, contrast (about the mean grey) and saturation multiplied, clamped to [0,1]."""
    brightness, contrast, saturation = strengths
    weights = _luma(image.device, image.dtype)
    image = image * brightness
    mean = (image * weights).sum(0).mean()
    image = mean + (image - mean) * contrast
    grey = (image * weights).sum(0)
    return (grey + (image - grey) * saturation).clamp(0.0, 1.0)
