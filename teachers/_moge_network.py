"""MoGe-2's network: a DINOv2, a stack of convolutions, and one more stack for each output.

Built from the description in the released file, under its names. The image is resized to a grid of the requested number
of patches with the image's aspect; each level of the neck also takes view-plane coordinates as input. The normals' head
is loaded but not run.

Source: microsoft/MoGe moge/model/v2.py, moge/model/modules.py, moge/utils/geometry_torch.py (normalized_view_plane_uv).
Shapes: B batch, N tokens, C channels, h x w patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.teachers._da3_network import Block, NetworkLayout, PatchEmbed
from distill.teachers._dino import MEAN, PATCH, STD, position_table

LEVELS = 5
HEADS = ("points_head", "mask_head", "normal_head")
_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
}


class Backbone(nn.Module):
    """DINOv2 without registers; the last norm is applied to the output of every tap."""

    def __init__(self, layout: NetworkLayout) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, layout.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, layout.positions, layout.width))
        self.patch_embed = PatchEmbed(layout.width)
        self.blocks = nn.ModuleList(Block(layout, normalized=False) for _ in range(layout.blocks))
        self.norm = nn.LayerNorm(layout.width, eps=1e-6)
        self.taps = layout.taps

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(patches (B,h*w,C), class token (B,C)) of each tap, of (B,3,H,W) normalized, sides multiples of 14."""
        tokens = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        rows, columns = (side // PATCH for side in images.shape[-2:])
        tokens = tokens + position_table(self.pos_embed, rows, columns).to(tokens.dtype)
        features = []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, None)
            if i in self.taps:
                normal = self.norm(tokens)
                features.append((normal[:, 1:], normal[:, 0]))
        return features


class Encoder(nn.Module):
    """The DINOv2 and a projection of each block that is read; their sum is the coarsest level."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, layout: NetworkLayout, dim_out: int) -> None:
        super().__init__()
        self.backbone = Backbone(layout)
        self.output_projections = nn.ModuleList(nn.Conv2d(layout.width, dim_out, 1) for _ in layout.taps)
        self.register_buffer("image_mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """(B,3,H,W) in [0,1] -> (B,C,rows,columns) and the last class token (B,C)."""
        sized = F.interpolate(
            images.float(), (rows * PATCH, columns * PATCH), mode="bilinear", align_corners=False, antialias=True
        )
        normal = (sized - self.image_mean.float()) / self.image_std.float()
        features = self.backbone(normal.to(self.backbone.cls_token.dtype))
        maps = [
            project(patches.transpose(1, 2).unflatten(2, (rows, columns)))
            for project, (patches, _) in zip(self.output_projections, features, strict=True)
        ]
        return torch.stack(maps).sum(0), features[-1][1]


class ResidualBlock(nn.Module):
    """Two convolutions with a residual connection, and norms if the description has them."""

    def __init__(self, width: int, hidden: int, activation: str, norms: tuple[str, str]) -> None:
        super().__init__()
        act = _ACTIVATIONS[activation]
        self.layers = nn.Sequential(
            _norm(norms[0], width), act(), _conv(width, hidden), _norm(norms[1], hidden), act(), _conv(hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        return x + self.layers(x)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="replicate")


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind not in ("layer_norm", "group_norm"):
        raise ValueError(f"a norm of kind {kind!r}")
    return nn.GroupNorm(1 if kind == "layer_norm" else width // 32, width)


def _resampler(kind: str, inputs: int, outputs: int) -> nn.Sequential:
    if kind == "conv_transpose":
        return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 2, stride=2), _conv(outputs, outputs))
    if kind == "pixel_shuffle":
        return nn.Sequential(_conv(inputs, 4 * outputs), nn.PixelShuffle(2), _conv(outputs, outputs))
    if kind in ("bilinear", "nearest"):
        corners = {"align_corners": False} if kind == "bilinear" else {}
        return nn.Sequential(nn.Upsample(scale_factor=2, mode=kind, **corners), _conv(inputs, outputs))
    raise ValueError(f"a resampler of kind {kind!r}")


class ConvStack(nn.Module):
    """Levels from coarse to fine, each added to the upsampled coarser one. description: as in the file."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        widths = list(description["dim_res_blocks"])
        inputs, outputs = (_each(description[key], len(widths)) for key in ("dim_in", "dim_out"))
        kinds = _each(description["resamplers"], len(widths) - 1)
        counts = _each(description.get("num_res_blocks", 1), len(widths))
        times, activation = description.get("dim_times_res_block_hidden", 1), description.get("activation", "relu")
        norms = (
            description.get("res_block_in_norm", "layer_norm"),
            description.get("res_block_hidden_norm", "group_norm"),
        )
        self.input_blocks = nn.ModuleList(
            nn.Identity() if i is None else nn.Conv2d(i, w, 1) for i, w in zip(inputs, widths, strict=True)
        )
        self.resamplers = nn.ModuleList(
            _resampler(kind, *pair) for kind, pair in zip(kinds, zip(widths, widths[1:], strict=False), strict=True)
        )
        self.res_blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(w, times * w, activation, norms) for _ in range(count)))
            for w, count in zip(widths, counts, strict=True)
        )
        self.output_blocks = nn.ModuleList(
            nn.Identity() if o is None else nn.Conv2d(w, o, 1) for o, w in zip(outputs, widths, strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """(B,C_i,h_i,w_i) of each level, sides doubling -> the stack's outputs, likewise one per level."""
        x, out = self.input_blocks[0](features[0]), []
        for i, blocks in enumerate(self.res_blocks):
            x = self.resamplers[i - 1](x) + self.input_blocks[i](features[i]) if i else x
            x = blocks(x)
            out.append(self.output_blocks[i](x))
        return out


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count


class Network(nn.Module):
    """The whole network. description: the file's `model_config`; ValueError or KeyError if it is not supported."""

    def __init__(self, layout: NetworkLayout, description: Mapping[str, Any]) -> None:
        super().__init__()
        self.remap = description.get("remap_output", "linear")
        if self.remap not in ("linear", "sinh", "exp", "sinh_exp"):
            raise ValueError(f"an output remapped by {self.remap!r}")
        self.encoder = Encoder(layout, description["encoder"]["dim_out"])
        self.neck = ConvStack(description["neck"])
        for name in HEADS:
            if description.get(name) is not None:
                self.add_module(name, ConvStack(description[name]))
        if description.get("scale_head") is not None:
            dims = description["scale_head"]["dims"]
            layers: list[nn.Module] = []
            for before, after in zip(dims, dims[1:], strict=False):
                layers += [nn.Linear(before, after), nn.ReLU()]
            self.scale_head = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor, tokens: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B,3,H,W) in [0,1] -> points (B,H,W,3), mask (B,H,W) in (0,1), metric scale (B,).

        tokens: the approximate number of patches. Points have an unknown scale, and their z an unknown shift; mask and
        scale are None if the file has no head for them.
        """
        height, width = images.shape[-2:]
        aspect = width / height
        rows, columns = max(1, round((tokens / aspect) ** 0.5)), max(1, round((tokens * aspect) ** 0.5))
        maps, cls = self.encoder(images, rows, columns)
        uv = [
            view_plane(rows * 2**i, columns * 2**i, aspect).to(maps).expand(len(maps), -1, -1, -1)
            for i in range(LEVELS)
        ]
        features = self.neck([torch.cat([maps, uv[0]], 1), *uv[1:]])
        points, mask = (
            F.interpolate(self.get_submodule(head)(features)[-1].float(), (height, width), mode="bilinear")
            if hasattr(self, head)
            else None
            for head in ("points_head", "mask_head")
        )
        assert points is not None
        scale = self.scale_head(cls)[:, 0].float().exp() if hasattr(self, "scale_head") else None
        return self._remapped(points.permute(0, 2, 3, 1)), None if mask is None else mask[:, 0].sigmoid(), scale

    def _remapped(self, points: Tensor) -> Tensor:
        across, depth = points.split([2, 1], -1)
        if self.remap == "exp":
            depth = depth.exp()
            return torch.cat([across * depth, depth], -1)
        if self.remap == "sinh_exp":
            return torch.cat([across.sinh(), depth.exp()], -1)
        return points.sinh() if self.remap == "sinh" else points


def view_plane(rows: int, columns: int, aspect: float) -> Tensor:
    """(1,2,rows,columns) x and y of every cell's centre; the diagonal of a view of this aspect spans -1 to 1."""
    diagonal = (1 + aspect**2) ** 0.5
    ends = (aspect / diagonal * (columns - 1) / columns, 1 / diagonal * (rows - 1) / rows)
    x, y = (torch.linspace(-end, end, count) for end, count in zip(ends, (columns, rows), strict=True))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))[None]
