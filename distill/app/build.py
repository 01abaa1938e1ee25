"""From names to objects: the only file that reads a recipe and makes what it names.

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
from distill.app.inputs import input_shards
from distill.app.recipe import USES, Recipe, as_table, parse
from distill.app.renamed import in_words_of_today
from distill.app.strict import RecipeError
from distill.core.depth import Kind
from distill.core.plugins import file_hashes, find, option_faults, short_name
from distill.core.weights import read_state
from distill.data.corruptions import Corruptions
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.protocol import Protocol
from distill.eval.settings import BenchmarkSettings
from distill.labelling.bridge import Bridged
from distill.labelling.lock import mutex
from distill.labelling.run import TRUTH, OnlineDataset, labels_hash
from distill.losses.objective import Objective
from distill.shards import mirror
from distill.shards.shards import MANIFEST, LabelDataset
from distill.students import Student, checkpoint
from distill.students.settings import StudentSettings
from distill.teachers import Card, resolve
from distill.teachers._compile import compile_networks
from distill.teachers._settings import TeacherSettings
from distill.teachers._sky import POLICIES, under_policy
from distill.training.settings import TrainSettings

Teachers = list[tuple[str, Any]]


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
        return asked
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# --- teachers ---------------------------------------------------------------------------------------------------------


def check_teachers(recipe: Recipe) -> None:
    """Raises RecipeError with every option that no teacher takes."""
    if not recipe.teachers:
        raise RecipeError("the recipe names no teachers: add a [[teachers]] table")
    faults = []
    for i, spec in enumerate(recipe.teachers):
        load = Corruptions if spec.name == TRUTH else find("distill.teachers", spec.name).Teacher.load
        faults += option_faults(load, spec.options, f"teachers[{i}].options")
        faults += option_faults(load, spec.score_options, f"teachers[{i}].score_options")
        if recipe.labels.sky != "teacher" and "sky" in spec.options:
            faults.append(f"teachers[{i}].options.sky: labels.sky decides for all teachers; leave one of them out")
    if faults:
        raise RecipeError("\n".join(faults))


def check_two(recipe: Recipe) -> None:
    """Raises RecipeError for more teachers than labels and training take; comparing and scoring take any number.

    Ground truth is nobody's opinion, and does not count; corrupted, it stands for a teacher.
    """
    networks = [spec for spec in recipe.teachers if spec.name != TRUTH or spec.options]
    if len(networks) > 2:
        raise RecipeError(f"at most two teachers, a primary and an assistant, not {len(networks)}")


def load_teacher(
    spec: TeacherSettings, *, on: torch.device, sky: str = "teacher", options: dict[str, Any] | None = None
) -> Any:
    """One [[teachers]] table as a loaded teacher, whatever its kind and licence.

    sky: labels.sky, or its own rule. options: of `load`, those for labels by default.
    """
    plugin = find("distill.teachers", spec.name)
    weights = spec.weights or plugin.CARDS[0].weights
    options = dict(spec.options if options is None else options)
    if sky != "teacher" and "sky" in inspect.signature(plugin.Teacher.load).parameters:
        options["sky"] = "keep" if sky == "keep" else "invalid"  # what it knows; the policy is applied to all alike
    teacher = plugin.Teacher.load(weights, device=on, dtype=getattr(torch, spec.dtype), **options)
    if spec.compile:
        compile_networks(teacher)
    return teacher


def float32_twins(recipe: Recipe, *, on: torch.device) -> dict[str, Callable[[], Any]]:
    """How to load the eager float32 twin of each teacher that is compiled or computes in half precision."""
    return {
        spec.alias_or_name: functools.partial(
            load_teacher, dataclasses.replace(spec, dtype="float32", compile=False), on=on, sky=recipe.labels.sky
        )
        for spec in recipe.teachers
        if spec.name != TRUTH and (spec.compile or spec.dtype != "float32")
    }


def load_teachers(recipe: Recipe, *, on: torch.device, sky: str = "teacher") -> Teachers:
    """(label, teacher) pairs in the recipe's order, to make labels; "truth" stays a word, or Corruptions. Refuses kinds
    and licences. sky: labels.sky.
    """
    check_teachers(recipe)
    loaded: Teachers = []
    for spec in recipe.teachers:
        if spec.name == TRUTH:
            loaded.append((spec.alias_or_name, Corruptions(**spec.options) if spec.options else TRUTH))
            continue
        teacher = load_teacher(spec, on=on, sky=sky)
        card: Card = teacher.card
        if recipe.labels.commercial_only and not card.commercial:
            raise RecipeError(
                f"labels.commercial_only = true refuses {spec.alias_or_name}: the weights {card.weights} are under "
                f"{card.licence}, which does not allow commercial use; `distill list teachers` shows those that do"
            )
        if card.kind.value == "affine_depth" and recipe.labels.store == "disparity":
            teacher = _bridged(recipe, spec, teacher, primary=loaded[0][0] if loaded else "")
        loaded.append((spec.alias_or_name, teacher))
    if sky not in POLICIES:
        return loaded
    # A bridge is fitted to maps that follow the policy already.
    plain = under_policy([(name, t.teacher if isinstance(t, Bridged) else t) for name, t in loaded], sky)
    return [
        (name, dataclasses.replace(old, teacher=new) if isinstance(old, Bridged) else new)
        for (_, old), (name, new) in zip(loaded, plain, strict=True)
    ]


def _bridged(recipe: Recipe, spec: TeacherSettings, teacher: Any, *, primary: str) -> Bridged:
    """An assistant of affine depth, taken by way of the primary; raises RecipeError where the recipe has no bridge."""
    trouble = (
        f"teacher {spec.alias_or_name} predicts {teacher.card.kind}, which cannot become the disparity that the "
        "student learns (its shift is unknown): use its disparity checkpoint, leave it out, or "
    )
    if not recipe.labels.bridge:
        raise RecipeError(
            f'{trouble}set labels.bridge = "primary", which fits it on every crop to the disparity of the first teacher'
        )
    if not primary:
        raise RecipeError(f'{trouble}name a teacher of disparity before it: labels.bridge = "primary" fits it to that')
    return Bridged(teacher, primary, recipe.labels.bridge_residual)


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
    other = parse(in_words_of_today(made_with), where=f"{folder / MANIFEST}: recipe", uses=USES["label"])
    pairs: list[tuple[str, Any, Any]] = [
        ("images", [one.content for one in recipe.images], [one.content for one in other.images]),
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
    if recipe.labels.source and not (folder / MANIFEST).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with mutex(folder):  # one of a machine's processes fetches, the others wait and find them
            mirror.fetch(recipe.labels.source, folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} has no finished labels: run `distill label` with this recipe first")
    dataset = LabelDataset(folder)
    weighted = len({images.weight for images in recipe.images}) > 1 or recipe.train.source_temperature != 1.0
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


def make_student(recipe: Recipe) -> Student:
    """The student to train, its random weights drawn from the recipe's seed; or the checkpoint it starts from."""
    spec = recipe.student
    if spec.init_from:
        student = checkpoint.load(checkpoint.fetch(spec.init_from), encoder_weights=weights_file(spec.weights))
        _check_start(recipe, student)
        student.encoder.freeze(recipe.train.freeze_encoder)
        student.native_size = spec.native_size or student.native_size or recipe.crops.size
        student.max_depth = spec.max_depth or student.max_depth
        return _of_kind(student, recipe)
    options = dict(spec.encoder_options)
    begun = checkpoint.load(checkpoint.fetch(spec.encoder_init_from)).encoder if spec.encoder_init_from else None
    if begun is not None:
        if options or spec.weights or begun.name != spec.encoder:
            raise RecipeError(
                f"student.encoder_init_from takes the encoder of {spec.encoder_init_from}, {begun.name}, as it is: say "
                f'encoder = "{begun.name}", and neither weights nor encoder_options'
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
            native_size=spec.native_size or recipe.crops.size,
            max_depth=spec.max_depth or None,
        )
    if begun is not None:
        student.encoder.load_state_dict(begun.state_dict())
    if spec.decoder_init_from:
        checkpoint.load_decoder(student, checkpoint.fetch(spec.decoder_init_from))
    if spec.decoder_weights:
        student.decoder.load_released(read_state(resolve(spec.decoder_weights, files=())))
    return _of_kind(student, recipe)


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


def batch_norm_note(recipe: Recipe, student: Student) -> str:
    """What to know where BatchNorm sees fewer images than the batch has, or fewer than four; else nothing."""
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


def make_objective(recipe: Recipe, student: Student | None = None) -> Objective:
    """[loss] as the trainer takes it. student: the one to train, whose reach may be that of the one it began as."""
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
    )


def training_seed(recipe: Recipe) -> int:
    """What a student's random weights, order and teacher choices are drawn from; labels know run.seed alone."""
    return recipe.run.seed if recipe.train.seed < 0 else recipe.train.seed


def identity(recipe: Recipe) -> str:
    """A hash of what makes a training run this run, beside its settings: labels, student and loss."""
    what = [labels_folder(recipe).name, as_table(recipe.student), as_table(recipe.loss)]
    what += [files for files in [file_hashes(what)] if files]
    what += ["redraw"] if recipe.crops.redraw else []
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


# --- benchmarks -------------------------------------------------------------------------------------------------------


def benchmark(spec: BenchmarkSettings) -> tuple[Protocol, list[BenchmarkSample]]:
    """A benchmark's protocol in the recipe's mode, and its samples."""
    module = find("distill.eval.benchmarks", spec.name)
    samples: Sequence[BenchmarkSample] = module.samples(spec.root or None, spec.list or None)
    protocol: Protocol = module.PROTOCOL
    return protocol.in_mode(spec.protocol), list(samples[: spec.limit or None])


def prior_samples(spec: BenchmarkSettings) -> list[BenchmarkSample]:
    """What the image-plane prior of this benchmark is fitted on: its `prior` list, or 64 scenes of no benchmark."""
    if spec.prior:
        return list(find("distill.eval.benchmarks", spec.name).samples(spec.root or None, spec.prior))
    return list(find("distill.eval.benchmarks", "scenes").training_samples(64))


def saver(recipe: Recipe) -> Callable[..., object]:
    """How the recipe's students are written: `checkpoint.save`, without the encoder where the recipe leaves it out."""
    return functools.partial(checkpoint.save, exclude_frozen_encoder=recipe.student.exclude_frozen_encoder)
