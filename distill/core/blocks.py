"""Transformer block parts shared by Depth Anything 3 (a teacher) and VGGT (an encoder).

Parameter names are those of the released files of both. Surprise: the query and key norms use eps 1e-5 in both,
whatever eps the norms of the surrounding blocks use.

Sources: facebookresearch/vggt vggt/layers (attention.py, mlp.py, layer_scale.py); ByteDance-Seed/Depth-Anything-3
src/depth_anything_3/model/dinov2/layers. Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.core.positions import rotate


class Attention(nn.Module):
    """Self-attention with optional normalization of queries and keys and with rotary positions."""

    def __init__(self, width: int, heads: int, *, normalized: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-5) if normalized else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-5) if normalized else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B,N,C) -> (B,N,C); rotation: cosines and sines (N, C/heads), or None for no rotation."""
        batch, count, width = tokens.shape
        query, key, value = self.qkv(tokens).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(batch, count, width))


class Mlp(nn.Module):
    """Two linear maps with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B,N,C) -> (B,N,C)."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class LayerScale(nn.Module):
    """A learnt factor per channel, initialised to `start`."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B,N,C) -> (B,N,C)."""
        return tokens * self.gamma
