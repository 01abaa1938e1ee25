"""Decoders that were tried besides sdt_fast and are not offered; tests/speed/decoders.py trains and measures them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.students.decoders import Features, make_norm, split
from distill.students.decoders.sdt import WeightedFusion
from distill.students.decoders.sdt_fast import Decoder, Doubling

FUSED = 256  # the width at the token grid, as SDT's


def on_grid(tokens: Tensor, features: Features) -> Tensor:
    """(B,h*w,C) -> (B,C,h,w)."""
    return tokens.transpose(1, 2).unflatten(2, split(features[0])[0].shape[-2:])


class LinearFusion(nn.Module):
    """A linear layer for patch tokens and one for the class token, instead of SDT's two layers over both."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.layer_weights = nn.Parameter(torch.ones(len(channels)))
        self.patches = nn.ModuleList(nn.Linear(c, FUSED) for c in channels)
        self.classes = nn.ModuleList(nn.Linear(c, FUSED, bias=False) for c in channels)
        self.mix = nn.Linear(FUSED, FUSED)

    def forward(self, features: Features) -> Tensor:
        """(B,h*w,FUSED)."""
        total: Tensor = torch.zeros(())
        for weight, feature, patch, cls in zip(
            self.layer_weights.softmax(0), features, self.patches, self.classes, strict=True
        ):
            maps, token = split(feature)
            x = patch(maps.flatten(2).transpose(1, 2))
            total = total + weight * F.gelu(x if token is None else x + cls(token)[:, None])
        return self.mix(total)


class Linear(Decoder):
    """sdt_fast with the linear fusion."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__(channels)
        self.weighted_fusion: nn.Module = LinearFusion(channels)


class Refined(Decoder):
    """sdt_fast with a second 3x3 convolution after the doublings to 4 and 16 times the grid, as SDT has."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__(channels)
        for i in (1, 3):
            width = self.options["widths"][i]
            refine = (nn.Conv2d(width, width, 3, padding=1), make_norm("batch", width), nn.ReLU())
            self.doublings[i] = nn.Sequential(self.doublings[i], *refine)


class Bilinear(Decoder):
    """sdt_fast with plain bilinear doubling instead of DySample."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__(channels)
        for doubling in self.doublings:
            doubling.sample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)


class Convex(nn.Module):
    """Two doublings to a map at 4 times the grid, then learned convex weights of nine neighbours (as in RAFT)."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.fusion = WeightedFusion(channels, FUSED)
        self.doublings = nn.Sequential(Doubling(FUSED, 128, norm="batch"), Doubling(128, 64, norm="batch"))
        self.disparity = nn.Conv2d(64, 1, 3, padding=1)
        self.mask = nn.Conv2d(64, 9 * 16, 3, padding=1)

    def forward(self, features: Features) -> Tensor:
        """(B,1,16h,16w)."""
        x = self.doublings(on_grid(self.fusion(features), features))
        values, weights = self.disparity(x), self.mask(x).unflatten(1, (9, 16)).softmax(1)
        near = F.unfold(F.pad(values, (1, 1, 1, 1), mode="replicate"), 3).unflatten(2, values.shape[-2:])
        return F.pixel_shuffle((weights * near[:, :, None]).sum(1), 4)


class Shuffle(nn.Module):
    """The minimum: SDT's fusion, one convolution on the token grid and one pixel shuffle by 16."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.fusion = WeightedFusion(channels, FUSED)
        self.mix = nn.Conv2d(FUSED, FUSED, 3, padding=1)
        self.out = nn.Conv2d(FUSED, 256, 1)

    def forward(self, features: Features) -> Tensor:
        """(B,1,16h,16w)."""
        x = on_grid(self.fusion(features), features)
        return F.pixel_shuffle(self.out(torch.relu(self.mix(x))), 16)
