"""VGGT on one view as a student's encoder: a DINOv2 with registers, then pairs of blocks that attend alternately.

On several views the first block of a pair attends within each and the second across all; with one view both see the
same tokens. A pair outputs both blocks' tokens concatenated, so a feature is twice as wide as a token. Pairs 4, 11, 17
and 23 are read, as VGGT's own heads do; the token in the class token's place is the camera's.

Surprises: the DINOv2's norms have eps 1e-6, those of the pairs and of their queries and keys 1e-5; patch positions
count from 1, camera and registers are at 0; of the two camera tokens and sets of registers one view takes the first.

Source: facebookresearch/vggt vggt/models/aggregator.py, vggt/layers (block.py, attention.py, rope.py). timm's DINOv2 is
passed in by the caller; timm is not imported here.
Shapes: B batch, N patches, C channels of a token, h x w patches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.blocks import Attention, LayerScale, Mlp
from distill.core.positions import patch_positions, rotation_tables
from distill.core.strictness import mismatches

NAME = "vggt"
REGISTERS = 4
_INSIDE = "aggregator."
_VIT = "patch_embed."
_PARTS = {"frame_blocks": "frame", "global_blocks": "across"}


class Backbone(nn.Module):
    """VGGT with the interface that students.encoder.Encoder needs of a ViT. vit: timm's whole DINOv2 with registers.

    The number, width and heads of the pairs are those of the ViT's blocks. Raises ValueError for a final norm, which
    VGGT does not have, and for "pretrained" weights, which timm does not have.
    """

    def __init__(self, vit: Any, *, final_norm: bool = False, weights: str = "") -> None:
        super().__init__()
        if final_norm:
            raise ValueError("the encoder vggt has no final norm: leave final_norm out")
        if weights == "pretrained":
            raise ValueError(
                'timm has no weights of VGGT: give the authors\' file, weights = "facebook/VGGT-1B/model.pt" (not for '
                "commercial use; facebook/VGGT-1B-Commercial asks for a form)"
            )
        first, width = vit.blocks[0], vit.embed_dim
        heads, hidden = first.attn.num_heads, first.mlp.fc1.out_features
        self.vit = vit
        self.heads: int = heads
        self.camera_token = nn.Parameter(1e-6 * torch.randn(1, 1, width))
        self.register_token = nn.Parameter(1e-6 * torch.randn(1, REGISTERS, width))
        self.blocks = nn.ModuleList(Pair(width, heads, hidden) for _ in vit.blocks)
        self.norm: nn.Module = nn.Identity()
        self.embed_dim = 2 * width
        self.num_prefix_tokens = 1 + REGISTERS

    @property
    def patch_embed(self) -> Any:
        """The ViT's patch embedding."""
        return self.vit.patch_embed

    @property
    def cls_token(self) -> Tensor:
        """The camera's token, which comes first."""
        return self.camera_token

    def forward_intermediates(
        self, images: Tensor, *, indices: Sequence[int], **_asked: Any
    ) -> list[tuple[Tensor, Tensor]]:
        """(patch map (B,2C,h,w), camera and register tokens (B,5,2C)) of the pairs `indices`, in rising order.

        images: (B,3,H,W), normalized, sides multiples of the patch.
        """
        rows, columns = (
            side // patch for side, patch in zip(images.shape[-2:], self.patch_embed.patch_size, strict=True)
        )
        patches = self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]
        special = torch.cat([self.camera_token, self.register_token], 1).expand(images.shape[0], -1, -1)
        tokens = torch.cat([special.to(patches.dtype), patches], 1)
        positions = patch_positions(rows, columns, tokens.device, special=self.num_prefix_tokens)
        rotation = rotation_tables(positions, tokens.shape[-1] // self.heads, tokens.dtype)
        features = []
        for i, pair in enumerate(self.blocks):
            frame, tokens = pair(tokens, rotation)
            if i in indices:
                both = torch.cat([frame, tokens], -1)
                maps = both[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, (rows, columns))
                features.append((maps, both[:, : self.num_prefix_tokens]))
        return features

    def load_own(self, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """Loads all but the ViT from a released file (or a part of one); returns the ViT's tensors, under its names.

        VGGT's heads are ignored. Raises ValueError naming the keys that are missing, unknown or of another shape.
        """
        if not any(key.startswith(_INSIDE) for key in state):
            state = {f"{_INSIDE}{key}": value for key, value in state.items()}
        own: dict[str, Tensor] = {}
        inner: dict[str, Tensor] = {}
        for key, value in state.items():
            name = key.removeprefix(_INSIDE)
            if name == key:
                continue  # a head
            if name.startswith(_VIT):
                inner[name.removeprefix(_VIT)] = value
            elif match := re.fullmatch(r"(frame_blocks|global_blocks)\.(\d+)\.(.+)", name):
                own[f"blocks.{match[2]}.{_PARTS[match[1]]}.{match[3]}"] = value
            else:
                own[name] = value[:, 0] if name in ("camera_token", "register_token") else value
        target = {key: value for key, value in self.state_dict().items() if not key.startswith("vit.")}
        if faults := mismatches(own, target):
            raise ValueError(f"{source}: not the weights of VGGT: it {'; it '.join(faults)}")
        self.load_state_dict(own, strict=False)  # the caller loads the ViT's, which needs timm's names
        return inner


class Pair(nn.Module):
    """A block within a view and a block across views."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.frame = Block(width, heads, hidden)
        self.across = Block(width, heads, hidden)

    def forward(self, tokens: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(B,N,C) after either block."""
        frame = self.frame(tokens, rotation)
        return frame, self.across(frame, rotation)


class Block(nn.Module):
    """One transformer block with rotary positions."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, normalized=True)
        self.ls1 = LayerScale(width, 0.01)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)
        self.ls2 = LayerScale(width, 0.01)

    def forward(self, tokens: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """(B,N,C) -> (B,N,C); rotation: cosines and sines (N, C/heads)."""
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens), rotation))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))
