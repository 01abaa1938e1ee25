"""Depth Anything 3's network on one view: a DINOv2 backbone and a DPT head, under the names of the released files.

Two layouts. "Mono" (also metric): DINOv2 as it is, a DPT head and a sky head. "Main": from one block on, odd blocks
attend globally (on one view: over the same tokens, but every patch at the same rotary position), queries and keys are
normalized, the class token is replaced by a camera token, and features are the last local and the current tokens,
concatenated. Its rays, poses and confidences are not computed here.

Surprises: the output is exp of the logit, so it is depth. Block norms use eps 1e-6, but the final norm and the
query/key norms use 1e-5.

Source: ByteDance-Seed/Depth-Anything-3 src/depth_anything_3/model (da3.py, dinov2/, dpt.py, dualdpt.py).
Shapes: B batch, N tokens, C channels, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.core.blocks import Attention, LayerScale, Mlp
from distill.core.positions import patch_positions, rotation_tables, uv_embedding
from distill.teachers._dino import PATCH, position_table


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkLayout:
    """The sizes of a network.

    taps: blocks whose tokens the head reads, from 0. main_from: first block of the main series' scheme (None: mono).
    """

    width: int
    blocks: int
    heads: int
    hidden: int
    swiglu: bool
    positions: int
    taps: tuple[int, ...]
    main_from: int | None
    features: int
    channels: tuple[int, ...]
    sky: bool


class SwiGlu(nn.Module):
    """The giant's gated feed-forward."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B,N,C) -> (B,N,C)."""
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """One transformer block."""

    def __init__(self, layout: NetworkLayout, *, normalized: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(layout.width, eps=1e-6)
        self.attn = Attention(layout.width, layout.heads, normalized=normalized)
        self.ls1 = LayerScale(layout.width, 1.0)
        self.norm2 = nn.LayerNorm(layout.width, eps=1e-6)
        self.mlp = (SwiGlu if layout.swiglu else Mlp)(layout.width, layout.hidden)
        self.ls2 = LayerScale(layout.width, 1.0)

    def forward(self, tokens: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B,N,C) -> (B,N,C)."""
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens), rotation))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class PatchEmbed(nn.Module):
    """Patches to tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) -> (B,N,C)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Transformer(nn.Module):
    """The backbone; returns the tokens that the head reads."""

    def __init__(self, layout: NetworkLayout) -> None:
        super().__init__()
        self.layout = layout
        main_from = layout.main_from
        self.cls_token = nn.Parameter(torch.zeros(1, 1, layout.width))
        if main_from is not None:
            self.camera_token = nn.Parameter(torch.zeros(1, 2, layout.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, layout.positions, layout.width))
        self.patch_embed = PatchEmbed(layout.width)
        self.blocks = nn.ModuleList(
            Block(layout, normalized=main_from is not None and i >= main_from) for i in range(layout.blocks)
        )
        self.norm = nn.LayerNorm(layout.width, eps=1e-5)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B,3,H,W) normalized, sides multiples of 14 -> four (B,h*w,C or 2C), without the class token."""
        rows, columns = images.shape[-2] // PATCH, images.shape[-1] // PATCH
        tokens = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + position_table(self.pos_embed, rows, columns).to(tokens.dtype)
        if self.layout.main_from is None:
            return self._mono(tokens)
        return self._main(tokens, rows, columns, self.layout.main_from)

    def _mono(self, tokens: Tensor) -> list[Tensor]:
        features = []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, None)
            if i in self.layout.taps:
                features.append(self.norm(tokens)[:, 1:])
        return features

    def _main(self, tokens: Tensor, rows: int, columns: int, main_from: int) -> list[Tensor]:
        size = self.layout.width // self.layout.heads
        local_rotation = rotation_tables(patch_positions(rows, columns, tokens.device), size, tokens.dtype)
        global_rotation = rotation_tables(
            patch_positions(rows, columns, tokens.device).clamp(max=1), size, tokens.dtype
        )
        features, local = [], tokens
        for i, block in enumerate(self.blocks):
            if i == main_from:
                camera = self.camera_token[:, :1].expand(len(tokens), -1, -1)
                tokens = torch.cat([camera, tokens[:, 1:]], dim=1)
            is_global = i >= main_from and i % 2 == 1
            tokens = block(tokens, None if i < main_from else global_rotation if is_global else local_rotation)
            if not is_global:
                local = tokens
            if i in self.layout.taps:
                features.append(torch.cat([local, self.norm(tokens)], dim=-1)[:, 1:])
        return features


class Backbone(nn.Module):
    """The transformer under the name that the released files give it."""

    def __init__(self, layout: NetworkLayout) -> None:
        super().__init__()
        self.pretrained = Transformer(layout)

    def forward(self, images: Tensor) -> list[Tensor]:
        """See Transformer."""
        return self.pretrained(images)


class ResidualUnit(nn.Module):
    """Two pre-activated convolutions with a residual connection."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        return maps + self.conv2(F.relu(self.conv1(F.relu(maps))))


class Fusion(nn.Module):
    """Adds a finer level and doubles the size; the coarsest level has no other to add."""

    def __init__(self, features: int, *, coarsest: bool) -> None:
        super().__init__()
        if not coarsest:
            self.resConfUnit1 = ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, maps: Tensor, finer: Tensor | None, size: Sequence[int]) -> Tensor:
        """(B,C,h,w) -> (B,C,*size)."""
        if finer is not None:
            maps = maps + self.resConfUnit1(finer)
        maps = self.resConfUnit2(maps)
        return self.out_conv(F.interpolate(maps, list(size), mode="bilinear", align_corners=True))


class Scratch(nn.Module):
    """The head's convolutions, under the released names."""

    def __init__(self, layout: NetworkLayout) -> None:
        super().__init__()
        features = layout.features
        for i, channels in enumerate(layout.channels, start=1):
            self.add_module(f"layer{i}_rn", nn.Conv2d(channels, features, 3, padding=1, bias=False))
            self.add_module(f"refinenet{i}", Fusion(features, coarsest=i == len(layout.channels)))
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = _output(features // 2, 1 if layout.main_from is None else 2)
        if layout.sky:
            self.sky_output_conv2 = _output(features // 2, 1)


def _output(channels: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, outputs, 1))


class Head(nn.Module):
    """DPT: tokens of four blocks -> depth and sky logits at the input's size."""

    def __init__(self, layout: NetworkLayout) -> None:
        super().__init__()
        self.main = layout.main_from is not None
        width = layout.width * (2 if self.main else 1)
        first, second, _, last = layout.channels
        if self.main:
            self.norm = nn.LayerNorm(width, eps=1e-5)
        self.projects = nn.ModuleList(nn.Conv2d(width, c, 1) for c in layout.channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, 4, 4),
                nn.ConvTranspose2d(second, second, 2, 2),
                nn.Identity(),
                nn.Conv2d(last, last, 3, 2, 1),
            ]
        )
        self.scratch = Scratch(layout)

    def forward(self, features: Sequence[Tensor], height: int, width: int) -> tuple[Tensor, Tensor | None]:
        """Four (B,h*w,C) -> depth (B,H,W) > 0, and sky (B,H,W) >= 0 where the layout has it."""
        rows, columns = height // PATCH, width // PATCH
        levels = []
        for i, tokens in enumerate(features):
            tokens = self.norm(tokens) if self.main else tokens
            maps = self.projects[i](tokens.transpose(1, 2).unflatten(2, (rows, columns)))
            maps = maps + uv_embedding(maps, height, width) if self.main else maps
            levels.append(self.scratch.get_submodule(f"layer{i + 1}_rn")(self.resize_layers[i](maps)))
        maps = self.scratch.get_submodule("refinenet4")(levels[3], None, levels[2].shape[-2:])
        for i in (3, 2, 1):
            finer = levels[i - 1]
            size = levels[i - 2].shape[-2:] if i > 1 else [2 * side for side in finer.shape[-2:]]
            maps = self.scratch.get_submodule(f"refinenet{i}")(maps, finer, size)
        maps = F.interpolate(self.scratch.output_conv1(maps), (height, width), mode="bilinear", align_corners=True)
        maps = maps + uv_embedding(maps, height, width) if self.main else maps
        depth = self.scratch.output_conv2(maps)[:, 0].exp()
        sky = F.relu(self.scratch.sky_output_conv2(maps)[:, 0]) if hasattr(self.scratch, "sky_output_conv2") else None
        return depth, sky


class Network(nn.Module):
    """Backbone and head. The head always computes in float32, as the authors' does."""

    def __init__(self, layout: NetworkLayout) -> None:
        super().__init__()
        self.backbone = Backbone(layout)
        self.head = Head(layout)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B,3,H,W) normalized, sides multiples of 14 -> depth (B,H,W), and sky (B,H,W) or None."""
        height, width = images.shape[-2:]
        features = self.backbone(images.to(self.backbone.pretrained.cls_token.dtype))
        return self.head([tokens.float() for tokens in features], height, width)
