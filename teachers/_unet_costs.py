"""The cost of a pass of a UNet or of its VAE, counted on the meta device without computation or weights.

Shapes: one image's latents, side x side; for a VAE, an image of pixels x pixels.
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
"""The settings in which the two UNets differ (their blocks are equal), from their published unet/config.json."""
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""The VAE of every Stable Diffusion version, from its published vae/config.json."""
MOST_HEADS = 32
LOW = (F.conv2d, F.linear, torch.matmul, torch.bmm, torch.baddbmm, F.scaled_dot_product_attention)
HIGH = (F.group_norm, F.layer_norm, torch.softmax, F.softmax)
"""The functions that autocast runs in bfloat16 (LOW) and in float32 (HIGH), of those that these networks call."""


@dataclass(frozen=True, slots=True)
class UNetCost:
    """parameters: their number. flops: of one forward pass of one image. saved: bytes saved for the backward pass,
    without attention matrices (which no fused kernel saves) and parameters. inside: the largest number of further bytes
    while a checkpointed block is recomputed; 0 without checkpointing.
    """

    parameters: int
    flops: float
    saved: int
    inside: int = 0


@dataclass(frozen=True, slots=True)
class VAECost:
    """parameters: their number. encode, decode: FLOPs of one image. saved: bytes, float32, that decoding saves
    for the gradient of its latents.
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
    """Stable Diffusion's VAE on the meta device."""
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
    forward_saved, most = _SavedTensors(unet), 0

    def recompute(block: Callable[..., Any], *given: Any) -> Any:
        # A checkpointed block saves its inputs; its other saved tensors exist only while it is recomputed.
        nonlocal most
        for value in given:
            if isinstance(value, Tensor):
                forward_saved.keep(value)
        inner = _SavedTensors(unet, forward_saved.copies)
        with inner.hooks():
            out = block(*given)
        most = max(most, inner.bytes)
        return out

    if checkpointing:
        unet.enable_gradient_checkpointing(recompute)
    counter = FlopCounterMode(display=False)
    with forward_saved.hooks(), counter, _Autocast(forward_saved.copies) if bf16 else nullcontext():
        out = unet(inputs, torch.zeros(1, device="meta"), encoder_hidden_states=prompt).sample
    del out
    if checkpointing:
        unet.disable_gradient_checkpointing()
    parameters = sum(p.numel() for p in unet.parameters())
    return UNetCost(parameters, float(counter.get_total_flops()), forward_saved.bytes, most)


def vae_cost(vae: Any, pixels: int) -> VAECost:
    """The cost of a VAE on the meta device for images of pixels x pixels; it is frozen."""
    from torch.utils.flop_counter import FlopCounterMode

    vae.requires_grad_(False)
    images = torch.empty(1, 3, pixels, pixels, device="meta")
    encoding, decoding, saved = FlopCounterMode(display=False), FlopCounterMode(display=False), _SavedTensors(vae)
    with encoding:
        latents = vae.encode(images).latent_dist.mean
    with saved.hooks(), decoding:
        out = vae.decode(latents.requires_grad_(True)).sample
    del out
    parameters = sum(p.numel() for p in vae.parameters())
    return VAECost(parameters, float(encoding.get_total_flops()), float(decoding.get_total_flops()), saved.bytes)


class _SavedTensors:
    """The tensors that autograd saves, one per storage, without parameters and their casts."""

    def __init__(self, network: Any, copies: dict[int, Tensor] | None = None) -> None:
        self._own = {p.untyped_storage()._cdata for p in network.parameters()}
        self.copies: dict[int, Tensor] = {} if copies is None else copies
        self._tensors: dict[int, Tensor] = {}  # kept alive, because a freed storage's address may be reused

    def keep(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in self._own and address not in self.copies and not _is_attention(tensor):
            self._tensors[address] = tensor
        return tensor

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        # A view counts as its whole storage.
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors.values())


class _Autocast(TorchFunctionMode):
    """Emulates autocast on the meta device, which it does not support. copies: casts of parameters, by storage."""

    def __init__(self, copies: dict[int, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOW or func in HIGH:
            to = torch.bfloat16 if func in LOW else torch.float32
            args = tuple(self._cast(value, to) for value in args)
            kwargs = {key: self._cast(value, to) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any, to: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == to:
            return value
        cast = value.to(to)
        if value.is_leaf and value.requires_grad:
            self._copies[cast.untyped_storage()._cdata] = cast
        return cast


def _is_attention(tensor: Tensor) -> bool:
    """Whether `tensor` is an attention matrix: (..., n, n) of a few heads."""
    shape = tensor.shape
    square = tensor.ndim >= 3 and shape[-1] == shape[-2] and shape[-1] >= MOST_HEADS
    return bool(square and (tensor.ndim == 3 or shape[1] <= MOST_HEADS))
