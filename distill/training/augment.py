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
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.crops import generator, resize
from distill.core.depth import DepthMap, Kind
from distill.core.division import divide
from distill.core.labels import Batch, Labels

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def augment(
    batch: Batch,
    positions: Sequence[int],
    *,
    seed: int,
    hflip: bool,
    color_jitter: float,
    random_resized_crop: float,
    rotation: float = 0.0,
    canonical: bool = False,
) -> Batch:
    """The batch as the student sees it at these B positions of the stream.

    hflip: mirrors each image with probability 1/2. color_jitter: brightness, contrast and saturation are each
    multiplied by 1 + color_jitter * U(-1, 1); 0 = off. random_resized_crop: smallest area fraction of a random square
    of the region; 1 = off. rotation: the largest angle in degrees, either way; 0 = off. canonical: metric depth is that
    of the canonical camera (core.focal), so a crop, which acts as a longer lens, brings it nearer. Raises ValueError
    for a rotation of labels with patches.
    """
    if not (hflip or color_jitter or rotation or random_resized_crop < 1.0):
        return batch
    draws = _lots(positions, seed=seed, hflip=hflip, crops=random_resized_crop < 1.0, turns=rotation > 0)
    images, labels = batch.images.clone(), dict(batch.labels)
    if random_resized_crop < 1.0:
        squares = [_square(draw.square, images.shape[-1], random_resized_crop) for draw in draws]
        for b, square in enumerate(squares):
            images[b] = resize(_cut(images[b], square), *images.shape[-2:])
        labels = {name: _crop_labels(part, squares, images.shape[-1], canonical) for name, part in labels.items()}
    if rotation:
        angles = [math.radians(rotation * (2.0 * draw.angle - 1.0)) for draw in draws]
        images, labels = _turned(images, labels, angles)
    if hflip:
        to_flip = torch.tensor([draw.mirrored for draw in draws]).to(images.device, non_blocking=True)
        images = _mirror(images, to_flip)
        labels = {name: _mirror_labels(part, to_flip) for name, part in labels.items()}
    if color_jitter:
        for b, draw in enumerate(draws):
            images[b] = _jitter(images[b], 1.0 + color_jitter * (2.0 * draw.rest.random(3) - 1.0))
    return Batch(batch.keys, images, labels)


def mirrored(
    positions: Sequence[int], *, seed: int, hflip: bool, random_resized_crop: float, rotation: float = 0.0
) -> tuple[bool, ...]:
    """Which of the images at these positions `augment` mirrors."""
    draws = _lots(positions, seed=seed, hflip=hflip, crops=random_resized_crop < 1.0, turns=rotation > 0)
    return tuple(draw.mirrored for draw in draws)


@dataclass(frozen=True, slots=True)
class _Lot:
    """The random draws of an image: its square and angle, each in [0, 1), mirrored; rest: the generator for colours."""

    square: tuple[float, ...]
    angle: float
    mirrored: bool
    rest: np.random.Generator


def _lots(positions: Sequence[int], *, seed: int, hflip: bool, crops: bool, turns: bool) -> list[_Lot]:
    """Draws in this order, and only what is used: a new draw must come last, or old runs would no longer reproduce."""
    draws = []
    for position in positions:
        rng = generator("augment", seed, position)
        square = tuple(rng.random(3)) if crops else ()
        angle = rng.random() if turns else 0.5
        draws.append(_Lot(square, angle, bool(hflip and rng.random() < 0.5), rng))
    return draws


def _square(lot: Sequence[float], size: int, smallest: float) -> tuple[int, int, int]:
    """Top, left and side of a square of a size x size region whose area fraction is uniform in [smallest, 1]."""
    side = max(1, round(size * math.sqrt(smallest + (1.0 - smallest) * lot[0])))
    top, left = (int(fraction * (size - side + 1)) for fraction in lot[1:])
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


def _crop_labels(labels: Labels, squares: Sequence[tuple[int, int, int]], size: int, canonical: bool = False) -> Labels:
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
    grid = F.affine_grid(
        torch.stack(rows, 1).view(-1, 2, 3).to(images.device), [len(images), 1, height, width], align_corners=False
    )
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


def _jitter(image: Tensor, strengths: np.ndarray) -> Tensor:
    """(3,H,W) with brightness, contrast (about the mean grey) and saturation multiplied, clamped to [0,1]."""
    brightness, contrast, saturation = (float(s) for s in strengths)
    weights = _luma(image.device, image.dtype)
    image = image * brightness
    mean = (image * weights).sum(0).mean()
    image = mean + (image - mean) * contrast
    grey = (image * weights).sum(0)
    return (grey + (image - grey) * saturation).clamp(0.0, 1.0)
