"""The DPT decoder (Ranftl et al., ICCV 2021) as DINOv3 and AnyDepth build it: four levels, fused from coarse to fine.

Parameter names are those of AnyDepth's released head. Its defaults here are the configuration behind AnyDepth's
parameter table (50.83 M on ViT-S); Depth Anything V2's widths are channels=64,
post_process_channels=[48, 96, 192, 384], readout="ignore", norm="none" on ViT-S.

Surprises: level four is ceil(h/2), so an odd token grid gives 32*ceil(h/2) rows and not 16h; the lateral maps are
resized with align_corners=False and the x2 steps with True; the residual units have neither bias nor norm; there is
no ReLU before the last x2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.resample import resize_bilinear
from distill.students.decoders import Features, four_channels, load_released, make_norm, split


class Decoder(nn.Module):
    """Four (patch map (B,C,h,w), cls (B,C)) pairs, or plain maps, to a raw map (B,1,32*ceil(h/2),32*ceil(w/2)).

    in_channels: C, one number or four. channels: the fusion width. post_process_channels: the width of each level
    (None: in_channels). readout: "project" joins the class token to every patch, "ignore" leaves it out.
    norm: "batch", "frozen", "group" or "none", applied to the features after the readout.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        channels: int = 512,
        post_process_channels: Sequence[int] | None = None,
        *,
        readout: str = "project",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        inputs = four_channels(in_channels)
        levels = four_channels(post_process_channels or inputs, "post_process_channels")
        if readout not in ("project", "ignore"):
            raise ValueError(f'readout must be "project" or "ignore", not {readout!r}')
        self.options: dict[str, Any] = {
            "in_channels": inputs,
            "channels": channels,
            "post_process_channels": levels,
            "readout": readout,
            "norm": norm,
        }
        self.reassemble_blocks = Reassemble(inputs, levels, readout=readout, norm=norm)
        self.convs = nn.ModuleList(_Conv(c, channels, 3, bias=False) for c in levels)
        self.fusion_blocks = nn.ModuleList(Fusion(channels, lateral=i > 0) for i in range(4))
        self.project = _Conv(channels, channels, 3)
        self.conv_depth = DepthHead(channels)

    def forward(self, features: Features) -> Tensor:
        """(B,1,32*ceil(h/2),32*ceil(w/2)), before any final activation."""
        levels = self.reassemble_blocks(features)
        levels = [conv(level) for conv, level in zip(self.convs, levels, strict=True)]
        x = self.fusion_blocks[0](levels[3])
        for fusion, level in zip(self.fusion_blocks[1:], reversed(levels[:3]), strict=True):
            x = fusion(x, level)
        return self.conv_depth(torch.relu(self.project(x)))

    def load_released(self, state_dict: Mapping[str, Any]) -> Decoder:
        """Fill from AnyDepth's released parameter names, strictly; returns itself. ValueError names a mismatch."""
        load_released(self, state_dict)
        return self


class _Conv(nn.Module):
    """A same-size convolution under the name `conv`, as in the released weights."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Reassemble(nn.Module):
    """Token maps to a pyramid of 4h, 2h, h and ceil(h/2) rows."""

    def __init__(self, inputs: Sequence[int], levels: Sequence[int], *, readout: str, norm: str) -> None:
        super().__init__()
        self.projects = nn.ModuleList(_Conv(i, o, 1) for i, o in zip(inputs, levels, strict=True))
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(levels[0], levels[0], 4, stride=4),
                nn.ConvTranspose2d(levels[1], levels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(levels[3], levels[3], 3, stride=2, padding=1),
            ]
        )
        project = readout == "project"
        self.readout_projects = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * c, c), nn.GELU()) if project else nn.Identity() for c in inputs
        )
        self.batchnorm_layers = nn.ModuleList(nn.Identity() if norm == "none" else make_norm(norm, c) for c in inputs)
        self.reads_cls = project

    def forward(self, features: Features) -> list[Tensor]:
        """The four levels, finest first."""
        levels = []
        for i, feature in enumerate(features):
            x, cls = split(feature)
            if self.reads_cls:
                x = self._read(x, cls, self.readout_projects[i])
            levels.append(self.resize_layers[i](self.projects[i](self.batchnorm_layers[i](x))))
        return levels

    def _read(self, x: Tensor, cls: Tensor | None, project: nn.Module) -> Tensor:
        if cls is None:
            raise ValueError('these features have no cls; build the DPT decoder with readout="ignore"')
        tokens = x.flatten(2).transpose(1, 2)
        tokens = project(torch.cat([tokens, cls[:, None].expand_as(tokens)], dim=-1))
        return tokens.transpose(1, 2).reshape(x.shape)


class Fusion(nn.Module):
    """Adds a finer level to the coarser result and doubles it."""

    def __init__(self, channels: int, *, lateral: bool) -> None:
        super().__init__()
        self.project = _Conv(channels, channels, 1)
        self.res_conv_unit1 = ResidualUnit(channels) if lateral else None
        self.res_conv_unit2 = ResidualUnit(channels)

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        """(B,C,h,w) and a level of any size -> (B,C,2h,2w)."""
        if self.res_conv_unit1 is not None and level is not None:
            # At an equal size this changes nothing; a condition on the size would be fixed by tracing.
            level = resize_bilinear(level, (x.shape[-2], x.shape[-1]), align_corners=False)
            x = x + self.res_conv_unit1(level)
        return self.project(_double(self.res_conv_unit2(x)))


class ResidualUnit(nn.Module):
    """x + conv(ReLU(conv(ReLU(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _Conv(channels, channels, 3, bias=False)
        self.conv2 = _Conv(channels, channels, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        return x + self.conv2(torch.relu(self.conv1(torch.relu(x))))


class Head(nn.ModuleDict):
    """Convolution, x2, convolution, ReLU, one channel; numbered as the authors' Sequential."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            {
                "0": nn.Conv2d(channels, channels // 2, 3, padding=1),
                "2": nn.Conv2d(channels // 2, 32, 3, padding=1),
                "4": nn.Conv2d(32, 1, 1),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,1,2h,2w)."""
        x = _double(self["0"](x))
        return self["4"](torch.relu(self["2"](x)))


class DepthHead(nn.Module):
    """The head under the name `head`, as in the released weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = Head(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,1,2h,2w)."""
        return self.head(x)


def _double(x: Tensor) -> Tensor:
    return resize_bilinear(x, (2 * x.shape[-2], 2 * x.shape[-1]), align_corners=True)
