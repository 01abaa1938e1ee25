"""Decoders turn four feature maps into one raw map; one file each, and its `class Decoder` is the plug-in.

A `Decoder(in_channels, ...)` has `forward(features) -> (B,1,H',W')` for four (patch map (B,C,h,w), cls (B,C)) pairs,
and `options`, the plain arguments that build it again. This file holds what they share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.core.strictness import mismatches

Features = Sequence[tuple[Tensor, Tensor] | Tensor]

NORMS = ("batch", "frozen", "group")


def four_channels(given: int | Sequence[int], what: str = "in_channels") -> list[int]:
    """The channels of the four feature maps, or of four levels, from one number or four; what: their name in errors."""
    channels = [given] * 4 if isinstance(given, int) else list(given)
    if len(channels) != 4 or not all(isinstance(c, int) and c > 0 for c in channels):
        raise ValueError(f"{what} must be a positive number or four of them, not {channels}")
    return channels


def split(feature: tuple[Tensor, Tensor] | Tensor) -> tuple[Tensor, Tensor | None]:
    """(patch map, cls); cls is None for a plain tensor."""
    return (feature, None) if isinstance(feature, Tensor) else (feature[0], feature[1])


class FrozenBatchNorm(nn.Module):
    """Batch normalisation by stored statistics that never change; its weight and bias still learn.

    The names are nn.BatchNorm2d's, so that its weights load.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,C,H,W)."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def make_norm(kind: str, channels: int) -> nn.Module:
    """The normalisation of (B,C,H,W) maps: "batch", "frozen" (stored statistics) or "group" (no statistics at all).

    "batch" is what the papers train; "group" is for one or two images per process, where batch statistics are noise.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "frozen":
        return FrozenBatchNorm(channels)
    if kind == "group":
        # At least eight channels per group if there are so many: groups of one would be instance norm.
        max_groups = min(32, max(channels // 8, 1))
        return nn.GroupNorm(max(n for n in range(1, max_groups + 1) if channels % n == 0), channels)
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {kind!r}")


def load_released(decoder: nn.Module, state: Mapping[str, Any]) -> None:
    """Fill a decoder from the parameter names of AnyDepth's released heads, strictly.

    The names may have the prefix `module.`, `decoder.` or `0.decoder.`; the encoder of a whole model is ignored.
    Counters and fixed sampling positions may be missing. ValueError names the keys that are missing or unknown.
    """
    bare = {key.removeprefix("module."): torch.as_tensor(value) for key, value in state.items()}
    for inside, beside in (("0.decoder.", "0.encoder."), ("decoder.", "encoder.")):
        if any(key.startswith(inside) for key in bare):
            bare = {key.removeprefix(inside): value for key, value in bare.items() if not key.startswith(beside)}
    target = decoder.state_dict()
    if faults := mismatches(bare, target, may_lack=("init_pos", "num_batches_tracked")):
        raise ValueError(f"not a released head of this decoder: it {'; it '.join(faults)}")
    decoder.load_state_dict(target | bare)
