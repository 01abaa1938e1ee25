"""A lighter Simple Depth Transformer decoder (ours): the channels shrink as the map grows.

AnyDepth's SDT spends 98 % of its work on 256 channels at a quarter of the resolution and above. Here every doubling
halves the channels, so that the four cost about the same, and what the narrow maps lose is added from the ViT
itself: the two shallow feature maps hold detail inside a patch, and a linear layer with a pixel shuffle places it at
twice and four times the token grid. Numbers, and what else was tried: tests/speed/decoders.py.

Surprises: SDT's fusion is kept, names included, because a lighter one (a linear layer each) scored worse on
photographs; more convolutions after a doubling scored worse, too. The output is 16 times the token grid whatever the
patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.students.decoders import Features, four_channels, load_released, make_norm, split
from distill.students.decoders.sdt import WeightedFusion
from distill.students.dysample import DySample


class Decoder(nn.Module):
    """Four (patch map (B,C,h,w), cls (B,C)) pairs, or plain maps, to a raw map (B,1,16h,16w).

    in_channels: C, one number or four. fusion_channels: the width at the token grid.
    widths: the channels at 2, 4, 8 and 16 times the token grid. detail: also read the two shallow maps for detail
    inside patches. norm: "batch", "frozen" or "group".
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        fusion_channels: int = 256,
        widths: Sequence[int] = (128, 64, 32, 32),
        *,
        detail: bool = True,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        channels = four_channels(in_channels)
        if len(widths) != 4 or any(width % 4 for width in (fusion_channels, *widths)):
            raise ValueError(
                f"fusion_channels and four widths must be multiples of 4, not {fusion_channels}, {list(widths)}"
            )
        self.options: dict[str, Any] = {
            "in_channels": channels,
            "fusion_channels": fusion_channels,
            "widths": list(widths),
            "detail": detail,
            "norm": norm,
        }
        self.weighted_fusion = WeightedFusion(channels, fusion_channels)
        self.enhance = nn.Conv2d(fusion_channels, fusion_channels, 3, padding=1, groups=fusion_channels, bias=False)
        self.enhance_norm = make_norm(norm, fusion_channels)
        self.doublings = nn.ModuleList(
            Doubling(before, after, norm=norm)
            for before, after in zip((fusion_channels, *widths[:3]), widths, strict=True)
        )
        self.details = nn.ModuleList(
            Detail(channels[1 - i], widths[i], 2 ** (i + 1), norm=norm) for i in range(2 if detail else 0)
        )
        self.output_conv = nn.Sequential(
            nn.Conv2d(widths[3], widths[3], 3, padding=1), nn.ReLU(), nn.Conv2d(widths[3], 1, 1)
        )

    def forward(self, features: Features) -> Tensor:
        """(B,1,16h,16w), before any final activation."""
        grid = split(features[0])[0].shape[-2:]
        x = self.weighted_fusion(features).transpose(1, 2).unflatten(2, grid)
        x = torch.relu(x + self.enhance_norm(self.enhance(x)))
        for i, doubling in enumerate(self.doublings):
            x = doubling(x)
            if i < len(self.details):
                x = x + self.details[i](split(features[1 - i])[0])
        return self.output_conv(x)

    def load_released(self, state_dict: Mapping[str, Any]) -> Decoder:
        """Fill from this decoder's own parameter names, strictly; returns itself. ValueError names a mismatch."""
        load_released(self, state_dict)
        return self


class Doubling(nn.Module):
    """DySample x2, 3x3 convolution to fewer channels, norm, ReLU."""

    def __init__(self, before: int, after: int, *, norm: str) -> None:
        super().__init__()
        self.sample = DySample(before, scale=2, style="lp", groups=4, scope=True)
        self.conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm = make_norm(norm, after)

    def forward(self, x: Tensor) -> Tensor:
        """(B,before,h,w) -> (B,after,2h,2w)."""
        return torch.relu(self.norm(self.conv(self.sample(x))))


class Detail(nn.Module):
    """A linear layer and a pixel shuffle, which place a token's detail inside its patch."""

    def __init__(self, channels: int, width: int, scale: int, *, norm: str) -> None:
        super().__init__()
        self.spread = nn.Conv2d(channels, width * scale * scale, 1)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = make_norm(norm, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,width,scale*h,scale*w)."""
        return self.norm(self.conv(torch.relu(F.pixel_shuffle(self.spread(x), self.scale))))
