"""What a pass of a UNet or of its VAE costs, in numbers, counted on the meta device: nothing is computed and no weights
are needed.

Shapes: one image's latents, side x side; of a VAE, its image of pixels x pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SIZES: dict[str, dict[str, Any]] = {
    "SD 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False},
    "SD 2.1": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
}
"""What differs between the two UNets, which have the same blocks; from their published unet/config.json."""
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""Stable Diffusion's, of every version; from its published vae/config.json."""
MOST_HEADS = 32
LOW = (F.conv2d, F.linear, torch.matmul, torch.bmm, torch.baddbmm, F.scaled_dot_product_attention)
HIGH = (F.group_norm, F.layer_norm, torch.softmax, F.softmax)
"""What autocast does in bfloat16, and what in float32, of all that these networks call."""


@dataclass(frozen=True, slots=True)
class UNetCost:
    """parameters: their number. flops: of one forward pass of one image. saved: bytes kept for the backward pass,
    without attention matrices (which no fused kernel keeps) and parameters. inside: bytes more while a checkpointed
    block is computed again, the most that any needs; 0 without checkpointing.
    """

    parameters: int
    flops: float
    saved: int
    inside: int = 0


@dataclass(frozen=True, slots=True)
class VAECost:
    """parameters: their number. encode, decode: FLOPs of one image. saved: bytes, float32, that decoding keeps for a
    gradient of its latents.
    """

    parameters: int
    encode: float
    decode: float
    saved: int


def stable_diffusion(name: str) -> Any:
    """The UNet of that name on the meta device."""
    import diffusers

    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(sample_size=64, **SIZES[name])


def stable_diffusion_vae() -> Any:
    """Its VAE on the meta device."""
    import diffusers

    with torch.device("meta"):
        return diffusers.AutoencoderKL(**VAE)


def on_meta(network: Any) -> Any:
    """A UNet or VAE of the same configuration on the meta device."""
    with torch.device("meta"):
        return type(network).from_config(network.config)


def cost(unet: Any, side: int, *, bf16: bool = False, checkpointing: bool = False) -> UNetCost:
    """The cost of a UNet on the meta device for latents of side x side, in float32 or under autocast."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = torch.empty(1, unet.config.in_channels, side, side, device="meta")
    prompt = torch.empty(1, 2, unet.config.cross_attention_dim, device="meta")
    kept, most = _Kept(unet), 0

    def again(block: Callable[..., Any], *given: Any) -> Any:
        # A checkpointed block: its inputs are kept, and what it keeps itself only while it is computed again.
        nonlocal most
        for one in given:
            if isinstance(one, Tensor):
                kept.keep(one)
        own = _Kept(unet, kept.copies)
        with own.hooks():
            out = block(*given)
        most = max(most, own.bytes)
        return out

    if checkpointing:
        unet.enable_gradient_checkpointing(again)
    counter = FlopCounterMode(display=False)
    with kept.hooks(), counter, _Autocast(kept.copies) if bf16 else nullcontext():
        out = unet(inputs, torch.zeros(1, device="meta"), encoder_hidden_states=prompt).sample
    del out
    if checkpointing:
        unet.disable_gradient_checkpointing()
    parameters = sum(p.numel() for p in unet.parameters())
    return UNetCost(parameters, float(counter.get_total_flops()), kept.bytes, most)


def vae_cost(vae: Any, pixels: int) -> VAECost:
    """The cost of a VAE on the meta device for images of pixels x pixels; it is frozen."""
    from torch.utils.flop_counter import FlopCounterMode

    vae.requires_grad_(False)
    images = torch.empty(1, 3, pixels, pixels, device="meta")
    encoding, decoding, kept = FlopCounterMode(display=False), FlopCounterMode(display=False), _Kept(vae)
    with encoding:
        latents = vae.encode(images).latent_dist.mean
    with kept.hooks(), decoding:
        out = vae.decode(latents.requires_grad_(True)).sample
    del out
    parameters = sum(p.numel() for p in vae.parameters())
    return VAECost(parameters, float(encoding.get_total_flops()), float(decoding.get_total_flops()), kept.bytes)


class _Kept:
    """The tensors that autograd saves, each storage once, but for parameters and their copies of another type."""

    def __init__(self, network: Any, copies: dict[int, Tensor] | None = None) -> None:
        self._own = {p.untyped_storage()._cdata for p in network.parameters()}
        self.copies: dict[int, Tensor] = {} if copies is None else copies
        self._kept: dict[int, Tensor] = {}  # they stay alive, for a storage's address may be used again

    def keep(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in self._own and place not in self.copies and not _is_attention(tensor):
            self._kept[place] = tensor
        return tensor

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(one.untyped_storage().nbytes() for one in self._kept.values())  # of a view, all that it keeps alive


class _Autocast(TorchFunctionMode):
    """Autocast's types on the meta device, which it does not know. copies: those of parameters, by their storage."""

    def __init__(self, copies: dict[int, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOW or func in HIGH:
            to = torch.bfloat16 if func in LOW else torch.float32
            args = tuple(self._cast(one, to) for one in args)
            kwargs = {key: self._cast(one, to) for key, one in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any, to: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == to:
            return value
        cast = value.to(to)
        if value.is_leaf and value.requires_grad:
            self._copies[cast.untyped_storage()._cdata] = cast
        return cast


def _is_attention(tensor: Tensor) -> bool:
    """Whether it is a matrix of every position against every other: (..., n, n) of a few heads."""
    shape = tensor.shape
    square = tensor.ndim >= 3 and shape[-1] == shape[-2] and shape[-1] >= MOST_HEADS
    return bool(square and (tensor.ndim == 3 or shape[1] <= MOST_HEADS))
