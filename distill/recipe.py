"""Recipes: one TOML file is one experiment, read into frozen dataclasses by a strict loader.

Every fault of a file is reported at once, with the key's path and a "did you mean". `--set train.steps=100` goes
through the same loader. Defaults are the base; there is no inheritance between recipes. Options of plug-ins stay a
table that is bound to the plug-in's signature when it is built.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

from distill.plugins import did_you_mean, name_fault


class RecipeError(ValueError):
    """A recipe that cannot be used: one line per fault."""


def _table() -> Any:
    return field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the run is called, where it writes, and the one seed that everything is drawn from."""

    name: str
    out: str = ""
    seed: int = 0
    device: str = "auto"

    @property
    def folder(self) -> Path:
        """The run's folder; "runs/NAME" by default."""
        return Path(self.out or f"runs/{self.name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """One source of images: exactly one of tars, photos, pairs, scenes, wheels.

    tars: SA-1B tars, with braces or globs. photos: a folder or a glob. pairs: a tsv of images with ground truth.
    scenes: how many procedural views. wheels: the photographs that scikit-image and scikit-learn ship.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Crops:
    """Regions and patches (distill.crops.plan). Paper: 560 and 644; the patches' placing is ours."""

    size: int = 560
    min_side: int = 644
    draws: int = 1
    patches: Literal["grid", "random", "none"] = "grid"
    num_patches: int = 4
    patch_size: int = 0
    overlap: float = 0.125
    small: Literal["refuse", "use"] = "refuse"

    def __post_init__(self) -> None:
        if self.size < 14 or self.min_side < 1 or self.draws < 1 or self.num_patches < 1:
            raise ValueError("size must be at least 14, and min_side, draws and num_patches at least 1")
        if not 0.0 <= self.overlap < 0.9:
            raise ValueError(f"overlap must be in [0, 0.9), not {self.overlap}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A file of teachers/ with its weights and options; "truth" is the source's own ground truth.

    alias: the name in labels, logs and tables; the plug-in's name by default.
    """

    name: str
    weights: str = ""
    alias: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    options: dict[str, Any] = _table()

    def __post_init__(self) -> None:
        fault = "" if self.name == "truth" else name_fault("teachers", self.name)
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

    store: "disparity" converts scale and metric depth exactly, "own" keeps each teacher's kind.
    batch_size: crops that a teacher sees at once. threads: decode and encode beside it.
    online: label during training instead of before it. commercial_only: refuse teachers whose weights forbid it.
    """

    root: str = ""
    samples_per_part: int = 1000
    batch_size: int = 8
    threads: int = 4
    licence: str = "unknown"
    store: Literal["disparity", "own"] = "disparity"
    online: bool = False
    commercial_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """The network that learns. encoder: a timm name or alias. weights: "" (random), "pretrained" or a local file.

    start: a checkpoint folder to start from instead. decoder_start, encoder_start: one whose decoder, or whose whole
    encoder, to start from ("pocket": the embedded one). native_size: the short side it is used at (crops.size).
    """

    encoder: str = "vit_small_patch16_dinov3"
    weights: str = ""
    decoder: str = "sdt"
    encoder_options: dict[str, Any] = _table()
    decoder_options: dict[str, Any] = _table()
    start: str = ""
    decoder_start: str = ""
    encoder_start: str = ""
    native_size: int = 0
    leave_out_frozen_encoder: bool = False

    def __post_init__(self) -> None:
        fault = name_fault("students.decoders", self.decoder)
        if fault:
            raise ValueError(fault)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The objective (distill.objective); the weights are the paper's, the anchor is ours."""

    normalization: str = "hybrid"
    shared: float = 1.0
    local_global: float = 0.5
    feature: float = 1.0
    gradient: float = 2.0
    anchor: float = 0.0
    trim_top: float = 0.0
    label_only: bool = False
    feature_margin: float = 0.85

    def __post_init__(self) -> None:
        fault = name_fault("distill.normalize", self.normalization)
        if fault:
            raise ValueError(fault)
        if not 0.0 <= self.trim_top < 1.0:
            raise ValueError(f"trim_top must be in [0, 1), not {self.trim_top}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """The loop (distill.train.TrainSettings has the meaning of each). batch_size is global, however many processes run.

    primary_ratio: how often the first teacher is asked where there are two (paper: 0.7).
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

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.accumulate < 1:
            raise ValueError("steps, batch_size and accumulate must be at least 1")
        if not 0.0 < self.primary_ratio <= 1.0:
            raise ValueError(f"primary_ratio must be in (0, 1], not {self.primary_ratio}")
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout must be in [0, 1), not {self.holdout}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A file of eval/benchmarks with its data. list: a file with the samples to use. limit: the first N only.

    prior: a list of other samples of the same root, on which the image-plane prior is fitted.
    """

    name: str
    root: str = ""
    list: str = ""
    prior: str = ""
    alias: str = ""
    protocol: Literal["marigold", "clean"] = "clean"
    limit: int = 0

    def __post_init__(self) -> None:
        fault = name_fault("eval.benchmarks", self.name)
        if fault:
            raise ValueError(fault)

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

    def __post_init__(self) -> None:
        labels = [t.label for t in self.teachers]
        twice = sorted({name for name in labels if labels.count(name) > 1})
        if twice:
            raise ValueError(f"teachers named twice: {', '.join(twice)}; give each an alias of its own")
        if len(labels) > 2:
            raise ValueError(f"at most two teachers, a primary and an assistant, not {len(labels)}")


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list):
        return "an array"
    return repr(value)


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "an array"
    return {str: "a string", int: "an integer", float: "a number", bool: "true or false"}.get(hint, "a table")


def _read_value(hint: Any, value: Any, path: str, faults: list[str]) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _read_table(typing.cast(type, hint), value, path, faults)
    if origin is tuple and isinstance(value, list):
        inner = typing.get_args(hint)[0]
        return tuple(_read_value(inner, item, f"{path}[{i}]", faults) for i, item in enumerate(value))
    if origin is Literal and value in typing.get_args(hint) and isinstance(value, str):
        return value
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (str, int, bool) and type(value) is hint:
        return value
    faults.append(f"{path} must be {_expected(hint)}, not {_kind(value)}")
    return None


def _read_table(cls: type, table: Mapping[str, Any], path: str, faults: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{path}." if path else ""
    before = len(faults)
    values = {}
    for key, value in table.items():
        if key not in fields:
            near = did_you_mean(key, list(fields))
            faults.append(f"unknown key {prefix}{key}{near.replace('mean ', 'mean ' + prefix) if near else ''}")
        else:
            values[key] = _read_value(hints[key], value, f"{prefix}{key}", faults)
    for name, f in fields.items():
        if name not in table and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            faults.append(f"{prefix}{name} is missing")
    if len(faults) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        faults.append(f"{path}: {error}" if path else str(error))
        return None


def _set(table: dict[str, Any], assignment: str) -> None:
    """Writes one `a.b.0.c=value` into a nested table; the value is read as TOML, or as a string where that fails."""
    path, found, text = assignment.partition("=")
    if not found or not path.strip():
        raise RecipeError(f"--set {assignment}: write it as KEY=VALUE, as in --set train.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = path.strip().split(".")
    here: Any = table
    for i, part in enumerate(parents):
        if isinstance(here, list):
            if not part.isdigit() or int(part) >= len(here):
                raise RecipeError(f"--set {path}: {'.'.join(parents[:i])} has {len(here)} entries, numbered from 0")
            here = here[int(part)]
        else:
            here = here.setdefault(part, {})
    if isinstance(here, list) and last.isdigit() and int(last) < len(here):
        here[int(last)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise RecipeError(f"--set {path}: {'.'.join(parents)} is not a table")


def parse(table: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """A Recipe from a nested table. Raises RecipeError with one line per fault, each beginning with `where`."""
    faults: list[str] = []
    recipe = _read_table(Recipe, table, "", faults)
    if faults:
        raise RecipeError("\n".join(f"{where}: {fault}" for fault in faults))
    return typing.cast(Recipe, recipe)


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file `path` with `overrides` ("train.steps=100") applied. Raises RecipeError."""
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise RecipeError(f"{path}: no such recipe" + (f"; {path.parent} has {', '.join(near)}" if near else ""))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from error
    for assignment in overrides:
        _set(table, assignment)
    return parse(table, where=str(path))


def as_table(recipe: Any) -> dict[str, Any]:
    """The resolved recipe as plain tables, defaults included: what a run saves and what hashes are taken of."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return dict(value) if isinstance(value, types.MappingProxyType) else value

    return typing.cast(dict[str, Any], plain(recipe))


def dumps(recipe: Recipe) -> str:
    """The resolved recipe as TOML; `load` reads it back to an equal recipe."""
    return tomli_w.dumps(as_table(recipe))
