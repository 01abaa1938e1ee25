"""DySample (Liu et al., ICCV 2023): upsampling by moving the points at which a feature map is sampled.

Written from the paper; parameter names are those of tiny-smart/dysample, so that its weights load. Surprise: sampling
points are computed in float32 whatever the autocast, because bfloat16 cannot tell neighbouring pixels apart beyond 256.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.core.resample import read_points


class DySample(nn.Module):
    """(B,C,H,W) -> (B,C,scale*H,scale*W).

    style: "lp" predicts every output point's offset at the input's resolution, "pl" at the output's.
    groups: channel groups that move together. scope: a learned gate scales the offsets (0 to 0.5) in place of 0.25.
    """

    init_pos: Tensor

    def __init__(
        self, channels: int, *, scale: int = 2, style: str = "lp", groups: int = 4, scope: bool = False
    ) -> None:
        super().__init__()
        if style not in ("lp", "pl"):
            raise ValueError(f'DySample style must be "lp" or "pl", not {style!r}')
        if channels % groups or (style == "pl" and channels % scale**2):
            raise ValueError(
                f"DySample {style} with {groups} groups and scale {scale} cannot divide {channels} channels"
            )
        self.scale, self.style, self.groups = scale, style, groups
        inputs, outputs = (channels, 2 * groups * scale**2) if style == "lp" else (channels // scale**2, 2 * groups)
        self.offset = nn.Conv2d(inputs, outputs, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)
        self.scope = nn.Conv2d(inputs, outputs, 1, bias=False) if scope else None
        if self.scope is not None:
            nn.init.zeros_(self.scope.weight)
        self.register_buffer("init_pos", _subpixels(scale, groups))

    def forward(self, x: Tensor) -> Tensor:
        """Samples `x` (B,C,H,W) at the moved points, bilinearly, with the border repeated."""
        batch, channels, height, width = x.shape
        points = self.points(x)
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not points.sum().isfinite():
            # On a CPU, grid_sample's gradient at NaN kills the process (torch 2.15); NaN maps give an error message.
            return F.interpolate(x * torch.nan, scale_factor=self.scale)
        dtype = torch.promote_types(x.dtype, torch.float32)
        grouped = x.reshape(batch * self.groups, channels // self.groups, height, width).to(dtype)
        sampled = read_points(grouped, points.to(dtype))
        return sampled.view(batch, channels, self.scale * height, self.scale * width).to(x.dtype)

    def offsets(self, x: Tensor) -> Tensor:
        """The offset field (B, 2 * groups * scale^2, H, W) in input pixels, x before y, subpixel grid included."""
        inputs = x if self.style == "lp" else F.pixel_shuffle(x, self.scale)
        offsets = self.offset(inputs)
        offsets = offsets * 0.25 if self.scope is None else offsets * self.scope(inputs).sigmoid() * 0.5
        if self.style == "pl":
            offsets = F.pixel_unshuffle(offsets, self.scale)
        return offsets + self.init_pos

    def points(self, x: Tensor) -> Tensor:
        """The point that each output pixel samples: (B*groups, scale*H, scale*W, 2), x then y in [-1, 1]."""
        batch, _, height, width = x.shape
        offsets = self.offsets(x)
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        rows = torch.arange(height, dtype=offsets.dtype, device=x.device) + 0.5
        columns = torch.arange(width, dtype=offsets.dtype, device=x.device) + 0.5
        offsets = offsets.view(batch, 2, -1, height, width)
        across = (columns + offsets[:, 0]) * (2 / width) - 1
        down = (rows[:, None] + offsets[:, 1]) * (2 / height) - 1
        points = torch.stack([F.pixel_shuffle(across, self.scale), F.pixel_shuffle(down, self.scale)], dim=-1)
        return points.flatten(0, 1)


def _subpixels(scale: int, groups: int) -> Tensor:
    """(1, 2 * groups * scale^2, 1, 1): where the outputs of one input pixel lie about its centre, in input pixels."""
    along = (torch.arange(scale) - (scale - 1) / 2) / scale
    down, across = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([across, down])[:, None].expand(2, groups, scale, scale).reshape(1, -1, 1, 1).clone()
