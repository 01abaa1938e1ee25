"""A teacher's networks compiled in place: the same weights under the same names, faster on a card.

Each network is compiled for the one shape that labelling gives it; another shape compiles again. Maps differ from the
eager ones by rounding: `distill.teachers._precision` measures by how much.
"""

from __future__ import annotations

from typing import Any

from torch import nn

SHAPES = 64
"""Shapes that one kind of network is compiled for; at one more it computes uncompiled, and nothing says so. torch's own
number is 8, which the trial of batch sizes uses up."""


def networks(teacher: Any) -> list[nn.Module]:
    """What of a teacher computes: its modules, or those of its diffusion parts (UNet, the VAE's two halves, a head)."""
    parts = getattr(teacher, "parts", None)
    holders = [teacher, parts] if parts is not None else [teacher]
    modules = [value for holder in holders for value in _values(holder) if isinstance(value, nn.Module)]
    halves: list[list[Any]] = [[part.encoder, part.decoder] if _is_vae(part) else [part] for part in modules]
    return [part for several in halves for part in several]


def compile_networks(teacher: Any) -> None:
    """Compiles every network of the teacher; the compiling itself happens at the first batch, and is cached on disk.

    Raises ValueError for a teacher that has no network to compile.
    """
    parts = networks(teacher)
    if not parts:
        raise ValueError(f"teachers.compile: {teacher.card.name} has no network to compile; leave it out")
    from torch._dynamo import config  # noqa: PLC0415 - seconds, which only those who compile are to wait

    config.recompile_limit = max(SHAPES, config.recompile_limit)
    for part in parts:
        part.compile(dynamic=False)


def _values(holder: Any) -> list[Any]:
    if hasattr(holder, "__dict__"):
        return list(vars(holder).values())
    return [getattr(holder, name) for name in getattr(holder, "__slots__", ())]


def _is_vae(part: nn.Module) -> bool:
    # AutoencoderKL is not called: its two halves are.
    return isinstance(getattr(part, "encoder", None), nn.Module) and hasattr(part, "quant_conv")
