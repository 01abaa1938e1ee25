"""torch.compile of a teacher's networks, in place: same weights, same parameter names, faster on a GPU.

Each network is compiled for the one shape that labelling gives it; another shape compiles again. Maps differ from the
eager ones by rounding: `distill.teachers._precision` measures by how much.
"""

from __future__ import annotations

from typing import Any

from torch import nn

SHAPES = 64
"""Shapes for which one kind of network is compiled; for further ones it silently runs uncompiled. torch's default is 8,
which the trial of batch sizes uses up."""


def networks(teacher: Any) -> list[nn.Module]:
    """The teacher's modules and those of its diffusion parts (UNet, VAE encoder and decoder, DPT head)."""
    parts = getattr(teacher, "parts", None)
    holders = [teacher, parts] if parts is not None else [teacher]
    modules = [value for holder in holders for value in _values(holder) if isinstance(value, nn.Module)]
    groups: list[list[Any]] = [[part.encoder, part.decoder] if _is_vae(part) else [part] for part in modules]
    return [part for group in groups for part in group]


def compile_networks(teacher: Any) -> None:
    """Compiles every network of the teacher; compilation happens at the first batch and is cached on disk.

    Raises ValueError for a teacher that has no network to compile.
    """
    parts = networks(teacher)
    if not parts:
        raise ValueError(f"teachers.compile: {teacher.card.name} has no network to compile; leave it out")
    from torch._dynamo import config  # noqa: PLC0415 - takes seconds, needed only to compile

    config.recompile_limit = max(SHAPES, config.recompile_limit)
    for part in parts:
        part.compile(dynamic=False)


def _values(holder: Any) -> list[Any]:
    if hasattr(holder, "__dict__"):
        return list(vars(holder).values())
    return [getattr(holder, name) for name in getattr(holder, "__slots__", ())]


def _is_vae(part: nn.Module) -> bool:
    # AutoencoderKL itself is never called, only its encoder and decoder.
    return isinstance(getattr(part, "encoder", None), nn.Module) and hasattr(part, "quant_conv")
