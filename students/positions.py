"""Rotary position embeddings of DINOv3 that are computed once for a grid: timm does it at every call, with a copy that
lets the host wait for all that its GPU has to do.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor, nn

MOST = 16  # grids remembered; a photo of its own size each would fill a card


class RememberedEmbedding(RotaryEmbeddingDinoV3):
    """timm's, which answers from memory where the embedding depends on the grid alone."""

    def get_embed(self, shape: list[int] | None = None, **how: Any) -> Tensor:
        """(H*W, 2*dim) for a grid of H x W tokens. Augmented, compiled and traced calls go timm's way."""
        drawn = self.training and getattr(self, "aug_active", True)
        if shape is None or drawn or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().get_embed(shape, **how)
        known: dict[Any, Tensor] = self.__dict__.setdefault("_known", {})
        periods = self.periods
        version = 0 if periods.is_inference() else periods._version
        # A tensor made in inference mode cannot be learnt through; weights that are loaded write the periods anew.
        key = (*map(int, shape), *how.items(), periods.device, periods.dtype, version)
        key += (torch.is_inference_mode_enabled(),)
        if key not in known:
            if len(known) >= MOST:
                known.clear()
            known[key] = super().get_embed(shape, **how)
        return known[key]


def remember_positions(backbone: nn.Module) -> nn.Module:
    """The same network; its rotary embedding, where it has timm's of DINOv3, remembers."""
    rope = getattr(backbone, "rope", None)
    if type(rope) is RotaryEmbeddingDinoV3:
        rope.__class__ = RememberedEmbedding
    return backbone
