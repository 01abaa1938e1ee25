"""The DPT head of GenPercept's second variant: it reads the UNet's four up-blocks and replaces the VAE's decoder.

Source: aim-uofa/GenPercept src/customized_modules (DPTNeckHeadForUnetAfterUpsampleIdentity) and
hf_configs/dpt-sd2.1-unet-after-upsample-general. Shapes: B batch, C channels, h x w latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from distill.teachers._strictly import sizing_tensors


class ResidualUnit(nn.Module):
    """Two pre-activated convolutions without bias, with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convolution2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        return maps + self.convolution2(F.relu(self.convolution1(F.relu(maps))))


class Fusion(nn.Module):
    """Adds a finer level, doubles the size, projects; the coarsest level has no other to add."""

    def __init__(self, channels: int, *, coarsest: bool) -> None:
        super().__init__()
        if not coarsest:
            self.residual_layer1 = ResidualUnit(channels)
        self.residual_layer2 = ResidualUnit(channels)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, maps: Tensor, finer: Tensor | None) -> Tensor:
        """(B,C,h,w) -> (B,C,2h,2w)."""
        if finer is not None:
            if finer.shape != maps.shape:  # odd latents: the levels are not exactly halves
                finer = F.interpolate(finer, maps.shape[-2:], mode="bilinear", align_corners=False)
            maps = maps + self.residual_layer1(finer)
        maps = self.residual_layer2(maps)
        return self.projection(F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=True))


class Upsample(nn.Module):
    """Nearest doubling and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,2h,2w)."""
        return self.conv(F.interpolate(maps, scale_factor=2.0, mode="nearest"))


class Neck(nn.Module):
    """Projects all levels to one width and fuses them from the coarsest."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1, bias=False) for c in channels)
        self.fusion_stage = nn.Module()
        self.fusion_stage.layers = nn.ModuleList(Fusion(width, coarsest=i == 0) for i in range(len(channels)))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels from fine to coarse -> (B,width,h,w) at twice the finest level's size."""
        maps = [conv(level) for conv, level in zip(self.convs, levels, strict=True)]
        coarse, *finer_levels = reversed(maps)
        first, *layers = self.fusion_stage.get_submodule("layers").children()
        fused = first(coarse, None)
        for layer, finer in zip(layers, finer_levels, strict=True):
            fused = layer(fused, finer)
        return fused


class Output(nn.Module):
    """Convolutions down to one channel, at twice the size."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Sequential(
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(width // 2, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, 1, 1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,2h,2w)."""
        return self.head(F.relu(self.projection(maps)))[:, 0]


class DptHead(nn.Module):
    """Four up-block outputs -> raw map, 32 times the size of the first block's output."""

    def __init__(self, channels: Sequence[int], width: int, hidden: int) -> None:
        super().__init__()
        self.feature_upsample_0 = Upsample(channels[0])
        self.neck = Neck(channels, width)
        self.head = Output(width, hidden)

    def forward(self, blocks: Sequence[Tensor]) -> Tensor:
        """Outputs of the UNet's up-blocks, in its order (coarse to fine) -> (B,H,W)."""
        finest, *coarser = reversed(list(blocks))
        return self.head(self.neck([self.feature_upsample_0(finest), *coarser]))


def sized_like(state: Mapping[str, Tensor], where: str | Path, *, what: str) -> DptHead:
    """A head with the sizes of the tensors in `state`; WeightsMismatchError where the defining ones give none."""
    dimensions = {f"neck.convs.{i}.weight": 4 for i in range(4)} | {"head.head.2.weight": 4}
    *necks, hidden = sizing_tensors(state, dimensions, where, what=what)
    return DptHead([tensor.shape[1] for tensor in necks], necks[0].shape[0], hidden.shape[0])
