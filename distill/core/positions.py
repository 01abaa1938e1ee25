"""Positional encodings: rotary positions for attention, and sinusoids added to a decoder's maps.

Both come from VGGT and are also used by Depth Anything 3. Sources: facebookresearch/vggt vggt/layers/rope.py,
vggt/heads/utils.py; ByteDance-Seed/Depth-Anything-3 src/depth_anything_3/model/dinov2/layers/rope.py,
model/utils/head_utils.py. Shapes: B batch, N tokens, C channels, h x w patches.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patch_positions(rows: int, columns: int, device: torch.device, *, special: int = 1) -> Tensor:
    """(special+N,2) row and column of every token, from 1; special tokens, before the patches, are at 0, 0."""
    grid = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device)) + 1
    return torch.cat([grid.new_zeros(special, 2), grid])


def rotation_tables(positions: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N,size): rows rotate the first half of a head's channels, columns the second; base 100."""
    half = size // 2
    periods = 100.0 ** (torch.arange(0, half, 2, device=positions.device).float() / half)
    angles = positions[:, :, None].float() / periods
    angles = torch.cat([angles, angles], dim=-1).flatten(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(vectors: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (B,heads,N,size) by its tables; each half is rotated separately, first quarter against second."""
    cosine, sine = rotation
    halves = vectors.unflatten(-1, (2, 2, -1))
    rotated = torch.stack([-halves[..., 1, :], halves[..., 0, :]], dim=-2).flatten(-3)
    return vectors * cosine + rotated * sine


def uv_embedding(maps: Tensor, height: int, width: int) -> Tensor:
    """(1,C,h,w) sines and cosines of the position in the image, x in the first half of the channels, times 0.1.

    Positions are measured from the centre in half diagonals, so they depend on the aspect ratio.
    """
    channels, rows, columns = maps.shape[-3:]
    diagonal = (height**2 + width**2) ** 0.5
    frequencies = 100.0 ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels / 4))

    def waves(side: int, count: int) -> Tensor:
        # Not linspace, whose length a tracer would fix.
        middles = (2.0 * torch.arange(count, dtype=torch.float64) + 1.0 - count) * (side / diagonal / count)
        angles = middles.float().double()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).T.to(maps)  # converted while small, before it is expanded

    across = waves(width, columns)[:, None, :].expand(-1, rows, -1)
    down = waves(height, rows)[:, :, None].expand(-1, -1, columns)
    return 0.1 * torch.cat([across, down])[None]
