"""Depth Anything V2's head, a DPT without norms, so that DAv2-S, B and L can be students from their own checkpoints.

Parameter names are those of `depth_head` in the released files. Differences from this folder's DPT: convolutions of the
residual units have a bias, levels are fused at the finer level's size instead of doubled, and the last map is resized
to the image's size before the last two convolutions. Widths: 64 and [48, 96, 192, 384] (S), 128 and
[96, 192, 384, 768] (B), 256 and [256, 512, 1024, 1024] (L); its encoder is read with final_norm = true.

Source: DepthAnything/Depth-Anything-V2, depth_anything_v2/dpt.py. The released ReLU at the end is left to the user of
the map, and refinenet4.resConfUnit1, which is stored and never used, is omitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.resample import resize_bilinear
from distill.students.decoders import Features, four_channels, load_released, split

UNUSED = "scratch.refinenet4.resConfUnit1."
"""The unit that released files of this head, and of those that it derives from, store and never use."""


class Decoder(nn.Module):
    """Four (patch map (B,C,h,w), cls (B,C)) pairs, or plain maps, to a raw map (B,1,patch*h,patch*w).

    in_channels: C, one number or four. channels: the fusion width. post_process_channels: the width of each level.
    patch_size: the encoder's, pixels of output per token. The class token is not read.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        channels: int = 64,
        post_process_channels: Sequence[int] = (48, 96, 192, 384),
        *,
        patch_size: int = 14,
    ) -> None:
        super().__init__()
        inputs, levels = four_channels(in_channels), four_channels(post_process_channels, "post_process_channels")
        self.options: dict[str, Any] = {
            "in_channels": inputs,
            "channels": channels,
            "post_process_channels": levels,
            "patch_size": patch_size,
        }
        self.patch_size = patch_size
        self.projects, self.resize_layers, self.scratch = trunk(inputs, levels, channels)

    def forward(self, features: Features) -> Tensor:
        """(B,1,patch*h,patch*w), before the final activation."""
        maps = [split(feature)[0] for feature in features]
        rows, columns = maps[0].shape[-2:]
        levels = [
            self.scratch[f"layer{i + 1}_rn"](self.resize_layers[i](self.projects[i](x))) for i, x in enumerate(maps)
        ]
        x = self.scratch["output_conv1"](fused(self.scratch, levels))
        x = _resize(x, (rows * self.patch_size, columns * self.patch_size))
        return self.scratch["output_conv2"](x)

    def load_released(self, state_dict: Mapping[str, Any]) -> Decoder:
        """Fill from a released file's names (with or without `depth_head.`; the encoder is ignored)."""
        state = {key.removeprefix("module."): value for key, value in state_dict.items()}
        if any(key.startswith("depth_head.") for key in state):
            state = {key.removeprefix("depth_head."): v for key, v in state.items() if key.startswith("depth_head.")}
        load_released(self, {key: value for key, value in state.items() if not key.startswith(UNUSED)})
        return self


def trunk(
    inputs: Sequence[int], levels: Sequence[int], channels: int, *, rectified_skip: bool = False
) -> tuple[nn.ModuleList, nn.ModuleList, nn.ModuleDict]:
    """projects, resize_layers and scratch, under the released names, for this head and those derived from it."""
    projects = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(inputs, levels, strict=True))
    resize_layers = nn.ModuleList(
        [
            nn.ConvTranspose2d(levels[0], levels[0], 4, stride=4),
            nn.ConvTranspose2d(levels[1], levels[1], 2, stride=2),
            nn.Identity(),
            nn.Conv2d(levels[3], levels[3], 3, stride=2, padding=1),
        ]
    )
    scratch: dict[str, nn.Module] = {}
    for i, level in enumerate(levels, start=1):
        scratch[f"layer{i}_rn"] = nn.Conv2d(level, channels, 3, padding=1, bias=False)
        scratch[f"refinenet{i}"] = Fusion(channels, lateral=i < 4, rectified_skip=rectified_skip)
    scratch["output_conv1"] = nn.Conv2d(channels, channels // 2, 3, padding=1)
    scratch["output_conv2"] = nn.Sequential(nn.Conv2d(channels // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1))
    return projects, resize_layers, nn.ModuleDict(scratch)


def fused(scratch: nn.ModuleDict, levels: Sequence[Tensor]) -> Tensor:
    """Four levels (B,channels,h,w), fine to coarse, as one of twice the finest's size."""
    x = scratch["refinenet4"](levels[3], None, levels[2].shape[-2:])
    x = scratch["refinenet3"](x, levels[2], levels[1].shape[-2:])
    x = scratch["refinenet2"](x, levels[1], levels[0].shape[-2:])
    return scratch["refinenet1"](x, levels[0], (2 * levels[0].shape[-2], 2 * levels[0].shape[-1]))


class Fusion(nn.Module):
    """Adds a level to the coarser result and brings the sum to a given size."""

    def __init__(self, channels: int, *, lateral: bool, rectified_skip: bool = False) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(channels, channels, 1)
        self.resConfUnit1 = ResidualUnit(channels, rectified_skip=rectified_skip) if lateral else None
        self.resConfUnit2 = ResidualUnit(channels, rectified_skip=rectified_skip)

    def forward(self, x: Tensor, level: Tensor | None, size: tuple[int, int]) -> Tensor:
        """(B,C,h,w) and a level of the same size -> (B,C,*size)."""
        if self.resConfUnit1 is not None and level is not None:
            x = x + self.resConfUnit1(level)
        return self.out_conv(_resize(self.resConfUnit2(x), size))


class ResidualUnit(nn.Module):
    """x + conv(ReLU(conv(ReLU(x)))), with biases; rectified_skip: ReLU(x) + ..., as with an in-place ReLU."""

    def __init__(self, channels: int, *, rectified_skip: bool = False) -> None:
        super().__init__()
        self.rectified_skip = rectified_skip
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        positive = torch.relu(x)
        return (positive if self.rectified_skip else x) + self.conv2(torch.relu(self.conv1(positive)))


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return resize_bilinear(x, (size[0], size[1]), align_corners=True)
