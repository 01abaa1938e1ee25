"""AnyDepth's Simple Depth Transformer decoder (arXiv 2601.02760, section 3): fuse first, then upsample.

Written from the paper; parameter names are the released head's, so that its weights load. Surprises: the released class
also carries the detail enhancer, which the paper's parameter table leaves out; its `use_cls_token` changes nothing, the
class token is always read if there is one; the output is 16 times the token grid whatever the patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.resample import resize_bilinear
from distill.students.decoders import Features, four_channels, load_released, make_norm, split
from distill.students.dysample import DySample

UPSAMPLERS = ("dysample", "bilinear")


class Decoder(nn.Module):
    """Four (patch map (B,C,h,w), cls (B,C)) pairs, or plain maps, to a raw map (B,1,16h,16w).

    in_channels: C, one number or four. fusion_channels: the width after fusion (paper: 256).
    use_cls_token: ignored, as in the released class; kept for its signature.
    norm: "batch" (paper), "frozen" or "group".
    detail: with the spatial detail enhancer (paper). Without it, and with upsample = "bilinear" in place of "dysample",
    the decoder is that of the paper's ablation. Disabled parts have no parameters; the others keep their names.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        fusion_channels: int = 256,
        use_cls_token: bool = True,
        *,
        norm: str = "batch",
        detail: bool = True,
        upsample: str = "dysample",
    ) -> None:
        super().__init__()
        channels = four_channels(in_channels)
        if upsample not in UPSAMPLERS:
            raise ValueError(f"upsample must be one of {', '.join(UPSAMPLERS)}, not {upsample!r}")
        self.options: dict[str, Any] = {
            "in_channels": channels,
            "fusion_channels": fusion_channels,
            "use_cls_token": use_cls_token,
            "norm": norm,
            **({} if detail else {"detail": False}),
            **({} if upsample == "dysample" else {"upsample": upsample}),
        }
        self.weighted_fusion = WeightedFusion(channels, fusion_channels)
        self.detail_enhancer = DetailEnhancer(fusion_channels, norm=norm) if detail else nn.Identity()
        self.upsample_1 = UpsampleStage(fusion_channels, norm=norm, sampler=upsample)
        self.refinement_1 = _refinement(fusion_channels, norm)
        self.upsample_2 = UpsampleStage(fusion_channels, norm=norm, sampler=upsample)
        self.refinement_2 = _refinement(fusion_channels, norm)
        self.output_conv = nn.Sequential(
            nn.Conv2d(fusion_channels, fusion_channels // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(fusion_channels // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
        )

    def forward(self, features: Features) -> Tensor:
        """(B,1,16h,16w), before any final activation."""
        height, width = split(features[0])[0].shape[-2:]
        tokens = self.weighted_fusion(features)
        x = tokens.transpose(1, 2).unflatten(2, (height, width))
        x = self.detail_enhancer(x)
        x = self.refinement_1(self.upsample_1(x))
        x = self.refinement_2(self.upsample_2(x))
        return self.output_conv(x)

    def load_released(self, state_dict: Mapping[str, Any]) -> Decoder:
        """Fill from AnyDepth's released parameter names, strictly; returns itself. ValueError names a mismatch.

        The file's tensors of disabled parts are ignored.
        """
        disabled = [] if self.options.get("detail", True) else ["detail_enhancer."]
        disabled += ["dysample1.0.", "dysample2.0."] if "upsample" in self.options else []
        load_released(self, {k: v for k, v in state_dict.items() if not any(part in k for part in disabled)})
        return self


class WeightedFusion(nn.Module):
    """Joins the class token to every patch of each map and projects it; sums the four maps with softmax weights."""

    def __init__(self, channels: Sequence[int], fusion_channels: int) -> None:
        super().__init__()
        self.layer_weights = nn.Parameter(torch.ones(len(channels)))
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(c, fusion_channels, bias=False), nn.GELU()) for c in channels
        )
        self.readout_projects = nn.ModuleList(nn.Sequential(nn.Linear(2 * c, c), nn.GELU()) for c in channels)

    def forward(self, features: Features) -> Tensor:
        """(B,h*w,fusion_channels)."""
        weights = self.layer_weights.softmax(0)
        projected = []
        for feature, project, readout in zip(features, self.projections, self.readout_projects, strict=True):
            patches, cls = split(feature)
            tokens = patches.flatten(2).transpose(1, 2)
            if cls is not None:
                tokens = readout(torch.cat([tokens, cls[:, None].expand_as(tokens)], dim=-1))
            projected.append(project(tokens))
        return sum((w * x for w, x in zip(weights[1:], projected[1:], strict=True)), weights[0] * projected[0])


class DetailEnhancer(nn.Module):
    """F' = ReLU(F + norm(depthwise 3x3 (F))) (the paper's SDE)."""

    def __init__(self, channels: int, *, norm: str) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = make_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        return torch.relu(x + self.norm(self.dwconv(x)))


class UpsampleStage(nn.Module):
    """x4 as two blocks of DySample (or bilinear) x2, 3x3 convolution, norm and ReLU."""

    def __init__(self, channels: int, *, norm: str, sampler: str = "dysample") -> None:
        super().__init__()
        self.dysample1 = _upsample_block(channels, norm, sampler)
        self.dysample2 = _upsample_block(channels, norm, sampler)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,4h,4w)."""
        return self.dysample2(self.dysample1(x))


class Bilinear(nn.Module):
    """Bilinear x2 with half-pixel centres, for the paper's model without DySample; the details are ours."""

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,2h,2w)."""
        return resize_bilinear(x, (2 * x.shape[-2], 2 * x.shape[-1]), align_corners=False)


def _upsample_block(channels: int, norm: str, sampler: str) -> nn.Sequential:
    learnt = sampler == "dysample"
    return nn.Sequential(
        DySample(channels, scale=2, style="lp", groups=4, scope=True) if learnt else Bilinear(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        make_norm(norm, channels),
        nn.ReLU(),
    )


def _refinement(channels: int, norm: str) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), make_norm(norm, channels), nn.ReLU())
