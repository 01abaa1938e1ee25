"""What a training run is told: its settings, and the learning rates that follow from them.

Every count here is in optimizer steps, however many processes or accumulated micro-batches make one up: the rate of
step t is a pure function of t, and is written into the optimizer rather than stepped by a scheduler object (accelerate
steps a prepared scheduler once per process, so that N processes decay N times too fast).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

# A recipe is judged by these settings, and reading one should not wait for torch.
if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEDULES = ("cosine", "linear", "poly", "constant")
PRECISIONS = ("fp32", "bf16")
STRATEGIES = ("select", "average")
BATCHNORMS = ("batch", "sync", "frozen")
KIND = "affine_disparity"
# How a run may be told differently when it goes on, because its mathematics stays the same.
CHANGEABLE = frozenset(
    "accumulate workers eval_batch_size save_every keep_last log_every trackers compile channels_last "
    "gradient_checkpointing fused cpu".split()
)
POLY_POWER = 0.9  # Depth Anything V2's training of the metric models


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Everything `distill.training.train.train` is told apart from its data.

    steps: optimizer steps. batch_size: images per optimizer step, over all processes and micro-batches; a multiple of
    processes x accumulate. lr: the decoder's; encoder_lr: the encoder's, None = the same (Distill-Any-Depth: 5e-5 for
    the decoder; a tenth of it for the encoder is Depth Anything V2's practice). warmup_steps: linear, from lr / warmup.
    weight_decay: on matrices and kernels, not on vectors (norms, biases). clip_norm: 0 = off.
    layer_decay: the encoder's deepest block learns at encoder_lr, each block before it at so many times the next one's
    rate, what comes before the blocks slowest; 1 = all alike. freeze_steps: the encoder begins to learn after so many.
    holdout: the fraction of *images* (not samples) kept for choosing the checkpoint, by a hash of the image key alone,
    so that runs of every seed keep the same ones. eval_every, save_every: 0 = at the end only. patience: stop after
    so many evaluations without improvement; 0 = never.
    teachers: how often each teacher's labels are learnt from, e.g. {"primary": 0.7, "assistant": 0.3}; empty = the
    only one there is. strategy: "select" draws one per step from (seed, step); "average" learns from the weighted mean
    of the teachers' normalized maps (paper, Table 4). kind: what the student predicts; labels are converted to it.
    batchnorm: "batch" takes each process's micro-batch (so results depend on processes and accumulation), "sync" the
    micro-batches of all processes (CUDA only), "frozen" the stored statistics (results depend on neither).
    ema: decay of averaged weights, which are then the ones evaluated and kept; 0 = off; warms up as (1+t)/(10+t).
    hflip: mirror every second image. colour: strength of colour jitter on the student's image, 0 = off. crop: smallest
    area fraction of a random resized crop, 1 = off. alarm_growth: warn when the output's deviation grew so many times.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    lr: float = 5e-5
    encoder_lr: float | None = None
    layer_decay: float = 1.0
    freeze_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 0
    schedule: str = "cosine"
    clip_norm: float = 1.0
    precision: str = "fp32"
    seed: int = 0
    workers: int = 2
    holdout: float = 0.05
    eval_every: int = 500
    eval_batch_size: int = 8
    patience: int = 0
    save_every: int = 500
    keep_last: int = 2
    log_every: int = 1
    trackers: tuple[str, ...] = ("tensorboard",)
    teachers: Mapping[str, float] = field(default_factory=dict)
    strategy: str = "select"
    kind: str = KIND
    freeze_encoder: bool = False
    batchnorm: str = "batch"
    ema: float = 0.0
    hflip: bool = False
    colour: float = 0.0
    crop: float = 1.0
    alarm_growth: float = 10.0
    compile: bool = False
    channels_last: bool = False
    gradient_checkpointing: bool = False
    fused: bool = False
    cpu: bool = False

    def __post_init__(self) -> None:
        if faults := _faults(self):
            raise ValueError("; ".join(faults))

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON would give them back: lists for tuples."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def below(table: object, **least: int) -> list[str]:
    """A clause for every field of `table` that is less than its least value, or not finite."""
    values = {name: getattr(table, name) for name in least}
    return [
        f"{name} must be {'finite and ' if isinstance(value, float) else ''}at least {least[name]}, not {value}"
        for name, value in values.items()
        if not least[name] <= value < math.inf
    ]


def _faults(s: TrainSettings) -> list[str]:
    """Every fault of the settings at once, one clause each."""
    at_least = {"steps": 1, "batch_size": 1, "accumulate": 1, "warmup_steps": 0, "workers": 0, "eval_every": 0}
    at_least |= {"eval_batch_size": 1, "patience": 0, "save_every": 0, "keep_last": 1, "log_every": 1}
    at_least |= {"weight_decay": 0, "clip_norm": 0, "colour": 0, "freeze_steps": 0}
    faults = below(s, **at_least) + _unknown_words(s) + _bad_rates(s)
    if s.warmup_steps >= s.steps:
        faults.append(f"warmup_steps ({s.warmup_steps}) must be fewer than steps ({s.steps})")
    if s.accumulate > 0 and s.batch_size % s.accumulate:
        faults.append(f"batch_size ({s.batch_size}) must be a multiple of accumulate ({s.accumulate})")
    for name, value in (("holdout", s.holdout), ("ema", s.ema)):
        if not 0.0 <= value < 1.0:
            faults.append(f"{name} must be a fraction, not {value}")
    for name, value in (("crop", s.crop), ("layer_decay", s.layer_decay)):
        if not 0.0 < value <= 1.0:
            faults.append(f"{name} must lie in (0, 1], not {value}")
    if s.freeze_encoder and s.freeze_steps:
        faults.append("freeze_encoder = true freezes the encoder for good: leave out freeze_steps")
    if s.alarm_growth <= 1.0:
        faults.append(f"alarm_growth must be above 1, not {s.alarm_growth}")
    if not all(0.0 <= b < 1.0 for b in s.betas):
        faults.append(f"betas must lie in [0, 1), not {s.betas}")
    bad = [f"{name} = {share}" for name, share in s.teachers.items() if share < 0]
    if bad or (s.teachers and not sum(s.teachers.values()) > 0):
        faults.append(f"teachers must have shares of at least 0 that do not sum to 0, not {dict(s.teachers)}")
    return faults


def _unknown_words(s: TrainSettings) -> list[str]:
    choices = {"schedule": SCHEDULES, "precision": PRECISIONS, "strategy": STRATEGIES, "batchnorm": BATCHNORMS}
    if s.kind != KIND:
        from distill.core.depth import Kind

        choices["kind"] = tuple(kind.value for kind in Kind)
    return [
        f"{name} must be one of {', '.join(allowed)}, not {getattr(s, name)!r}"
        for name, allowed in choices.items()
        if getattr(s, name) not in allowed
    ]


def _bad_rates(s: TrainSettings) -> list[str]:
    way_out = {"lr": "", "encoder_lr": "; to train the decoder alone set freeze_encoder = true"}
    rates = {"lr": s.lr, "encoder_lr": s.lr if s.encoder_lr is None else s.encoder_lr}
    bad = [name for name, rate in rates.items() if not 0 < rate < math.inf and getattr(s, name) is not None]
    return [f"{name} must be finite and above 0, not {rates[name]}{way_out[name]}" for name in bad]


def factor(step: int, settings: TrainSettings) -> float:
    """The learning rate of 0-based optimizer step `step` as a fraction of its peak: warm-up, then decay towards 0."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if settings.schedule == "linear":
        return 1.0 - progress
    if settings.schedule == "poly":
        return (1.0 - progress) ** POLY_POWER
    return 1.0


_BLOCK = re.compile(r"(?:^|\.)(?:blocks|stages|layers)\.(\d+)\.")
_BEFORE_BLOCKS = re.compile(r"embed|token|stem|rope")


def _depths(encoder: nn.Module) -> dict[int, int]:
    """How many blocks each parameter (by id) lies below the deepest; what follows the blocks lies 0 below it."""
    blocks = {id(p): int(match[1]) for name, p in encoder.named_parameters() if (match := _BLOCK.search(name))}
    deepest = max(blocks.values(), default=0)
    below = {id(p): deepest + 1 if _BEFORE_BLOCKS.search(name) else 0 for name, p in encoder.named_parameters()}
    return below | {key: deepest - block for key, block in blocks.items()}


def parameter_groups(student: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Encoder and decoder, with and without weight decay; each group has its peak rate as `lr` and a `name`.

    With layer_decay the encoder has such groups for every block, whose `scale` is their share of its rate. Raises
    ValueError where there is none, or one that neither `student.encoder` nor `student.decoder` holds.
    """
    owners = {"encoder": getattr(student, "encoder", None), "decoder": getattr(student, "decoder", None)}
    rates = {"encoder": settings.encoder_lr or settings.lr, "decoder": settings.lr}
    encoder = owners["encoder"]
    depths = _depths(encoder) if settings.layer_decay < 1.0 and encoder is not None else {}
    claimed: set[int] = set()
    groups = []
    for owner, module in owners.items():
        mine = [p for p in (module.parameters() if module is not None else ()) if p.requires_grad]
        mine = [p for p in mine if id(p) not in claimed]
        claimed.update(id(p) for p in mine)
        kinds: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for p in mine:
            depth = depths.get(id(p), 0) if owner == "encoder" else 0
            kinds.setdefault((depth, p.ndim <= 1), []).append(p)
        for (depth, plain), params in sorted(kinds.items(), key=lambda kind: kind[0]):
            name = f"{owner}_no_decay" if plain else owner
            scale = settings.layer_decay**depth
            weight_decay = 0.0 if plain else settings.weight_decay
            groups.append(
                {"params": params, "lr": rates[owner] * scale, "scale": scale}
                | {"weight_decay": weight_decay, "name": name}
            )
    left_out = [name for name, p in student.named_parameters() if p.requires_grad and id(p) not in claimed]
    if left_out:
        raise ValueError(
            f"the optimizer would leave out {', '.join(left_out[:5])} ({len(left_out)} in all): they belong to neither "
            f"student.encoder nor student.decoder; move them there or set requires_grad = False"
        )
    if not groups:
        raise ValueError("the student has no trainable parameter: nothing to train")
    return groups


def make_optimizer(student: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over every trainable parameter of the student, at peak rates until `set_rates`."""
    import torch

    groups = parameter_groups(student, settings)
    return torch.optim.AdamW(groups, betas=settings.betas, fused=True if settings.fused else None)


def set_rates(optimizer: torch.optim.Optimizer, step: int, settings: TrainSettings) -> dict[str, float]:
    """Writes the rates of optimizer step `step` into the optimizer; returns them by owner, for the log."""
    scale = factor(step, settings)
    rates = {"encoder": (settings.encoder_lr or settings.lr) * scale, "decoder": settings.lr * scale}
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"].removesuffix("_no_decay")] * group["scale"]
    return rates
