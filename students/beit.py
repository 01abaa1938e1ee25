"""BEiT for images of any size, as in MiDaS v3.1: its table of relative positions is resized to the grid.

Source: isl-org/MiDaS, midas/backbones/beit.py: the part of the table that belongs to pairs of patches is resampled
bilinearly, without antialiasing and with align_corners=False, to the image's grid; the three entries of the class token
stay. On the table's own grid nothing changes. timm's modules are patched in place; timm is not imported here.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIDAS_HEAD = ("scratch.", "pretrained.act_postprocess")
"""Prefixes of the tensors in MiDaS's own files that are not the encoder's."""


def pooling(name: str) -> dict[str, str]:
    """timm's argument for no pooling; none for a BEiT, whose last norm follows its pooling and is removed with it.

    A distilled ViT has two class tokens and no such argument.
    """
    return {} if name.startswith("beit") or "distilled" in name else {"global_pool": ""}


def make_flexible(backbone: Any) -> None:
    """Makes timm's Beit accept any size that is a multiple of its patch; its patch embedding records the grid.

    Other backbones are left unchanged.
    """
    if type(backbone).__name__ != "Beit":
        return
    backbone.fc_norm = nn.Identity()
    embed = backbone.patch_embed
    embed.strict_img_size = False
    grid = list(embed.grid_size)
    original_forward = embed.forward

    def forward(_embed: Any, images: Tensor) -> Tensor:
        grid[:] = [side // patch for side, patch in zip(images.shape[-2:], embed.patch_size, strict=True)]
        tokens: Tensor = original_forward(images)
        return tokens

    embed.forward = types.MethodType(forward, embed)
    for block in backbone.blocks:
        if getattr(block.attn, "relative_position_bias_table", None) is not None:
            block.attn._get_rel_pos_bias = types.MethodType(functools.partial(_bias_on, grid=grid), block.attn)


def _bias_on(attention: Any, *, grid: list[int]) -> Tensor:
    """The bias (1,heads,1+N,1+N) of an attention on the current image's grid, N = rows * columns."""
    rows, columns = grid
    table = attention.relative_position_bias_table
    if torch.compiler.is_exporting():  # symbolic sides: a comparison would become a guard, a hash fails
        table, index = _interpolated(table, attention.window_size, (rows, columns)), relative_index(rows, columns)
    else:
        table = resized(table, attention.window_size, (rows, columns))
        index = _index_on(rows, columns, table.device)
    return table[index].permute(2, 0, 1).contiguous()[None]


def resized(table: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The table ((2h-1)(2w-1)+3, heads) of the grid `own`, resized to another grid."""
    return table if tuple(own) == tuple(grid) else _interpolated(table, own, grid)


def _interpolated(table: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    (tall, wide), (high, broad) = ((2 * h - 1, 2 * w - 1) for h, w in (own, grid))
    pairs = table[:-3].reshape(1, tall, wide, -1).permute(0, 3, 1, 2)
    new = F.interpolate(pairs.float(), size=(high, broad), mode="bilinear", align_corners=False).to(table.dtype)
    return torch.cat([new.permute(0, 2, 3, 1).reshape(high * broad, -1), table[-3:]])


@functools.lru_cache(maxsize=16)
def _index_on(rows: int, columns: int, device: torch.device) -> Tensor:
    """`relative_index` on a device, cached: every block of every forward pass needs these megabytes."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training
        return relative_index(rows, columns).to(device)


def relative_index(rows: int, columns: int) -> Tensor:
    """(1+N,1+N) indices into the table for each pair of tokens, the class token first; N = rows * columns.

    Pairs of patches by their vertical and horizontal distance; then class to patch, patch to class, class to class.
    """
    # On the CPU whatever the default device; the caller copies it.
    y, x = torch.meshgrid(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"), indexing="ij")
    y, x = y.flatten(), x.flatten()
    pairs = (y[:, None] - y + rows - 1) * (2 * columns - 1) + (x[:, None] - x + columns - 1)
    count = (2 * rows - 1) * (2 * columns - 1)
    index = torch.full((rows * columns + 1,) * 2, count, device="cpu")
    index[1:, 1:] = pairs
    index[1:, 0] = count + 1
    index[0, 0] = count + 2
    return index
