"""The learning rates of a run's settings, and its optimizer.

Every count here is in optimizer steps, however many processes or accumulated micro-batches make one up: the rate of
step t is a pure function of t, and is written into the optimizer rather than stepped by a scheduler object (accelerate
steps a prepared scheduler once per process, so N processes would decay N times too fast).
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from distill.training.settings import TrainSettings

POLY_POWER = 0.9  # Depth Anything V2's training of the metric models
FINAL_RATIO = 0.01  # Marigold's and GenPercept's training configurations
OWNERS = {"encoder": "encoder_lr", "decoder": "lr", "unet": "lr", "head": "lr"}
"""The parts that a student may have, and the setting with their peak rate."""


def in_steps(settings: TrainSettings, samples: int) -> TrainSettings:
    """The settings with `epochs` and `warmup_epochs` converted to steps, for a number of training samples; unchanged
    without epochs.

    An epoch is samples / batch_size steps, rounded at the end: five epochs of 7 samples in batches of 2 are 18 steps.
    There is at least one step, and at least one after the warm-up.
    """
    if not settings.epochs:
        return settings
    steps = max(1, round(settings.epochs * samples / settings.batch_size))
    warmup = round(settings.warmup_epochs * samples / settings.batch_size) or settings.warmup_steps
    return replace(settings, steps=steps, warmup_steps=min(warmup, steps - 1))


def factor(step: int, settings: TrainSettings) -> float:
    """The learning rate of 0-based optimizer step `step` as a fraction of its peak: warm-up, then decay towards 0."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    end = settings.schedule_steps or settings.steps
    progress = min(1.0, (step - settings.warmup_steps) / (end - settings.warmup_steps))
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if settings.schedule == "linear":
        return 1.0 - progress
    if settings.schedule == "poly":
        return (1.0 - progress) ** POLY_POWER
    if settings.schedule == "exponential":
        return FINAL_RATIO**progress
    return 1.0


_BLOCK = re.compile(r"(?:^|\.)(?<!vit\.)(?:blocks|stages|layers)\.(\d+)\.")
_BEFORE_BLOCKS = re.compile(r"embed|token|stem|rope|(?:^|\.)vit\.")  # VGGT's blocks follow a whole ViT


def _depths(encoder: nn.Module) -> dict[int, int]:
    """How many blocks each parameter (by id) lies below the deepest block; 0 for parameters after the blocks."""
    blocks = {id(p): int(match[1]) for name, p in encoder.named_parameters() if (match := _BLOCK.search(name))}
    deepest = max(blocks.values(), default=0)
    below = {id(p): deepest + 1 if _BEFORE_BLOCKS.search(name) else 0 for name, p in encoder.named_parameters()}
    return below | {key: deepest - block for key, block in blocks.items()}


def parameter_groups(student: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """The optimizer's groups: each part with and without weight decay, with its peak rate as `lr` and a `name`.

    With layer_decay the encoder has such groups for every block, whose `scale` is their fraction of its rate. Raises
    ValueError where no parameter is trainable, or one belongs to no part (OWNERS).
    """
    owners = {name: getattr(student, name, None) for name in OWNERS}
    rates = {name: getattr(settings, rate) for name, rate in OWNERS.items()}
    encoder = owners["encoder"]
    depths = _depths(encoder) if settings.layer_decay < 1.0 and encoder is not None else {}
    claimed: set[int] = set()
    groups = []
    for owner, module in owners.items():
        kinds: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for p in module.parameters() if module is not None else ():
            if p.requires_grad and id(p) not in claimed:
                claimed.add(id(p))
                kinds.setdefault((depths.get(id(p), 0), p.ndim <= 1), []).append(p)
        for (depth, plain), params in sorted(kinds.items(), key=lambda kind: kind[0]):
            scale = settings.layer_decay**depth
            groups.append(
                {
                    "params": params,
                    "lr": rates[owner] * scale,
                    "scale": scale,
                    "weight_decay": 0.0 if plain else settings.weight_decay,
                    "name": f"{owner}_no_decay" if plain else owner,
                }
            )
    left_out = [name for name, p in student.named_parameters() if p.requires_grad and id(p) not in claimed]
    if left_out:
        raise ValueError(
            f"the optimizer would leave out {', '.join(left_out[:5])} ({len(left_out)} in all): they belong to none of "
            f"student.{', student.'.join(OWNERS)}; move them there or set requires_grad = False"
        )
    if not groups:
        raise ValueError("the student has no trainable parameter: nothing to train")
    return groups


def make_optimizer(student: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over every trainable parameter of the student, at peak rates until `set_rates`."""
    groups = parameter_groups(student, settings)
    on_card = groups[0]["params"][0].is_cuda  # where the fused kernel also skips non-finite steps (step.py)
    return torch.optim.AdamW(groups, betas=settings.betas, fused=True if settings.fused or on_card else None)


def set_rates(optimizer: torch.optim.Optimizer, step: int, settings: TrainSettings) -> dict[str, float]:
    """Writes the rates of optimizer step `step` into the optimizer; returns them by owner, for the log."""
    scale = factor(step, settings)
    rates = {name: getattr(settings, rate) * scale for name, rate in OWNERS.items()}
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"].removesuffix("_no_decay")] * group["scale"]
    return rates
