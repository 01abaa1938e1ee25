"""Recipes: one TOML file is one experiment, read into frozen dataclasses by the strict reader (distill.app.strict).

`--set train.steps=100` goes through the same reader. Defaults are the base; there is no inheritance between recipes.
Options of plug-ins stay a table that is bound to the plug-in's signature when it is built.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import tomli_w

from distill.app.strict import parse_into, plain, read_toml
from distill.core.plugins import name_fault
from distill.training.schedule import TrainSettings, below


def _table() -> Any:
    return field(default_factory=dict)


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise ValueError("; ".join(faults))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the run is called, where it writes, and the one seed that everything is drawn from."""

    name: str
    out: str = ""
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        faults = []
        if not self.name.strip() or {".", ".."} & set(self.name.split("/")):
            faults.append(f"name = {self.name!r} cannot name a folder below runs/: take a word")
        if "://" in self.out:
            faults.append(f"out = {self.out!r}: a run writes to a path, for it finishes files by renaming; mount it")
        if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", self.device):
            faults.append(f"device must be auto, cpu, cuda, cuda:N, mps or xpu, not {self.device!r}")
        _refuse(faults)

    @property
    def folder(self) -> Path:
        """The run's folder; "runs/NAME" by default."""
        return Path(self.out or f"runs/{self.name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """One source of images: exactly one of tars, photos, pairs, scenes, wheels.

    tars: SA-1B tars, paths or URLs, with braces or globs. photos: a folder or a glob. pairs: a tsv of images with
    ground truth. scenes: how many procedural views. wheels: the photographs that scikit-image and scikit-learn ship.
    names: a text file with the names to keep (pairs). limit: keep the first N images; 0 keeps all.
    """

    tars: str = ""
    photos: str = ""
    pairs: str = ""
    scenes: int = 0
    wheels: bool = False
    names: str = ""
    limit: int = 0
    size: int = 224

    def __post_init__(self) -> None:
        if sum(map(bool, (self.tars, self.photos, self.pairs, self.scenes, self.wheels))) != 1:
            raise ValueError("needs exactly one of tars, photos, pairs, scenes, wheels")
        _refuse(below(self, scenes=0, limit=0, size=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Crops:
    """Regions and patches (distill.core.crops.plan). Paper: 560 and 644; the patches' placing is ours."""

    size: int = 560
    min_side: int = 644
    draws: int = 1
    patches: Literal["grid", "random", "none"] = "grid"
    num_patches: int = 4
    patch_size: int = 0
    overlap: float = 0.125
    small: Literal["refuse", "use"] = "refuse"

    def __post_init__(self) -> None:
        faults = below(self, size=14, min_side=1, draws=1, num_patches=1, patch_size=0)
        if not 0.0 <= self.overlap < 0.9:
            faults.append(f"overlap must be in [0, 0.9), not {self.overlap}")
        _refuse(faults)


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A file of teachers/ with its weights and options; "truth" is the source's own ground truth.

    Options spoil the truth in known ways (distill.data.corruptions).

    alias: the name in labels, logs and tables; the plug-in's name by default.
    """

    name: str
    weights: str = ""
    alias: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    options: dict[str, Any] = _table()

    def __post_init__(self) -> None:
        fault = "" if self.name == "truth" else name_fault("distill.teachers", self.name)
        if fault:
            raise ValueError(fault)
        if "." in self.label or "/" in self.label:
            raise ValueError(f"{self.label!r} cannot name a label: set alias to a word without dots or slashes")

    @property
    def label(self) -> str:
        """The name under which the labels are stored."""
        return self.alias or self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """How labels are stored. root: the folder of label folders; RUN/labels by default.

    store: "disparity" converts scale and metric depth exactly, "own" keeps each teacher's kind. codec: how maps become
    bytes; each is off by at most 1/8192 of a map's range (distill.shards.codec).
    batch_size: crops that a teacher sees at once. threads: decode and encode beside it.
    mirror: a URL (fsspec) where finished labels are sent, and from where training fetches those it does not find here.
    online: label during training instead of before it. commercial_only: refuse teachers whose weights forbid it.
    bridge: "primary" takes an assistant of affine depth by fitting 1 / (a d + b) to the primary's disparity on every
    crop; a label whose residual exceeds bridge_residual is dropped and counted (distill.labelling.bridge).
    sky: "own" leaves it to each teacher; the others hold for all of them: "keep" what the networks say, "far",
    "invalid" or "zero" (disparity) where the one that knows sky sees it (distill.teachers._sky).
    """

    root: str = ""
    samples_per_part: int = 1000
    batch_size: int = 8
    threads: int = 4
    licence: str = "unknown"
    store: Literal["disparity", "own"] = "disparity"
    codec: Literal["jls", "png16", "float16"] = "jls"
    mirror: str = ""
    online: bool = False
    commercial_only: bool = False
    sky: Literal["own", "keep", "far", "invalid", "zero"] = "own"
    bridge: Literal["", "primary"] = ""
    bridge_residual: float = 0.3

    def __post_init__(self) -> None:
        faults = below(self, samples_per_part=1, batch_size=1, threads=0)
        if "://" in self.root:
            faults.append(
                f"root = {self.root!r}: labels are made on a local path, for tars are finished by renaming; "
                "labels.mirror takes a URL"
            )
        if self.mirror and "://" not in self.mirror:
            faults.append(f"mirror = {self.mirror!r} must be a URL, such as s3://bucket/labels or file:///mnt/labels")
        if not 0.0 < self.bridge_residual <= 1.0:
            faults.append(f"bridge_residual must be in (0, 1], not {self.bridge_residual}")
        if self.bridge and self.store != "disparity":
            faults.append(f'bridge = "{self.bridge}" makes disparity: it needs store = "disparity"')
        _refuse(faults)


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """The network that learns. encoder: a timm name or alias. weights: "" (random), "pretrained" or a local file.

    start: a student's folder, a hub id, or "pocket" (the embedded one), to start from instead. decoder_start,
    encoder_start: one whose decoder, or whose whole encoder, to start from. native_size: the short side it is used at
    (crops.size).
    decoder_weights: a released file with the decoder's own weights (Depth Anything V2's, AnyDepth's).
    norm: of the decoder's maps. "" is the decoder's own (batch); "sync" takes the batches of all processes together
    (CUDA), "frozen" stored statistics, "group" none: the last two do not know how a batch was cut.
    """

    encoder: str = "vit_small_patch16_dinov3"
    weights: str = ""
    decoder: str = "sdt"
    encoder_options: dict[str, Any] = _table()
    decoder_options: dict[str, Any] = _table()
    start: str = ""
    decoder_start: str = ""
    encoder_start: str = ""
    decoder_weights: str = ""
    norm: Literal["", "batch", "sync", "frozen", "group"] = ""
    native_size: int = 0
    leave_out_frozen_encoder: bool = False

    def __post_init__(self) -> None:
        fault = name_fault("distill.students.decoders", self.decoder)
        if fault:
            raise ValueError(fault)
        if self.norm and "norm" in self.decoder_options:
            raise ValueError("norm and decoder_options.norm both say it: keep norm")
        if self.norm == "group" and self.start:
            raise ValueError('norm = "group" cannot be given to the trained student of start: leave one of them out')
        if self.decoder_weights and (self.start or self.decoder_start):
            raise ValueError("decoder_weights beside start or decoder_start: the decoder can begin from one place only")
        _refuse(below(self, native_size=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The objective (distill.losses.objective); the weights are the paper's, the anchor is ours.

    faithful, contexts: HDN's released loss to the letter (losses.losses.hdn_loss). patch_resolution: whether patches
    meet the student at their own pixels or at the student's.
    """

    normalization: str = "hybrid"
    shared: float = 1.0
    local_global: float = 0.5
    feature: float = 1.0
    gradient: float = 2.0
    anchor: float = 0.0
    trim_top: float = 0.0
    label_only: bool = False
    feature_margin: float = 0.85
    faithful: bool = False
    contexts: Literal["dr", "dp", "ds"] = "dr"
    patch_resolution: Literal["patch", "student"] = "patch"

    def __post_init__(self) -> None:
        fault = name_fault("distill.losses.normalize", self.normalization)
        if fault:
            raise ValueError(fault)
        if self.faithful and (self.trim_top or self.label_only):
            raise ValueError("faithful is HDN's released loss, which knows no trim_top and no label_only")
        if self.contexts != "dr" and not self.faithful:
            raise ValueError(f'contexts = "{self.contexts}" is a variant of HDN\'s released loss: set faithful = true')
        faults = below(self, shared=0, local_global=0, feature=0, gradient=0, anchor=0, feature_margin=0)
        if not 0.0 <= self.trim_top < 1.0:
            faults.append(f"trim_top must be in [0, 1), not {self.trim_top}")
        _refuse(faults)


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """The loop (training.train.TrainSettings has the meaning of each). batch_size is global, however many processes
    run.

    primary_ratio: how often the first teacher is asked where there are two (paper: 0.7). seed: run.seed where negative;
    with one of its own, several trainings share their labels.
    layer_decay, freeze_steps, batchnorm, ema, patience: how the student learns. compile, channels_last,
    gradient_checkpointing, fused: how fast (tests/speed/training.py has their effect). trackers: any that accelerate
    knows and that is installed, e.g. ["tensorboard", "wandb"].
    """

    steps: int = 20_000
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 5e-5
    encoder_lr: float = 5e-6
    weight_decay: float = 0.01
    warmup_steps: int = 500
    schedule: Literal["cosine", "linear", "poly", "constant"] = "cosine"
    clip_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    freeze_encoder: bool = False
    primary_ratio: float = 0.7
    strategy: Literal["select", "average"] = "select"
    holdout: float = 0.02
    eval_every: int = 500
    save_every: int = 500
    keep_last: int = 2
    workers: int = 2
    hflip: bool = True
    colour: float = 0.0
    seed: int = -1
    layer_decay: float = 1.0
    freeze_steps: int = 0
    batchnorm: Literal["batch", "sync", "frozen"] = "batch"
    ema: float = 0.0
    patience: int = 0
    log_every: int = 1
    trackers: tuple[str, ...] = ("tensorboard",)
    compile: bool = False
    channels_last: bool = False
    gradient_checkpointing: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        ratio = 0.0 <= self.primary_ratio <= 1.0
        faults = [] if ratio else [f"primary_ratio must be in [0, 1], not {self.primary_ratio}"]
        try:
            self.settings()
        except ValueError as error:
            faults.append(str(error))
        _refuse(faults)

    def settings(self, **more: Any) -> TrainSettings:
        """As the trainer takes them, with what other tables decide. Raises ValueError with every fault."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("primary_ratio", "seed")}
        return TrainSettings(**(values | more))


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A file of eval/benchmarks with its data. list: a file with the samples to use. limit: the first N only.

    prior: a list of other samples of the same root, on which the image-plane prior is fitted. alignment: "auto" fits
    what each model's kind leaves unknown (distill.eval.protocol).
    """

    name: str
    root: str = ""
    list: str = ""
    prior: str = ""
    alias: str = ""
    protocol: Literal["marigold", "clean"] = "clean"
    alignment: Literal["auto", "affine", "scale", "median"] = "auto"
    limit: int = 0

    def __post_init__(self) -> None:
        faults = below(self, limit=0)
        if fault := name_fault("distill.eval.benchmarks", self.name):
            faults.append(fault)
        if "/" in self.label or self.label in (".", ".."):
            faults.append(f"alias = {self.alias!r} cannot name a folder of predictions: take a word without slashes")
        _refuse(faults)

    @property
    def label(self) -> str:
        """The name in tables and folders."""
        return self.alias or self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What is scored beside the student: the recipe's teachers, the image-plane prior. pictures: per benchmark."""

    teachers: bool = True
    student: bool = True
    plane_prior: bool = True
    pictures: int = 4

    def __post_init__(self) -> None:
        _refuse(below(self, pictures=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """What `distill compare` looks at. limit: images, taken evenly from all sources; 0 takes all.

    side: larger images are shrunk until their longer side is this. student: the recipe's own takes part once trained.
    """

    limit: int = 200
    side: int = 640
    student: bool = True

    def __post_init__(self) -> None:
        _refuse(below(self, limit=0, side=32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One experiment; every command takes the tables it needs."""

    run: Run
    images: tuple[Images, ...] = ()
    crops: Crops = field(default_factory=Crops)
    teachers: tuple[Teacher, ...] = ()
    labels: Labels = field(default_factory=Labels)
    student: Student = field(default_factory=Student)
    loss: Loss = field(default_factory=Loss)
    train: Train = field(default_factory=Train)
    benchmarks: tuple[Benchmark, ...] = ()
    score: Score = field(default_factory=Score)
    compare: Compare = field(default_factory=Compare)

    def __post_init__(self) -> None:
        for what, tables in (("teachers", self.teachers), ("benchmarks", self.benchmarks)):
            labels = [table.label for table in tables]
            if twice := sorted({name for name in labels if labels.count(name) > 1}):
                raise ValueError(f"{what} named twice: {', '.join(twice)}; give each an alias of its own")
        if self.student.leave_out_frozen_encoder:
            if not self.train.freeze_encoder or self.student.weights in ("", "pretrained"):
                raise ValueError(
                    "student.leave_out_frozen_encoder needs train.freeze_encoder = true and student.weights = a local "
                    "file, which whoever loads the student must have"
                )
        if self.student.norm in ("sync", "frozen") and self.train.batchnorm not in ("batch", self.student.norm):
            raise ValueError(
                f'student.norm = "{self.student.norm}" and train.batchnorm = "{self.train.batchnorm}" contradict each '
                "other: leave one of them out"
            )


def parse(table: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """A Recipe from a nested table. Raises RecipeError with one line per fault, each beginning with `where`."""
    return parse_into(Recipe, table, where=where)


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file `path` with `overrides` ("train.steps=100") applied. Raises RecipeError."""
    return parse(read_toml(Path(path), overrides), where=str(path))


def as_table(recipe: Any) -> dict[str, Any]:
    """The resolved recipe as plain tables, defaults included: what a run saves and what hashes are taken of."""
    return typing.cast(dict[str, Any], plain(recipe))


def dumps(recipe: Recipe) -> str:
    """The resolved recipe as TOML; `load` reads it back to an equal recipe."""
    return tomli_w.dumps(as_table(recipe))
