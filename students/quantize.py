"""Weights in four bits (or eight): groups of GROUP neighbours in a row share a lowest value and a step, both float16.

Rounding to nearest, with the range that leaves the least squared error among a few that cut the extremes a little
(ours; the group-wise scheme is common practice). It is a way to store a student: at load the weights become float32
again, so speed and memory are those of any other student.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

GROUP = 128
# Fractions of the range that are tried; cutting a rare extreme makes every other step finer.
_CUTS = (1.0, 0.92, 0.85, 0.78)


def fits(values: Tensor) -> bool:
    """True where float16 holds every value: none is NaN, infinite or above 65504."""
    return bool(values.detach().half().isfinite().all())


def quantize(values: Tensor, *, bits: int = 4) -> dict[str, Tensor]:
    """`codes` (uint8, two to a byte for 4 bits), `low` and `step` (float16, one per group) of a tensor of any shape.

    Groups run over the flattened tensor; the last one is filled up with its last value. Raises ValueError for values
    that do not fit float16 (`fits`).
    """
    if not fits(values):
        raise ValueError("a value is NaN, infinite or above 65504, so low and step, float16, cannot store it")
    levels = 2**bits - 1
    flat = values.detach().float().flatten()
    filled = torch.cat([flat, flat[-1:].expand(-len(flat) % GROUP)]).reshape(-1, GROUP)
    low, high = filled.amin(1, keepdim=True), filled.amax(1, keepdim=True)
    best = torch.full_like(low, torch.inf)
    codes, lows, steps = torch.zeros_like(filled), low.clone(), torch.zeros_like(low)
    for cut in _CUTS:
        # Through float16 first: the codes must fit the numbers that will be read back.
        a = ((low + high) / 2 - (high - low) / 2 * cut).half().float()
        step = ((high - low) * cut / levels).half().float().clamp(min=1e-7)
        tried = ((filled - a) / step).round().clamp(0, levels)
        error = (tried * step + a - filled).square().sum(1, keepdim=True)
        better = error < best
        codes, lows, steps = (torch.where(better, n, o) for n, o in ((tried, codes), (a, lows), (step, steps)))
        best = torch.where(better, error, best)
    packed = codes.to(torch.uint8).flatten()
    if bits == 4:
        packed = packed[0::2] | (packed[1::2] << 4)
    return {"codes": packed, "low": lows[:, 0].half(), "step": steps[:, 0].half()}


def dequantize(parts: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """The float32 tensor of `shape` that `quantize` stored; ValueError where the parts do not fit it."""
    groups = -(-shape.numel() // GROUP)
    codes = parts["codes"]
    if len(codes) * 2 == groups * GROUP:
        codes = torch.stack([codes & 15, codes >> 4], dim=1).flatten()
    if len(codes) != groups * GROUP or len(parts["low"]) != groups or len(parts["step"]) != groups:
        raise ValueError(f"{len(codes)} codes in {len(parts['low'])} groups are not a tensor of {tuple(shape)}")
    values = codes.reshape(-1, GROUP).float() * parts["step"].float()[:, None] + parts["low"].float()[:, None]
    return values.flatten()[: shape.numel()].reshape(shape)


# Small matrices gain nothing. What an encoder's first layer loses, every later one has lost: it keeps eight bits.
_QUANTIZED_FROM = 4096
_EIGHT_BITS = ("pos_embed", "patch_embed.proj.weight")
_PARTS = ("codes", "low", "step")


def pack(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Every large matrix and kernel replaced by its parts, named KEY:codes, KEY:low, KEY:step."""
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if may_shrink(value) and shapes[key].numel() > _QUANTIZED_FROM and fits(value):
            parts = quantize(value, bits=8 if key.endswith(_EIGHT_BITS) else 4)
            out |= {f"{key}:{part}": stored for part, stored in parts.items()}
        else:
            out[key] = value
    return out


def unpack(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """The inverse of `pack` for the tensors that the network knows; ValueError names `where`, the file."""
    out = {key: value for key, value in state.items() if ":" not in key}
    for key in {key.rpartition(":")[0] for key in state if ":" in key}:
        parts = {part: state[f"{key}:{part}"] for part in _PARTS if f"{key}:{part}" in state}
        if key not in tensors or len(parts) != len(_PARTS):
            raise ValueError(f"{where}: has an unclaimed or incomplete quantized tensor, {key}")
        try:
            out[key] = dequantize(parts, tensors[key].shape)
        except ValueError as error:
            raise ValueError(f"{where}: {key}: {error}") from error
    return out


def may_shrink(value: Tensor) -> bool:
    """Whether a tensor is a matrix or kernel, which fewer bits can store."""
    return value.is_floating_point() and value.ndim >= 2
