"""Builds the student, labels and benchmarks of a recipe (`teaching` builds teachers, `inputs` opens images).

Everything that a recipe names is checked here before any work begins, so that a misspelt option of the last teacher
does not surface after a night of labelling.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill import students
from distill.app import latent
from distill.app.inputs import input_shards
from distill.app.recipe import USES, Recipe, as_table, parse
from distill.app.renamed import with_current_keys
from distill.app.strict import RecipeError
from distill.app.teaching import check_teacher_count, load_teachers
from distill.core import machine
from distill.core.addresses import public
from distill.core.depth import Kind
from distill.core.plugins import file_hashes, find, short_name
from distill.core.weights import read_state
from distill.core.wording import counted
from distill.data.pairs import read_names
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.protocol import Protocol
from distill.eval.settings import BenchmarkSettings
from distill.labelling import moved
from distill.labelling.lock import mutex
from distill.labelling.run import OnlineDataset, labels_hash
from distill.losses.objective import Objective
from distill.shards import mirror, tables
from distill.shards.cache import TarCache
from distill.shards.shards import MANIFEST, LabelDataset
from distill.shards.tables import CACHED
from distill.students import Student, checkpoint
from distill.students.settings import StudentSettings
from distill.teachers import resolve
from distill.teachers._latent_student import LatentStudent
from distill.teachers._latent_student import save as save_latent_student
from distill.teachers.checkpoint import Teacher as CheckpointTeacher
from distill.training.latent import LatentTask
from distill.training.settings import TrainSettings


def process() -> tuple[int, int]:
    """This process's rank and the number of processes, from the environment of torchrun and `accelerate launch`."""
    return machine.from_launcher("RANK", 0), machine.from_launcher("WORLD_SIZE", 1)


def device(recipe: Recipe) -> torch.device:
    """The recipe's device; of CUDA cards without a number this process's own.

    Raises RecipeError for a device that this machine does not have.
    """
    requested = torch.device(machine.best_device() if recipe.run.device == "auto" else recipe.run.device)
    count = 1 if requested.type == "cpu" else torch.get_device_module(requested).device_count()
    if (requested.index or 0) >= count:
        raise RecipeError(
            f'run.device = "{requested}": torch finds {counted(count, f"{requested.type} device")} here; use "auto" '
            'or "cpu"'
        )
    # Without an index all processes of a machine would share its first card.
    if requested.type == "cuda" and requested.index is None:
        return torch.device("cuda", machine.from_launcher("LOCAL_RANK", 0) % count)
    return requested


# --- labels -----------------------------------------------------------------------------------------------------------


def labels_folder(recipe: Recipe) -> Path:
    """The recipe's labels folder, named by a hash of images, crops, teachers, seed and label settings, nothing else.

    If labels.root is itself a finished labels folder, it is returned, whatever its name.
    """
    check_teacher_count(recipe)
    local_root = "" if recipe.labels.meeting else recipe.labels.root
    root = Path(local_root or recipe.run.folder / "labels")
    if (root / MANIFEST).is_file():
        return root
    label_settings = {"seed": recipe.run.seed, **recipe.labels.content}
    images = [source.content for source in recipe.images]
    teachers = [spec.content for spec in recipe.teachers]
    address = labels_hash(images, {**recipe.crops.content, **label_settings}, teachers)
    return root / address


def labels_of_another_run(recipe: Recipe) -> Path | None:
    """Finished labels of the same address in a run beside this recipe's, which labels.root could name; None if none."""
    folder = labels_folder(recipe)
    if recipe.labels.root or (folder / MANIFEST).is_file():
        return None
    found = sorted(recipe.run.folder.parent.glob(f"*/labels/{folder.name}/{MANIFEST}"))
    return found[0].parent if found else None


def labels_address(recipe: Recipe) -> str:
    """What identifies the labels that a recipe trains on: labels.root may itself be a labels folder, of any name."""
    folder = labels_folder(recipe)
    return folder.name if recipe.labels.online else tables.labels_address(folder)


def _check_labels(recipe: Recipe, folder: Path, made_with: dict[str, Any]) -> None:
    """Raises RecipeError if the labels in `folder` were made with other settings than the recipe's."""
    if not made_with:
        return  # made by a direct call of `label`, whose caller is responsible for them
    labelled_with = parse(with_current_keys(made_with), where=f"{folder / MANIFEST}: recipe", uses=USES["label"])
    pairs: list[tuple[str, Any, Any]] = [
        ("images", *_images_of(recipe, labelled_with, folder)),
        ("crops", recipe.crops.content, labelled_with.crops.content),
        ("teachers", [spec.content for spec in recipe.teachers], [spec.content for spec in labelled_with.teachers]),
        ("run.seed", recipe.run.seed, labelled_with.run.seed),
    ]
    label_content = labelled_with.labels.content
    pairs += [(f"labels.{name}", value, label_content.get(name)) for name, value in recipe.labels.content.items()]
    if changed := [name for name, now, before in pairs if now != before]:
        raise RecipeError(
            f"{folder} was labelled with other {', '.join(changed)} than this recipe's (its manifest.json has the "
            "recipe that made it): give the recipe those settings, or point labels.root elsewhere"
        )


def _images_of(recipe: Recipe, other: Recipe, folder: Path) -> tuple[Any, Any]:
    """The [[images]] of two recipes, without paths if the labels in `folder` were made from the first one's files."""
    contents = [[public(source.content) for source in each.images] for each in (recipe, other)]
    placeless = [
        [{k: v for k, v in source.items() if k not in moved.PLACES} for source in sources] for sources in contents
    ]
    if contents[0] == contents[1] or placeless[0] != placeless[1]:
        return contents[0], contents[1]
    try:
        same = moved.is_made_from(folder, input_shards(recipe), recipe.crops, recipe.labels)
    except (OSError, ValueError, LookupError):  # the files are not on this machine
        same = False
    return (placeless[0], placeless[1]) if same else (contents[0], contents[1])


def training_labels(recipe: Recipe) -> LabelDataset | OnlineDataset:
    """The labels to train on: the finished folder, or teachers that label on the fly."""
    check_teacher_count(recipe)
    if recipe.labels.online:
        return OnlineDataset(
            input_shards(recipe),
            load_teachers(recipe, on=device(recipe)),
            crops=recipe.crops,
            labels=recipe.labels,
            seed=recipe.run.seed,
        )
    folder = labels_folder(recipe)
    cache = _fetched(recipe, folder)
    keys = read_names(recipe.labels.names) if recipe.labels.names else None
    dataset = LabelDataset(folder, keys=keys, cache=cache)
    _check_sources(recipe, folder, dataset.manifest)
    _check_labels(recipe, folder, dataset.manifest.get("recipe") or {})
    for name, card in dataset.manifest["teachers"].items():
        if recipe.labels.commercial_only and not card.get("commercial", True):
            raise RecipeError(
                f"labels.commercial_only = true refuses the labels in {folder}: {name} made them with "
                f"{card['weights']}, under {card['licence']}, which does not allow commercial use"
            )
    return dataset


def _fetched(recipe: Recipe, folder: Path) -> TarCache | None:
    """Fetches labels.source unless its labels are in `folder`; the cache that fetches tars later, if one is needed.

    Raises FileNotFoundError if there are no finished labels.
    """
    source, limit = recipe.labels.source, round(recipe.labels.cache_gb * 1e9)
    if source and not ((folder / MANIFEST).is_file() and (limit or not (folder / CACHED).is_dir())):
        folder.mkdir(parents=True, exist_ok=True)
        with mutex(folder):  # one process of a machine fetches, the others wait for it
            mirror.fetch(source, folder, cached=limit > 0)
    if not (folder / MANIFEST).is_file():
        other = labels_of_another_run(recipe)
        way = f"; or use those of another run: --set labels.root={shlex.quote(str(other))}" if other else ""
        raise FileNotFoundError(f"{folder} has no finished labels: run `distill label` with this recipe first{way}")
    # A folder without CACHED was made here or fetched whole: its tars are never evicted.
    return TarCache(source, folder, limit) if limit and (folder / CACHED).is_dir() else None


def _check_sources(recipe: Recipe, folder: Path, manifest: dict[str, Any]) -> None:
    """Raises RecipeError if sources are to be weighted, but the labels do not say which source each is from."""
    weighted = len({images.weight for images in recipe.images}) > 1 or recipe.train.source_temperature != 1.0
    weighted = weighted or recipe.train.even_batches
    if weighted and len(recipe.images) > 1 and not any("image_source" in tar for tar in manifest["shards"]):
        raise RecipeError(
            f"{folder} does not say which [[images]] table each label is from, but images.weight and "
            "train.source_temperature need that: run `distill label` again, which adds it without labelling again"
        )


# --- student ----------------------------------------------------------------------------------------------------------


def weights_file(weights: str) -> str | None:
    """The local file of `student.weights`, which may be a file of a hub repository; None for "" and "pretrained"."""
    return None if weights in ("", "pretrained") else str(resolve(weights, files=()))


def make_student(recipe: Recipe) -> Student | LatentStudent:
    """The student to train, with random weights drawn from the training seed or those that it starts from."""
    if recipe.student.is_one_step:
        return latent.make(recipe, training_seed(recipe))
    student = _continued_student(recipe) if recipe.student.init_from else _new_student(recipe)
    if student.kind != recipe.train.kind:
        by_depth = "set student.max_depth, in metres"
        remedy = by_depth if recipe.train.kind == "metric_depth" else "student.max_depth decides that"
        raise RecipeError(f'train.kind = "{recipe.train.kind}", but the student predicts {student.kind}: {remedy}')
    return student


def _continued_student(recipe: Recipe) -> Student:
    """The student of student.init_from, with what the recipe sets."""
    spec = recipe.student
    start_folder = checkpoint.fetch(spec.init_from)
    if spec.weights and checkpoint.describe(start_folder)["encoder_weights"] is None:
        raise RecipeError(
            f"student.init_from: {spec.init_from} holds its own encoder, and student.weights names another: leave "
            "one of them out"
        )
    student = checkpoint.load(start_folder, encoder_weights=weights_file(spec.weights))
    _check_start(recipe, student)
    student.encoder.freeze(recipe.train.freeze_encoder)
    student.native_size = spec.native_size or student.native_size or _short_side(recipe)
    student.max_depth = spec.max_depth or student.max_depth
    if student.canonical_focal and spec.canonical_focal != student.canonical_focal:
        focal = f"{student.canonical_focal:g}"
        raise RecipeError(f"student.init_from: {spec.init_from} has student.canonical_focal = {focal}: set the same")
    student.canonical_focal = spec.canonical_focal or None
    return student


def _new_student(recipe: Recipe) -> Student:
    """The student of [student]: random weights drawn from the training seed, except parts that have a start."""
    spec, options = recipe.student, dict(recipe.student.encoder_options)
    initial = checkpoint.load(checkpoint.fetch(spec.encoder_init_from)).encoder if spec.encoder_init_from else None
    if initial is not None:
        if options or initial.name != spec.encoder:
            raise RecipeError(
                f"student.encoder_init_from takes the encoder of {spec.encoder_init_from}, {initial.name}, unchanged: "
                f'set student.encoder = "{initial.name}" and leave out encoder_options'
            )
        options = dict(initial.options) | {"frozen": False}
    if spec.weights:
        options["weights"] = "pretrained" if spec.weights == "pretrained" else weights_file(spec.weights)
    if recipe.train.freeze_encoder:
        options["frozen"] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training_seed(recipe))
        student = students.build(
            encoder=spec.encoder,
            decoder=spec.decoder,
            encoder_options=options,
            decoder_options=_decoder_options(recipe),
            native_size=spec.native_size or _short_side(recipe),
            max_depth=spec.max_depth or None,
            canonical_focal=spec.canonical_focal or None,
        )
    if initial is not None:
        student.encoder.load_state_dict(initial.state_dict())
    if spec.decoder_init_from:
        checkpoint.load_decoder(student, checkpoint.fetch(spec.decoder_init_from))
    if spec.decoder_weights:
        student.decoder.load_released(read_state(resolve(spec.decoder_weights, files=())))
    return student


def _short_side(recipe: Recipe) -> int:
    return min(recipe.crops.size, recipe.crops.width or recipe.crops.size)


def _check_start(recipe: Recipe, student: Student) -> None:
    """Raises RecipeError if [student] describes another network than student.init_from."""
    requested, spec, defaults = as_table(recipe)["student"], student.spec, as_table(StudentSettings())
    for table in (requested, spec):
        table["decoder"] = short_name(table["decoder"])
    for key in ("encoder", "decoder", "encoder_options", "decoder_options"):
        if requested[key] not in (defaults[key], spec[key]):
            raise RecipeError(
                f"student.{key}: student.init_from = {requested['init_from']} already has {spec[key]}; leave it out"
            )


def _decoder_options(recipe: Recipe) -> dict[str, Any]:
    parameters = inspect.signature(find("distill.students.decoders", recipe.student.decoder).Decoder).parameters
    if recipe.student.norm and "norm" not in parameters:
        raise RecipeError(
            f"student.norm: the decoder {recipe.student.decoder} has no normalization layers; leave it out"
        )
    norm = "batch" if recipe.student.norm == "sync" else recipe.student.norm
    return dict(recipe.student.decoder_options) | ({"norm": norm} if norm else {})


def batch_norm_note(recipe: Recipe, student: Student | LatentStudent) -> str:
    """A warning if BatchNorm sees fewer images than the batch has, or fewer than four; else ""."""
    if isinstance(student, LatentStudent):
        return ""
    kind, batch = train_settings(recipe).batchnorm, recipe.train.batch_size
    seen = batch // (recipe.train.accumulate * (1 if kind == "sync" else process()[1]))
    has_batchnorm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in student.decoder.modules())
    if not has_batchnorm or kind == "frozen" or (seen == batch and seen >= 4):
        return ""
    why = "the result depends on processes and accumulate" if seen < batch else "its statistics are mostly noise"
    sync_hint = "" if kind == "sync" else ', and "sync" shares them between processes'
    return (
        f"BatchNorm sees {seen} of a step's {batch} images at a time, so {why}: "
        f'student.norm = "group" or "frozen" avoids batch statistics{sync_hint}'
    )


def make_objective(recipe: Recipe, student: Student | LatentStudent | None = None) -> Objective | LatentTask:
    """The training objective of [loss] or [latent]. student: the one to train, whose max_depth may be that of the
    checkpoint it starts from.
    """
    if isinstance(student, LatentStudent):
        return latent.training_task(recipe, student, seed=training_seed(recipe), labels=labels_address(recipe))
    max_depth = recipe.student.max_depth or None
    return Objective(recipe.loss, Kind(recipe.train.kind), max_depth if student is None else student.max_depth)


def train_settings(recipe: Recipe) -> TrainSettings:
    """[train], completed with what other tables decide. Of several teachers the first labels `primary_ratio` of the
    steps, where it teaches, and the others share the rest.
    """
    train, names = recipe.train, [t.alias_or_name for t in recipe.teachers]
    first_share = train.primary_ratio
    shares = {name: first_share if i == 0 else (1.0 - first_share) / (len(names) - 1) for i, name in enumerate(names)}
    weights = tuple(images.weight for images in recipe.images)
    norm = recipe.student.norm
    return dataclasses.replace(
        train,
        seed=training_seed(recipe),
        teacher_shares=train.teacher_shares or (shares if len(names) > 1 else {}),
        source_weights=weights if {*weights} != {1.0} else (),
        batchnorm=norm if norm in ("sync", "frozen") else train.batchnorm,
        keep_unmet=recipe.student.is_one_step,
        canonical_focal=recipe.student.canonical_focal,
    )


def training_seed(recipe: Recipe) -> int:
    """The seed of a student's random weights, sample order and teacher choices; labels depend on run.seed alone."""
    return recipe.run.seed if recipe.train.seed < 0 else recipe.train.seed


def identity(recipe: Recipe) -> str:
    """A hash that identifies a training run, besides its [train] settings: labels, student and loss."""
    loss = as_table(recipe.loss)
    if loss["label_range"] == "as_is":  # so that runs begun before this key existed can resume
        del loss["label_range"]
    parts: list[Any] = [labels_address(recipe), _student_table(recipe), loss]
    parts += [recipe.latent.content] if recipe.student.is_one_step else []
    parts += [hashes for hashes in [file_hashes(parts)] if hashes]
    parts += ["redraw"] if recipe.crops.redraw else []
    parts += [read_names(recipe.labels.names)] if recipe.labels.names else []
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _student_table(recipe: Recipe) -> dict[str, Any]:
    """[student]; for an encoder and decoder without the keys of other networks, which older runs do not have."""
    table = as_table(recipe.student)
    if not table["canonical_focal"]:  # so that runs begun before this key existed can resume
        del table["canonical_focal"]
    return table if recipe.student.is_one_step else {k: v for k, v in table.items() if k not in ("network", "head")}


# --- benchmarks -------------------------------------------------------------------------------------------------------


def benchmark(spec: BenchmarkSettings) -> tuple[Protocol, list[BenchmarkSample]]:
    """A benchmark's protocol in the recipe's mode, and its samples."""
    module = find("distill.eval.benchmarks", spec.name)
    samples: Sequence[BenchmarkSample] = module.samples(spec.root or None, spec.list or None)
    protocol: Protocol = module.PROTOCOL
    return protocol.in_mode(spec.protocol), list(samples[: spec.limit or None])


def prior_samples(spec: BenchmarkSettings) -> list[BenchmarkSample]:
    """The samples to fit the plane baseline of this benchmark: its `prior` list, or 64 scenes of no benchmark."""
    if spec.prior:
        return list(find("distill.eval.benchmarks", spec.name).samples(spec.root or None, spec.prior))
    return list(find("distill.eval.benchmarks", "scenes").training_samples(64))


def trained_student_teacher(recipe: Recipe, *, on: torch.device) -> Any:
    """The recipe's trained student as a teacher, to be scored or compared. Raises what its `load` raises."""
    folder, spec = recipe.run.folder / "train" / "student", recipe.student
    if latent.is_folder(folder):
        return latent.load_teacher(folder, device=on)
    # A student stored with its encoder needs no encoder file.
    file = weights_file(spec.weights) if spec.exclude_frozen_encoder else None
    return CheckpointTeacher.load(str(folder), device=on, encoder_weights=file)


def student_saver(recipe: Recipe) -> Callable[..., object]:
    """The function that saves the recipe's students: `checkpoint.save` leaves the encoder out if the recipe does."""
    if recipe.student.is_one_step:
        return save_latent_student
    return functools.partial(checkpoint.save, exclude_frozen_encoder=recipe.student.exclude_frozen_encoder)
