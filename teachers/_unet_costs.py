"""What a pass of a UNet costs, in numbers, counted on the meta device: nothing is computed and no weights are needed.

Shapes: one image's latents, side x side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, dict[str, Any]] = {
    "SD 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False},
    "SD 2.1": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
}
"""What differs between the two UNets, which have the same blocks; from their published unet/config.json."""
MOST_HEADS = 32


@dataclass(frozen=True, slots=True)
class UNetCost:
    """parameters: their number. flops: of one forward pass of one image. saved: bytes kept for the backward pass, in
    float32, without attention matrices (which no fused kernel keeps) and parameters.
    """

    parameters: int
    flops: float
    saved: int


def stable_diffusion(name: str) -> Any:
    """The UNet of that name on the meta device."""
    import diffusers

    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(sample_size=64, **SIZES[name])


def on_meta(unet: Any) -> Any:
    """A UNet of the same configuration on the meta device."""
    with torch.device("meta"):
        return type(unet).from_config(unet.config)


def cost(unet: Any, side: int) -> UNetCost:
    """The cost of a UNet on the meta device for latents of side x side."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = torch.empty(1, unet.config.in_channels, side, side, device="meta")
    prompt = torch.empty(1, 2, unet.config.cross_attention_dim, device="meta")
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}  # the tensors stay alive, for a storage's address may be used again

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in own and not _is_attention(tensor):
            kept[place] = (tensor, tensor.numel() * tensor.element_size())
        return tensor

    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
        out = unet(inputs, torch.zeros(1, device="meta"), encoder_hidden_states=prompt).sample
    del out
    saved = sum(size for _, size in kept.values())
    return UNetCost(sum(p.numel() for p in unet.parameters()), float(counter.get_total_flops()), saved)


def _is_attention(tensor: Tensor) -> bool:
    """Whether it is a matrix of every position against every other: (..., n, n) of a few heads."""
    shape = tensor.shape
    square = tensor.ndim >= 3 and shape[-1] == shape[-2] and shape[-1] >= MOST_HEADS
    return bool(square and (tensor.ndim == 3 or shape[1] <= MOST_HEADS))
