"""From names to objects: student, labels and benchmarks of a recipe (`teaching` makes teachers, `inputs` images).

Everything a recipe asks for is judged here before any work begins, so that a misspelt option of the last teacher does
not surface after a night of labelling.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
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
from distill.app.teaching import check_two, load_teachers
from distill.core.depth import Kind
from distill.core.plugins import file_hashes, find, short_name
from distill.core.weights import read_state
from distill.data.pairs import read_names
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.protocol import Protocol
from distill.eval.settings import BenchmarkSettings
from distill.labelling import moved
from distill.labelling.lock import mutex
from distill.labelling.run import OnlineDataset, labels_hash
from distill.losses.objective import Objective
from distill.shards import mirror
from distill.shards.cache import TarCache
from distill.shards.shards import MANIFEST, LabelDataset
from distill.shards.tables import CACHED
from distill.students import Student, checkpoint
from distill.students.settings import StudentSettings
from distill.teachers import resolve
from distill.teachers._latent_student import LatentStudent
from distill.teachers.checkpoint import Teacher as CheckpointTeacher
from distill.training.latent import LatentTask
from distill.training.settings import TrainSettings


def process() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun and `accelerate launch` say it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def device(recipe: Recipe) -> torch.device:
    """The recipe's device; "auto" takes this process's CUDA card, then Apple's GPU, then the CPU.

    Raises RecipeError for one that this machine has not.
    """
    if recipe.run.device != "auto":
        asked = torch.device(recipe.run.device)
        count = 1 if asked.type == "cpu" else torch.get_device_module(asked).device_count()
        if (asked.index or 0) >= count:
            raise RecipeError(f'run.device = "{asked}": torch finds {count} of {asked.type} here; take "auto" or "cpu"')
        if asked.type == "cuda" and asked.index is None:  # else all processes of a machine would share its first card
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)
        return asked
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# --- labels -----------------------------------------------------------------------------------------------------------


def labels_folder(recipe: Recipe) -> Path:
    """Where the recipe's labels are: the folder's name is a hash of images, crops and teachers, and of nothing else.

    Where labels.root is itself a finished labels folder, that is it, whatever its name.
    """
    check_two(recipe)
    here = "" if recipe.labels.meeting else recipe.labels.root
    root = Path(here or recipe.run.folder / "labels")
    if (root / MANIFEST).is_file():
        return root
    more = {"seed": recipe.run.seed, **recipe.labels.content}
    images = [one.content for one in recipe.images]
    teachers = [spec.content for spec in recipe.teachers]
    address = labels_hash(images, {**recipe.crops.content, **more}, teachers)
    return root / address


def _check_labels(recipe: Recipe, folder: Path, made_with: dict[str, Any]) -> None:
    """Raises RecipeError where the labels in `folder` were made with other settings than the recipe's."""
    if not made_with:
        return  # by a caller of `label`, who answers for them
    other = parse(with_current_keys(made_with), where=f"{folder / MANIFEST}: recipe", uses=USES["label"])
    pairs: list[tuple[str, Any, Any]] = [
        ("images", *_images_of(recipe, other, folder)),
        ("crops", recipe.crops.content, other.crops.content),
        ("teachers", [spec.content for spec in recipe.teachers], [spec.content for spec in other.teachers]),
        ("run.seed", recipe.run.seed, other.run.seed),
    ]
    then = other.labels.content
    pairs += [(f"labels.{name}", value, then.get(name)) for name, value in recipe.labels.content.items()]
    if changed := [name for name, now, before in pairs if now != before]:
        raise RecipeError(
            f"{folder} was labelled with another {', '.join(changed)} than this recipe's (its manifest.json has the "
            "recipe that made it): give the recipe those settings, or point labels.root elsewhere"
        )


def _images_of(recipe: Recipe, other: Recipe, folder: Path) -> tuple[Any, Any]:
    """What two recipes ask for of images; without their places, where the labels are of the files of the first."""
    both = [[one.content for one in each.images] for each in (recipe, other)]
    plain = [[{k: v for k, v in one.items() if k not in moved.PLACES} for one in images] for images in both]
    if both[0] == both[1] or plain[0] != plain[1]:
        return both[0], both[1]
    try:
        same = moved.made_from(folder, input_shards(recipe), recipe.crops, recipe.labels)
    except (OSError, ValueError, LookupError):  # they are not here
        same = False
    return (plain[0], plain[1]) if same else (both[0], both[1])


def labelled(recipe: Recipe) -> LabelDataset | OnlineDataset:
    """The labels to learn from: the finished folder, or teachers asked on the fly."""
    check_two(recipe)
    if recipe.labels.online:
        return OnlineDataset(
            input_shards(recipe),
            load_teachers(recipe, on=device(recipe), sky=recipe.labels.sky),
            crops=recipe.crops,
            labels=recipe.labels,
            seed=recipe.run.seed,
        )
    folder = labels_folder(recipe)
    source, limit = recipe.labels.source, round(recipe.labels.cache_gb * 1e9)
    if source and not ((folder / MANIFEST).is_file() and (limit or not (folder / CACHED).is_dir())):
        folder.mkdir(parents=True, exist_ok=True)
        with mutex(folder):  # one of a machine's processes fetches, the others wait and find them
            mirror.fetch(source, folder, cached=limit > 0)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} has no finished labels: run `distill label` with this recipe first")
    # A folder that was made here, or fetched whole, has no such mark, and loses nothing.
    cache = TarCache(source, folder, limit) if limit and (folder / CACHED).is_dir() else None
    keys = read_names(recipe.labels.names) if recipe.labels.names else None
    dataset = LabelDataset(folder, keys=keys, cache=cache)
    weighted = len({images.weight for images in recipe.images}) > 1 or recipe.train.source_temperature != 1.0
    weighted = weighted or recipe.train.even_batches
    if weighted and len(recipe.images) > 1 and not any("image_source" in tar for tar in dataset.manifest["shards"]):
        raise RecipeError(
            f"{folder} does not say which [[images]] its labels belong to, which images.weight and "
            "train.source_temperature need: run `distill label` again, which writes it down and labels nothing anew"
        )
    _check_labels(recipe, folder, dataset.manifest.get("recipe") or {})
    for name, card in dataset.manifest["teachers"].items():
        if recipe.labels.commercial_only and not card.get("commercial", True):
            raise RecipeError(
                f"labels.commercial_only = true refuses the labels in {folder}: {name} made them with "
                f"{card['weights']}, under {card['licence']}, which does not allow commercial use"
            )
    return dataset


# --- student ----------------------------------------------------------------------------------------------------------


def weights_file(weights: str) -> str | None:
    """The local file of `student.weights`, which may be a file of a hub repository; None for "" and "pretrained"."""
    return None if weights in ("", "pretrained") else str(resolve(weights, files=()))


def make_student(recipe: Recipe) -> Student | LatentStudent:
    """The student to train, its random weights drawn from the recipe's seed; or the checkpoint it starts from."""
    return latent.make(recipe, training_seed(recipe)) if latent.is_one_step(recipe) else _encoder_decoder(recipe)


def _encoder_decoder(recipe: Recipe) -> Student:
    spec = recipe.student
    if spec.init_from:
        begins = checkpoint.fetch(spec.init_from)
        if spec.weights and checkpoint.describe(begins)["encoder_weights"] is None:
            raise RecipeError(
                f"student.init_from: {spec.init_from} holds its own encoder, and student.weights names another: leave "
                "one of them out"
            )
        student = checkpoint.load(begins, encoder_weights=weights_file(spec.weights))
        _check_start(recipe, student)
        student.encoder.freeze(recipe.train.freeze_encoder)
        student.native_size = spec.native_size or student.native_size or _short_side(recipe)
        student.max_depth = spec.max_depth or student.max_depth
        if student.canonical_focal and spec.canonical_focal != student.canonical_focal:
            focal = f"{student.canonical_focal:g}"
            raise RecipeError(f"student.init_from: {spec.init_from} has student.canonical_focal = {focal}: set it too")
        student.canonical_focal = spec.canonical_focal or None
        return _of_kind(student, recipe)
    options = dict(spec.encoder_options)
    begun = checkpoint.load(checkpoint.fetch(spec.encoder_init_from)).encoder if spec.encoder_init_from else None
    if begun is not None:
        if options or begun.name != spec.encoder:
            raise RecipeError(
                f"student.encoder_init_from takes the encoder of {spec.encoder_init_from}, {begun.name}, as it is: say "
                f'encoder = "{begun.name}", and no encoder_options'
            )
        options = dict(begun.options) | {"frozen": False}
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
    if begun is not None:
        student.encoder.load_state_dict(begun.state_dict())
    if spec.decoder_init_from:
        checkpoint.load_decoder(student, checkpoint.fetch(spec.decoder_init_from))
    if spec.decoder_weights:
        student.decoder.load_released(read_state(resolve(spec.decoder_weights, files=())))
    return _of_kind(student, recipe)


def _short_side(recipe: Recipe) -> int:
    return min(recipe.crops.size, recipe.crops.width or recipe.crops.size)


def _of_kind(student: Student, recipe: Recipe) -> Student:
    """The student; raises RecipeError where it predicts another kind than it is to be trained for."""
    if student.kind != recipe.train.kind:
        way_out = "set student.max_depth, in metres" if recipe.train.kind == "metric_depth" else "see student.max_depth"
        raise RecipeError(f'train.kind = "{recipe.train.kind}", and the student predicts {student.kind}: {way_out}')
    return student


def _check_start(recipe: Recipe, student: Student) -> None:
    """Raises RecipeError where [student] describes another network than the one it starts from."""
    given, spec, plain = as_table(recipe)["student"], student.spec, as_table(StudentSettings())
    for table in (given, spec):
        table["decoder"] = short_name(table["decoder"])
    for key in ("encoder", "decoder", "encoder_options", "decoder_options"):
        if given[key] not in (plain[key], spec[key]):
            raise RecipeError(
                f"student.{key}: {given['init_from']} is a student already, with {spec[key]}; leave it out"
            )


def _decoder_options(recipe: Recipe) -> dict[str, Any]:
    takes = inspect.signature(find("distill.students.decoders", recipe.student.decoder).Decoder).parameters
    if recipe.student.norm and "norm" not in takes:
        raise RecipeError(f"student.norm: the decoder {recipe.student.decoder} has no norms; leave it out")
    norm = "batch" if recipe.student.norm == "sync" else recipe.student.norm
    return dict(recipe.student.decoder_options) | ({"norm": norm} if norm else {})


def batch_norm_note(recipe: Recipe, student: Student | LatentStudent) -> str:
    """What to know where BatchNorm sees fewer images than the batch has, or fewer than four; else nothing."""
    if isinstance(student, LatentStudent):
        return ""
    kind, batch = train_settings(recipe).batchnorm, recipe.train.batch_size
    seen = batch // (recipe.train.accumulate * (1 if kind == "sync" else process()[1]))
    learns = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in student.decoder.modules())
    if not learns or kind == "frozen" or (seen == batch and seen >= 4):
        return ""
    why = "the result depends on processes and accumulate" if seen < batch else "its statistics are mostly noise"
    others = "" if kind == "sync" else ', "sync" joins the processes'
    return (
        f"BatchNorm sees {seen} of a step's {batch} images at a time, so {why}: "
        f'student.norm = "group" or "frozen" has no such statistics{others}'
    )


def make_objective(recipe: Recipe, student: Student | LatentStudent | None = None) -> Objective | LatentTask:
    """[loss], or [latent], as the trainer takes it. student: the one to train, whose reach may be that of the one it
    began as.
    """
    if isinstance(student, LatentStudent):
        return latent.training_task(recipe, student, seed=training_seed(recipe), labels=labels_folder(recipe).name)
    max_depth = recipe.student.max_depth or None
    return Objective(recipe.loss, Kind(recipe.train.kind), max_depth if student is None else student.max_depth)


def train_settings(recipe: Recipe) -> TrainSettings:
    """[train] with what other tables decide; of several teachers the first is learnt from `primary_ratio` of
    the time, where it teaches, and the others share the rest.
    """
    train, names = recipe.train, [t.alias_or_name for t in recipe.teachers]
    first = train.primary_ratio
    shares = {name: first if i == 0 else (1.0 - first) / (len(names) - 1) for i, name in enumerate(names)}
    weights = tuple(images.weight for images in recipe.images)
    norm = recipe.student.norm
    return dataclasses.replace(
        train,
        seed=training_seed(recipe),
        teacher_shares=train.teacher_shares or (shares if len(names) > 1 else {}),
        source_weights=weights if {*weights} != {1.0} else (),
        batchnorm=norm if norm in ("sync", "frozen") else train.batchnorm,
        keep_unmet=latent.is_one_step(recipe),
        canonical_focal=recipe.student.canonical_focal,
    )


def training_seed(recipe: Recipe) -> int:
    """What a student's random weights, order and teacher choices are drawn from; labels know run.seed alone."""
    return recipe.run.seed if recipe.train.seed < 0 else recipe.train.seed


def identity(recipe: Recipe) -> str:
    """A hash of what makes a training run this run, beside its settings: labels, student and loss."""
    loss = as_table(recipe.loss)
    if loss["label_range"] == "as_is":  # runs that were begun before there was a choice go on
        del loss["label_range"]
    what: list[Any] = [labels_folder(recipe).name, _student_table(recipe), loss]
    what += [recipe.latent.content] if latent.is_one_step(recipe) else []
    what += [files for files in [file_hashes(what)] if files]
    what += ["redraw"] if recipe.crops.redraw else []
    what += [read_names(recipe.labels.names)] if recipe.labels.names else []
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _student_table(recipe: Recipe) -> dict[str, Any]:
    """[student]; of an encoder and a decoder without the keys of other networks, which runs of before do not know."""
    table = as_table(recipe.student)
    if not table["canonical_focal"]:  # runs that were begun before there was a choice go on
        del table["canonical_focal"]
    return table if latent.is_one_step(recipe) else {k: v for k, v in table.items() if k not in ("network", "head")}


# --- benchmarks -------------------------------------------------------------------------------------------------------


def benchmark(spec: BenchmarkSettings) -> tuple[Protocol, list[BenchmarkSample]]:
    """A benchmark's protocol in the recipe's mode, and its samples."""
    module = find("distill.eval.benchmarks", spec.name)
    samples: Sequence[BenchmarkSample] = module.samples(spec.root or None, spec.list or None)
    protocol: Protocol = module.PROTOCOL
    return protocol.in_mode(spec.protocol), list(samples[: spec.limit or None])


def prior_samples(spec: BenchmarkSettings) -> list[BenchmarkSample]:
    """What the plane baseline of this benchmark is fitted on: its `prior` list, or 64 scenes of no benchmark."""
    if spec.prior:
        return list(find("distill.eval.benchmarks", spec.name).samples(spec.root or None, spec.prior))
    return list(find("distill.eval.benchmarks", "scenes").training_samples(64))


def trained(recipe: Recipe, *, on: torch.device) -> Any:
    """The student that the recipe trained, as a teacher, to be scored or compared. Raises as their `load` does."""
    folder, spec = recipe.run.folder / "train" / "student", recipe.student
    if latent.is_folder(folder):
        return latent.load_teacher(folder, device=on)
    # A student that holds its encoder takes no file of it.
    file = weights_file(spec.weights) if spec.exclude_frozen_encoder else None
    return CheckpointTeacher.load(str(folder), device=on, encoder_weights=file)


def saver(recipe: Recipe) -> Callable[..., object]:
    """How the recipe's students are written: `checkpoint.save`, without the encoder where the recipe leaves it out."""
    if latent.is_one_step(recipe):
        return latent.saver()
    return functools.partial(checkpoint.save, exclude_frozen_encoder=recipe.student.exclude_frozen_encoder)
