"""Recipes: one TOML file is one experiment. Each table of a recipe is the settings class of one part of the code.

`--set train.steps=100` goes through the same strict reader (distill.app.strict). Recipes do not inherit from each
other; missing keys have the defaults. Options of plug-ins stay a table, checked against the plug-in's signature when it
is built. A command judges only the tables that it uses (USES): a fault in [train] does not prevent labelling.
"""

from __future__ import annotations

import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w

from distill.app.renamed import RENAMED, RENAMED_VALUES
from distill.app.settings import CompareSettings, RunSettings
from distill.app.shipped import locate
from distill.app.strict import RecipeError, keys_of, parse_into, plain, read_toml
from distill.core.addresses import public
from distill.core.crop_settings import CropSettings
from distill.core.plugins import allow, is_path
from distill.core.wording import did_you_mean
from distill.data.settings import ImageSettings
from distill.eval.settings import BenchmarkSettings, ScoreSettings
from distill.labelling.settings import LabelSettings
from distill.losses.latent_settings import LatentSettings
from distill.losses.settings import FACTS, LossSettings
from distill.students.settings import StudentSettings
from distill.teachers._settings import TeacherSettings
from distill.training.settings import TrainSettings

USES = {
    "label": ("run", "images", "crops", "teachers", "labels"),
    "train": ("run", "images", "crops", "teachers", "labels", "student", "loss", "latent", "train"),
    "score": ("run", "teachers", "labels", "student", "benchmarks", "score"),
    "compare": ("run", "images", "teachers", "labels", "student", "compare"),
    "report": ("run",),
}
"""The tables that each command uses; a command not listed here uses all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One experiment; every command takes the tables it needs.

    ignored: faulty tables, as written, that the command does not use; the fields have the defaults instead.
    """

    run: RunSettings
    images: tuple[ImageSettings, ...] = ()
    crops: CropSettings = field(default_factory=CropSettings)
    teachers: tuple[TeacherSettings, ...] = ()
    labels: LabelSettings = field(default_factory=LabelSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    latent: LatentSettings = field(default_factory=LatentSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    benchmarks: tuple[BenchmarkSettings, ...] = ()
    score: ScoreSettings = field(default_factory=ScoreSettings)
    compare: CompareSettings = field(default_factory=CompareSettings)
    ignored: Mapping[str, Any] = field(default_factory=dict, metadata={"key": False})


def _contradictions(recipe: Recipe) -> list[tuple[tuple[str, ...], str]]:
    """Contradictions between tables, each with the names of those tables."""
    checks: list[tuple[tuple[str, ...], list[str]]] = [
        (("teachers",), _repeated("teachers", [table.alias_or_name for table in recipe.teachers])),
        (("benchmarks",), _repeated("benchmarks", [table.alias_or_name for table in recipe.benchmarks])),
        (("images", "teachers"), _unknown_teachers(recipe)),
        (("crops", "labels"), _redraw_faults(recipe)),
        (("images", "labels"), _truth_faults(recipe)),
        (("labels",), _names_faults(recipe.labels)),
        (("crops", "train"), _augmentation_faults(recipe.crops, recipe.train)),
        (("student", "train"), _encoder_faults(recipe.student, recipe.train)),
        (("student", "train"), _kind_faults(recipe.student, recipe.train)),
        (("student", "latent", "train"), _latent_faults(recipe)),
        (("loss", "train"), _metric_faults(recipe.loss, recipe.train)),
    ]
    return [(tables, line) for tables, lines in checks for line in lines]


def _repeated(table: str, names: Sequence[str]) -> list[str]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    return [f"{table} named twice: {', '.join(repeated)}; give each its own alias"] if repeated else []


def _unknown_teachers(recipe: Recipe) -> list[str]:
    known = [teacher.alias_or_name for teacher in recipe.teachers]
    listed = f"[[teachers]] has {', '.join(known)}" if known else "the recipe has no [[teachers]]"
    return [
        f"images[{i}].teachers: no teacher {name}{did_you_mean(name, known)}; {listed}"
        for i, images in enumerate(recipe.images)
        for name in images.teachers
        if name not in known
    ]


def _redraw_faults(recipe: Recipe) -> list[str]:
    if not recipe.crops.redraw or recipe.labels.online:
        return []
    return ["crops.redraw needs labels.online = true: labels on disk have fixed crops"]


def _truth_faults(recipe: Recipe) -> list[str]:
    without_truth = [i for i, images in enumerate(recipe.images) if not images.may_have_truth]
    if not recipe.labels.align or not without_truth:
        return []
    return [f'images[{without_truth[0]}] has no ground truth, but labels.align = "truth" fits every label to it']


def _names_faults(labels: LabelSettings) -> list[str]:
    if not labels.names or not labels.online:
        return []
    return ["labels.names selects labels on disk: with labels.online = true use images.names"]


def _encoder_faults(student: StudentSettings, train: TrainSettings) -> list[str]:
    faults = []
    if student.exclude_frozen_encoder and (not train.freeze_encoder or student.weights in ("", "pretrained")):
        faults.append(
            "student.exclude_frozen_encoder needs train.freeze_encoder = true and student.weights = a local file, "
            "which everyone who loads the student must have"
        )
    if student.norm in ("sync", "frozen") and train.batchnorm not in ("batch", student.norm):
        faults.append(
            f'student.norm = "{student.norm}" and train.batchnorm = "{train.batchnorm}" contradict each other: '
            "leave one of them out"
        )
    return faults


def _metric_faults(loss: LossSettings, train: TrainSettings) -> list[str]:
    metric = [name for settings in (loss, loss.against_truth()) for name in settings.weights if FACTS[name].is_metric]
    if not metric or train.kind == "metric_depth":
        return []
    return [f'loss.{metric[0]} compares metres: set train.kind = "metric_depth" and student.max_depth, or leave it out']


def _latent_faults(recipe: Recipe) -> list[str]:
    """Contradictions between [latent] and the student's network."""
    student, latent, train, faults = recipe.student, recipe.latent, recipe.train, []
    if not student.is_one_step:
        line = '[latent] needs student.network = "one_step_unet": set that, or leave [latent] out'
        return [line] if latent != LatentSettings() else []
    if student.head == "dpt":
        if latent.teacher != "genpercept" or not any(latent.image_weights):
            faults.append('student.head = "dpt" belongs to GenPercept: set latent.negated = true and latent.image_mse')
        if latent.distance_weight or latent.gradient or latent.trajectory or latent.pseudo == "filter":
            faults.append(
                'student.head = "dpt" has no latents to compare: set latent.distance_weight, gradient and trajectory '
                'to 0 and latent.pseudo to "direct" or "off"'
            )
    if train.freeze_encoder or train.freeze_steps or train.layer_decay != 1.0:
        faults.append(
            "train.freeze_encoder, freeze_steps and layer_decay are for encoders: a UNet is trained as a whole"
        )
    if train.strategy != "select":
        faults.append(
            f'train.strategy = "{train.strategy}" needs a student of maps: a UNet learns from one teacher at a time'
        )
    return faults


def _augmentation_faults(crops: CropSettings, train: TrainSettings) -> list[str]:
    """Contradictions between [crops] and the augmentation of [train]."""
    faults = []
    if crops.width and train.random_resized_crop < 1.0:
        faults.append(
            "train.random_resized_crop cuts squares, but crops.width makes regions that are not square: leave one out"
        )
    if train.rotation and crops.patches != "none":
        faults.append('train.rotation turns whole regions: set crops.patches = "none", or leave it out')
    return faults


def _kind_faults(student: StudentSettings, train: TrainSettings) -> list[str]:
    """Contradictions between train.kind and the kinds that the student can predict."""
    if student.is_one_step:
        fits = train.kind in ("affine_depth", "affine_disparity")
        return (
            [] if fits else [f'train.kind = "{train.kind}": a one-step UNet predicts affine_depth or affine_disparity']
        )
    if train.kind not in ("affine_disparity", "metric_depth"):
        return [f'train.kind = "{train.kind}": a student predicts affine_disparity, or metric_depth']
    if train.kind == "metric_depth" and not (student.max_depth or student.init_from):
        return ['train.kind = "metric_depth" needs student.max_depth, the largest depth that it can predict, in metres']
    if student.canonical_focal and train.kind != "metric_depth":
        return ["student.canonical_focal needs a student that predicts metres: set train.kind and student.max_depth"]
    if student.max_depth and train.kind != "metric_depth":
        return [f'student.max_depth = {student.max_depth} makes a metric student: set train.kind = "metric_depth"']
    return []


def parse(table: Mapping[str, Any], *, where: str = "recipe", uses: Collection[str] | None = None) -> Recipe:
    """A Recipe from a nested table. Raises RecipeError with one line per fault, each beginning with `where`.

    uses: the tables whose faults count; None: all. An unknown top-level key is always a fault.
    """
    known = keys_of(Recipe).keys()
    unused = {key for key in table if uses is not None and key in known and key not in uses}
    ignored = {key: table[key] for key in unused if not _is_sound(key, table[key])}
    sound = {key: value for key, value in table.items() if key not in ignored}
    recipe = parse_into(Recipe, sound, where=where, renamed=RENAMED, renamed_values=RENAMED_VALUES)
    used = set(known if uses is None else uses)
    if faults := [line for tables, line in _contradictions(recipe) if used.issuperset(tables)]:
        raise RecipeError("\n".join(f"{where}: {fault}" for fault in faults))
    return replace(recipe, ignored=ignored) if ignored else recipe


def _is_sound(key: str, value: Any) -> bool:
    try:
        parse_into(Recipe, {"run": {"name": "x"}, key: value}, where="")
    except RecipeError:
        return False
    return True


def load(path: Path | str, overrides: Sequence[str] = (), *, command: str = "") -> Recipe:
    """The recipe `path`, a file or a shipped one's name, with `overrides` ("train.steps=100"). Raises RecipeError.

    command: the verb it is read for; faults of tables that it does not use are ignored.
    """
    file = locate(path)
    return trusted(parse(_from_home(read_toml(file, overrides)), where=str(file), uses=USES.get(command)))


def trusted(recipe: Recipe) -> Recipe:
    """Returns the recipe, after allowing its decoder's file to be run: the user runs this recipe, not only reads it."""
    if is_path(recipe.student.decoder):
        allow(recipe.student.decoder)
    return recipe


_PATHS = {
    "run": ("out",),
    "labels": ("root", "names"),
    "images": ("pairs", "names"),
    "benchmarks": ("root", "list", "prior"),
}
"""Keys whose "~" only this module expands; other paths keep theirs, which is part of the labels' address."""


def _from_home(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with a leading "~/" in these paths expanded to the home directory."""

    def expanded(value: Any, keys: Sequence[str]) -> Any:
        if isinstance(value, list):
            return [expanded(item, keys) for item in value]
        if not isinstance(value, Mapping):
            return value
        home_paths = {
            key: value[key] for key in keys if isinstance(value.get(key), str) and value[key].startswith("~/")
        }
        return {**value, **{key: str(Path(text).expanduser()) for key, text in home_paths.items()}}

    return {name: expanded(value, _PATHS.get(name, ())) for name, value in table.items()}


def as_table(settings: Any) -> dict[str, Any]:
    """The resolved recipe, or one of its tables, as plain tables with defaults: what is saved and hashed.

    Its addresses are without passwords and signatures (distill.core.addresses); `as_given` has them.
    """
    return typing.cast(dict[str, Any], public(as_given(settings)))


def as_given(settings: Any) -> dict[str, Any]:
    """As `as_table`, with all that its addresses hold: never to be stored or printed."""
    table = typing.cast(dict[str, Any], plain(settings))
    return table | dict(settings.ignored) if isinstance(settings, Recipe) else table


def dumps(recipe: Recipe) -> str:
    """The resolved recipe as TOML; `load` reads it back to an equal recipe, without passwords in addresses."""
    return tomli_w.dumps(as_table(recipe))


def differences(recipe: Recipe, run: Path) -> list[str]:
    """The keys whose values differ from the recipe saved in the run's folder; empty if none is saved."""
    try:
        saved = read_toml(run / "recipe.toml")
    except (RecipeError, OSError):
        return []
    now, before = _leaves(as_table(recipe)), _leaves(public(saved))
    return [key for key in now if key in before and now[key] != before[key]]


def _leaves(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        leaves |= _leaves(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return leaves
