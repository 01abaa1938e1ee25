"""Weights in four bits (or eight): groups of neighbours in a row share a lowest value and a step, both float16.

Codes are rounded to nearest. The lowest value and the step are those of least squared error over a few initial cuts of
the range; a regression for fixed codes alternates with a rounding for fixed numbers (ours; the group-wise scheme is
common practice). It is a storage format only: at load the weights become float32 again, so speed and memory are those
of any other student.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

GROUP = 64
"""Weights per group when written; when read, the group's size follows from the parts (128 in older files)."""
# Initial fractions of the range; cutting off rare extremes makes the step finer.
_CUTS = (1.0, 0.9, 0.8, 0.7, 0.6)
_TURNS = 4
_SIZES = (GROUP, 128)


def fits(values: Tensor) -> bool:
    """True where float16 holds every value: none is NaN, infinite or above 65504."""
    return bool(values.detach().half().isfinite().all())


def quantize(values: Tensor, *, bits: int = 4) -> dict[str, Tensor]:
    """`codes` (uint8, two to a byte for 4 bits), `low` and `step` (float16, one per group) of a tensor of any shape.

    Groups run over the flattened tensor; the last one is padded with its last value. Raises ValueError for values
    that do not fit float16 (`fits`).
    """
    if not fits(values):
        raise ValueError("a value is NaN, infinite or above 65504, so low and step, float16, cannot store it")
    flat = values.detach().float().flatten()
    filled = torch.cat([flat, flat[-1:].expand(-len(flat) % GROUP)]).reshape(-1, GROUP)
    return packed(*fitted(filled, bits=bits), bits=bits)


def packed(codes: Tensor, lows: Tensor, steps: Tensor, *, bits: int) -> dict[str, Tensor]:
    """The parts as they are stored, from codes (N,GROUP) and each row's lowest value and step (N,1)."""
    flat = codes.to(torch.uint8).flatten()
    if bits == 4:
        flat = flat[0::2] | (flat[1::2] << 4)
    return {"codes": flat, "low": lows[:, 0].half(), "step": steps[:, 0].half()}


def rounded(values: Tensor, low: Tensor, step: Tensor, *, bits: int) -> Tensor:
    """The codes, as floats, that are nearest to the values."""
    return ((values - low) / step).round().clamp(0, 2**bits - 1)


def fitted(rows: Tensor, *, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes like `rows`, and the lowest value and step (N,1) of each row, with the least squared error found."""
    levels = 2**bits - 1
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    mean = rows.mean(1, keepdim=True)
    best = torch.full_like(low, torch.inf)
    codes, lows, steps = torch.zeros_like(rows), low, torch.zeros_like(low)
    for cut in _CUTS:
        a, step = (low + high) / 2 - (high - low) / 2 * cut, (high - low) * cut / levels
        for _ in range(_TURNS):
            # Through float16 first: the codes must fit the numbers that will be read back.
            a, step = a.half().float(), step.half().float().clamp(min=1e-7)
            tried = rounded(rows, a, step, bits=bits)
            error = (tried * step + a - rows).square().sum(1, keepdim=True)
            better = error < best
            codes, lows, steps = (torch.where(better, n, o) for n, o in ((tried, codes), (a, lows), (step, steps)))
            best = torch.where(better, error, best)
            dev = tried - tried.mean(1, keepdim=True)
            step = (dev * (rows - mean)).sum(1, keepdim=True) / dev.square().sum(1, keepdim=True).clamp(min=1e-9)
            a = mean - step * tried.mean(1, keepdim=True)
    return codes, lows, steps


def dequantize(parts: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """The float32 tensor of `shape` that `quantize` stored; ValueError where the parts do not fit it."""
    codes, groups, count = parts["codes"], len(parts["low"]), shape.numel()
    # The size of a group is not stored: it follows from the number of groups.
    size = next((n for n in _SIZES if -(-count // n) == groups), 0)
    if len(codes) * 2 == groups * size:
        codes = torch.stack([codes & 15, codes >> 4], dim=1).flatten()
    if not size or len(codes) != groups * size or len(parts["step"]) != groups:
        raise ValueError(f"{len(codes)} codes in {groups} groups are not a tensor of {tuple(shape)}")
    values = codes.reshape(-1, size).float() * parts["step"].float()[:, None] + parts["low"].float()[:, None]
    return values.flatten()[:count].reshape(shape)


# Small matrices gain nothing. Errors in an encoder's first layer affect all later ones: it keeps eight bits.
QUANTIZED_FROM = 4096
EIGHT_BITS = ("pos_embed", "patch_embed.proj.weight")
_PARTS = ("codes", "low", "step")


def pack(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    *,
    calibrated: Mapping[str, dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Every large matrix and kernel replaced by its parts, named KEY:codes, KEY:low, KEY:step.

    calibrated: parts of some tensors, used instead (students.rounding).
    """
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if may_shrink(value) and shapes[key].numel() > QUANTIZED_FROM and fits(value):
            known = (calibrated or {}).get(key)
            parts = known or quantize(value, bits=8 if key.endswith(EIGHT_BITS) else 4)
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
            raise ValueError(f"{where}: has an unknown or incomplete quantized tensor, {key}")
        try:
            out[key] = dequantize(parts, tensors[key].shape)
        except ValueError as error:
            raise ValueError(f"{where}: {key}: {error}") from error
    return out


def may_shrink(value: Tensor) -> bool:
    """Whether a tensor is a matrix or kernel, which fewer bits can store."""
    return value.is_floating_point() and value.ndim >= 2
