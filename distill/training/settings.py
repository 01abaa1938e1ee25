"""[train]: how a student is trained; distill.training.train does it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from distill.core.settings import above, below, raise_faults, unknown_words

# Settings that may change on a resume, because they do not affect the mathematics.
CHANGEABLE = frozenset(
    "accumulate workers eval_batch_size save_every keep_last log_every trackers compile channels_last "
    "gradient_checkpointing fused".split()
)

RENAMED = {"holdout": "val_fraction", "colour": "color_jitter"}
"""Renamed settings: old key: new key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """The loop: how much, how fast and in what order a student learns, what is kept, and how it is computed."""

    steps: int = 20_000
    """Optimizer steps. Paper: 20,000."""
    epochs: float = 0.0
    """Passes over the training samples, in place of `steps`; 0 = use `steps`. AnyDepth: 5."""
    batch_size: int = 8
    """Images per optimizer step over all processes and micro-batches; a multiple of processes x accumulate. Paper:
    8."""
    accumulate: int = 1
    """Micro-batches per process that make one step."""
    lr: float = 5e-5
    """The decoder's peak learning rate (AdamW). Paper: 5e-5."""
    encoder_lr: float = 5e-6
    """The encoder's peak learning rate. Inferred: a tenth of the decoder's, Depth Anything V2's practice."""
    weight_decay: float = 0.01
    """Weight decay of matrices and kernels, not of vectors (norms, biases). Ours."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of its two moments, in [0, 1). PyTorch's default."""
    warmup_steps: int = 500
    """Steps over which the rates rise linearly, from lr / warmup_steps. Ours."""
    warmup_epochs: float = 0.0
    """Epochs over which the rates rise, in place of warmup_steps. AnyDepth: 2."""
    schedule: Literal["cosine", "linear", "poly", "exponential", "constant"] = "cosine"
    """How the rates fall after the warm-up; "poly" with the power 0.9, "exponential" to a hundredth (Marigold's).
    Ours."""
    schedule_steps: int = 0
    """The step at which the rates reach their final value, and stay there; 0 = steps. Marigold: 25,000 of 30,000."""
    clip_norm: float = 1.0
    """The gradient's norm is clipped to this; 0 = off. Ours."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The student's number format under autocast; the loss is computed in float32."""
    freeze_encoder: bool = False
    """Train only the decoder."""
    primary_ratio: float = 0.7
    """The share of steps that use the first of two teachers, in [0, 1]. Paper: 0.7."""
    teacher_shares: dict[str, float] = field(default_factory=dict)
    """The share of steps that use each teacher, by name: { dav2 = 0.7, genpercept = 0.3 }; by default primary_ratio
    decides."""
    source_temperature: float = 1.0
    """How evenly sources of images are sampled: (images * weight) ** (1 / temperature), each [[images]] table being a
    source; 1 = in proportion, larger = more evenly. Ours."""
    source_weights: tuple[float, ...] = field(default=(), metadata={"key": False})
    even_batches: bool = False
    """Fill every batch by the sources' images.weight alone, however many images each has: of two sources with weight
    1, each fills half of every batch. FiffDepth: half synthetic, half real."""
    keep_unmet: bool = field(default=False, metadata={"key": False})
    canonical_focal: float = field(default=0.0, metadata={"key": False})
    strategy: Literal["select", "average", "average_unaligned"] = "select"
    """"select" draws one teacher per step from (seed, step); "average" trains on the weighted mean of their
    normalized maps, "average_unaligned" on that of their maps as they are. Paper: select (Table 4)."""
    kind: Literal[
        "affine_disparity", "scale_disparity", "metric_disparity", "affine_depth", "scale_depth", "metric_depth"
    ] = "affine_disparity"
    """What the student predicts; labels are converted to it. Paper: affine_disparity."""
    val_fraction: float = 0.02
    """The share of *images* (not samples) held out to select the checkpoint, in [0, 1), by a hash of the image key
    alone, so that runs of every seed hold out the same ones. Ours."""
    eval_every: int = 500
    """Steps between evaluations on the held-out images; 0 = only at the end."""
    eval_start: bool = False
    """Also evaluate before the first step; only logged, as step 0. Ours."""
    eval_batch_size: int = 8
    """Held-out images per process and batch."""
    save_every: int = 500
    """Steps between checkpoints; 0 = only at the end. A run that Ctrl-C or SIGTERM stops writes one too."""
    keep_last: int = 2
    """Number of newest checkpoints that are kept, besides the best one."""
    workers: int = 2
    """Processes that read, choose and augment samples; 0 = the training process itself."""
    hflip: bool = True
    """Mirror each image with probability 1/2. Ours."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter on the student's image; 0 = off. Ours."""
    random_resized_crop: float = 1.0
    """The smallest area of a random square crop, as a share of the region; in (0, 1], 1 = off. Ours."""
    rotation: float = 0.0
    """Rotate image and labels about their centre by a random angle up to this many degrees, either way; pixels from
    outside are black and invalid. Needs crops.patches = "none"; 0 = off. AnyDepth rotates; the angle is ours."""
    seed: int = -1
    """Seed of the initial weights, the order and the teacher choices; negative = run.seed. Trainings that
    differ only in this seed share the same labels."""
    layer_decay: float = 1.0
    """The encoder's deepest block has the rate encoder_lr, each earlier block this times the next one's rate, and
    whatever precedes the blocks the lowest; in (0, 1], 1 = all equal."""
    freeze_steps: int = 0
    """Number of steps at the start during which the encoder is frozen."""
    batchnorm: Literal["batch", "sync", "frozen"] = "batch"
    """Where BatchNorm's statistics come from: "batch" each process's micro-batch (results depend on processes and
    accumulate), "sync" the micro-batches of all processes (CUDA), "frozen" the stored ones (results depend on
    neither)."""
    ema: float = 0.0
    """Decay of averaged weights, which are then evaluated and saved, in [0, 1); 0 = off. Warms up as (1+t)/(10+t)."""
    patience: int = 0
    """Stop after this many evaluations without improvement; 0 = never."""
    alarm_growth: float = 10.0
    """The log warns when the output's deviation has grown by this factor since the warm-up; above 1. Ours."""
    log_every: int = 1
    """Steps between lines of log.jsonl. On a GPU the steps between do not synchronize, and a loss that is not finite is
    detected at the next line; no weight has changed since it occurred."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Experiment trackers that accelerate knows and that are installed, e.g. ["tensorboard", "wandb"]."""
    compile: bool = False
    """torch.compile the student (tests/speed/training.py measures the effect of this and the next three)."""
    channels_last: bool = False
    """Use the channels-last memory format in the student."""
    gradient_checkpointing: bool = False
    """Recompute the encoder's (or the UNet's) activations in the backward pass instead of storing them: slower,
    with less memory."""
    fused: bool = False
    """Use the fused AdamW kernel; it is always used on a GPU."""
    deterministic: bool = False
    """On a GPU: the same bits for every run and resume on one card; slower (tests/speed/training.py measures by
    how much). A CPU is always deterministic."""
    cache_features: bool = False
    """Compute a frozen encoder's features of the labelled regions once, store them next to the labels in float16, and
    train the decoder on them. Needs freeze_encoder = true, and neither color_jitter nor random_resized_crop; hflip
    doubles what is stored (distill.shards.features has the sizes). Ours."""
    patches_per_step: int = 0
    """Patches of each region that a step uses, redrawn at every visit; only these are read; 0 = all. Ours."""

    def __post_init__(self) -> None:
        raise_faults(_faults(self))

    @property
    def redraws(self) -> bool:
        """Whether a region looks different at every visit, apart from mirroring."""
        return self.color_jitter > 0 or self.random_resized_crop < 1.0 or self.rotation > 0

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON would return them: lists for tuples."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def _faults(s: TrainSettings) -> list[str]:
    """Every fault of the settings at once, one clause each."""
    ratio = 0.0 <= s.primary_ratio <= 1.0
    faults = [] if ratio else [f"primary_ratio must be in [0, 1], not {s.primary_ratio}"]
    faults += above(s, workers=256, accumulate=65536, batch_size=65536, eval_batch_size=65536)
    faults += below(
        s, steps=1, batch_size=1, accumulate=1, warmup_steps=0, workers=0, eval_every=0, eval_batch_size=1, patience=0,
        save_every=0, keep_last=1, log_every=1, schedule_steps=0, weight_decay=0, clip_norm=0, patches_per_step=0,
        color_jitter=0, freeze_steps=0,
    )  # fmt: skip
    faults += unknown_words(s) + _bad_rates(s) + _bad_sources(s) + _bad_lengths(s)
    if s.accumulate > 0 and s.batch_size % s.accumulate:
        faults.append(f"batch_size ({s.batch_size}) must be a multiple of accumulate ({s.accumulate})")
    for name, value in (("val_fraction", s.val_fraction), ("ema", s.ema)):
        if not 0.0 <= value < 1.0:
            faults.append(f"{name} must be a fraction, not {value}")
    for name, value in (("random_resized_crop", s.random_resized_crop), ("layer_decay", s.layer_decay)):
        if not 0.0 < value <= 1.0:
            faults.append(f"{name} must lie in (0, 1], not {value}")
    if s.freeze_encoder and s.freeze_steps:
        faults.append("freeze_encoder = true freezes the encoder for the whole run: remove freeze_steps")
    faults += _uncacheable(s)
    if not 1.0 < s.alarm_growth < math.inf:
        faults.append(f"alarm_growth must be finite and above 1, not {s.alarm_growth}")
    if len(s.betas) != 2 or not all(0.0 <= b < 1.0 for b in s.betas):
        faults.append(f"betas must be two numbers in [0, 1), not {s.betas}")
    shares = s.teacher_shares.values()
    if shares and not (all(0.0 <= share < math.inf for share in shares) and sum(shares) > 0):
        faults.append(f"teacher_shares must be at least 0 and not all 0, not {dict(s.teacher_shares)}")
    return faults


def _bad_lengths(s: TrainSettings) -> list[str]:
    faults = below(s, epochs=0, warmup_epochs=0, rotation=0) + above(s, rotation=180, epochs=100_000)
    if s.warmup_epochs and not s.warmup_epochs < s.epochs:
        faults.append(f"warmup_epochs ({s.warmup_epochs:g}) must be fewer than epochs ({s.epochs:g})")
    if not s.epochs and s.warmup_steps >= s.steps:
        default = (
            ", the default" if s.warmup_steps == TrainSettings.__dataclass_fields__["warmup_steps"].default else ""
        )
        faults.append(f"warmup_steps ({s.warmup_steps}{default}) must be fewer than steps ({s.steps})")
    return faults


def _uncacheable(s: TrainSettings) -> list[str]:
    """Settings that conflict with cache_features."""
    faults: list[str] = []
    if not s.cache_features:
        return faults
    if not s.freeze_encoder:
        faults.append("cache_features = true stores the encoder's features once: it needs freeze_encoder = true")
    if s.color_jitter or s.random_resized_crop < 1.0:
        faults.append(
            "cache_features = true stores features of the whole region in its original colours: set "
            "color_jitter = 0.0 and random_resized_crop = 1.0, or cache_features = false"
        )
    if s.rotation:
        faults.append("cache_features = true stores features of the unrotated region: set rotation = 0")
    return faults


def _bad_sources(s: TrainSettings) -> list[str]:
    valid = 0.0 < s.source_temperature < math.inf
    faults = [] if valid else [f"source_temperature must be finite and above 0, not {s.source_temperature}"]
    faults += [f"a source's weight must be at least 0, not {w}" for w in s.source_weights if not 0.0 <= w < math.inf]
    if s.even_batches and s.source_temperature != 1.0:
        faults.append("even_batches = true uses the sources' weights alone: remove source_temperature")
    return faults


def _bad_rates(s: TrainSettings) -> list[str]:
    way_out = {"lr": "", "encoder_lr": "; to train the decoder alone set freeze_encoder = true"}
    bad = [name for name in way_out if not 0 < getattr(s, name) < math.inf]
    faults = [f"{name} must be finite and above 0, not {getattr(s, name)}{way_out[name]}" for name in bad]
    if 0 < s.schedule_steps <= s.warmup_steps:
        faults.append(f"schedule_steps ({s.schedule_steps}) must be more than warmup_steps ({s.warmup_steps})")
    return faults
