"""Rotary position embeddings of DINOv3, cached per grid: timm recomputes them at every call, with a copy that makes the
host wait for its GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor, nn

MAX_CACHED_GRIDS = 16  # cached grids; without a limit, photos of many sizes would fill a GPU's memory


class RememberedEmbedding(RotaryEmbeddingDinoV3):
    """timm's embedding, cached where it depends only on the grid."""

    def get_embed(self, shape: list[int] | None = None, **how: Any) -> Tensor:
        """(H*W, 2*dim) for a grid of H x W tokens. Augmented, compiled and traced calls are not cached."""
        augmented = self.training and getattr(self, "aug_active", True)
        if shape is None or augmented or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().get_embed(shape, **how)
        cache: dict[Any, Tensor] = self.__dict__.setdefault("_known", {})
        periods = self.periods
        version = 0 if periods.is_inference() else periods._version
        # An inference tensor cannot be used in training; loading weights writes the periods anew.
        key = (*map(int, shape), *how.items(), periods.device, periods.dtype, version)
        key += (torch.is_inference_mode_enabled(),)
        if key not in cache:
            if len(cache) >= MAX_CACHED_GRIDS:
                cache.clear()
            cache[key] = super().get_embed(shape, **how)
        return cache[key]


def remember_positions(backbone: nn.Module) -> nn.Module:
    """Returns the same network; if its rotary embedding is timm's of DINOv3, it now caches."""
    rope = getattr(backbone, "rope", None)
    if type(rope) is RotaryEmbeddingDinoV3:
        rope.__class__ = RememberedEmbedding
    return backbone
