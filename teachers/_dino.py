"""Shared by DINOv2-based teachers: ImageNet normalization, the authors' position-table interpolation, and tensor
names for transformers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.weights import thirds

PATCH = 14
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@functools.lru_cache(maxsize=8)
def _statistics(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """MEAN and STD (1,3,1,1), cached per device: a copy at every batch would wait for the work queued before it."""
    mean, std = (torch.tensor(v, device=device, dtype=dtype).view(1, 3, 1, 1) for v in (MEAN, STD))
    return mean, std


def normalize(images: Tensor) -> Tensor:
    """(B,3,H,W) in [0,1] normalized by ImageNet's mean and standard deviation."""
    mean, std = _statistics(images.device, images.dtype)
    return (images - mean) / std


def position_table(table: Tensor, rows: int, columns: int) -> Tensor:
    """(1,1+N,C) table for rows x columns patches: bicubic by a scale factor with +0.1, not to a size.

    The offset was a guard against rounding (facebookresearch/dino issue 8); the weights were trained with it, and
    leaving it out moves depth by about 1e-3.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return table
    grid = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((rows + 0.1) / side, (columns + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", antialias=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


TRANSFORMERS_NAMES = [
    (r"cls_token", "embeddings.cls_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.projection.\1"),
    (r"norm\.(weight|bias)", r"layernorm.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(weight|bias)", r"encoder.layer.\1.norm\2.\3"),
    (r"blocks\.(\d+)\.ls([12])\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)", r"encoder.layer.\1.mlp.fc\2.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"encoder.layer.\1.attention.attention.{}.\2"),
]
"""(facebookresearch's name of a ViT's tensor, transformers' name); {} stands for query, key and value."""


def to_transformers(
    state: Mapping[str, Tensor], rules: Sequence[tuple[re.Pattern[str], str]]
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors renamed by the first matching rule, a joint qkv split in three; keys that no rule matches)."""
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        rule = next(((new, match) for old, new in rules if (match := old.fullmatch(key))), None)
        if rule is None:
            unknown.append(key)
        elif "{}" in (name := rule[1].expand(rule[0])):
            for part, piece in zip(("query", "key", "value"), thirds(tensor), strict=True):
                renamed[name.format(part)] = piece.contiguous()
        else:
            renamed[name] = tensor
    return renamed, unknown
