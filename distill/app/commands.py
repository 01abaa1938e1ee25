"""The commands on a recipe: label, train, score, report. Each can be interrupted at any time; a new call resumes.

A run's folder:

    recipe.toml  labels/HASH/  train/  predictions/MODEL/BENCHMARK/  scores/BENCHMARK--MODEL.json  report.html
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

import distill
from distill.app import build, teaching, trusted_recipes
from distill.app.console import dashboard, note, progress, say
from distill.app.features import stored_features
from distill.app.inputs import input_shards
from distill.app.kept_recipe import kept_recipe
from distill.app.lineage import lineage, teachers_of
from distill.app.recipe import Recipe, as_table
from distill.app.reference import feature_reference
from distill.app.score_recipe import score_all
from distill.app.strict import RecipeError
from distill.core import machine
from distill.core.depth import Kind
from distill.core.wording import counted
from distill.data.filetypes import summarize_counts
from distill.data.sources import InputShard
from distill.eval import score as scoring
from distill.labelling import moved
from distill.labelling.manifest import settings_of
from distill.labelling.meeting import Folder, Meeting, in_turn
from distill.labelling.objects import Objects
from distill.labelling.run import LabelOutcome, label
from distill.labelling.tuning import TUNED, tune
from distill.labelling.worker import MadePart, work, work_by_parts
from distill.shards import mirror, shards
from distill.shards.cache import TarCache
from distill.shards.tables import CACHED
from distill.training import checkpoints
from distill.training.train import TrainResult, train


def commit() -> str:
    """The version, with the commit where the code runs from a clone."""
    root = Path(distill.__file__).parent.parent
    if not (root / ".git").exists():
        return distill.__version__
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:  # no git on this machine
        described = ""
    return f"{distill.__version__}+{described or 'unknown'}"


def labels_place(recipe: Recipe, folder: Path) -> str:
    """Where a recipe's workers write: its labels folder, or the folder of that name at the URL of labels.root."""
    return f"{recipe.labels.meeting.rstrip('/')}/{folder.name}" if recipe.labels.meeting else str(folder)


def worker_meeting(recipe: Recipe, folder: Path) -> Meeting:
    """How a recipe's workers coordinate, at `labels_place`."""
    return Objects(labels_place(recipe, folder), folder) if recipe.labels.meeting else Folder(folder)


def run_label(recipe: Recipe, folder: Path | None = None, *, send: bool = True, worker: bool = False) -> LabelOutcome:
    """Labels the recipe's images into its labels folder, or into `folder`, which this recipe labelled before.

    send: upload to its mirror too. worker: label as one of any number of workers, which several processes and a
    labels.root at a URL do in any case.
    """
    if folder is not None:
        return _label(recipe, folder, send=send, worker=worker)
    with kept_recipe(recipe):
        return _label(recipe, build.labels_folder(recipe), send=send, worker=worker)


def _label(recipe: Recipe, folder: Path, *, send: bool, worker: bool) -> LabelOutcome:
    shared = _is_shared(recipe, worker=worker)
    job = _prepare(recipe, folder, worker=worker)
    if shared:
        note("progress is this worker's own; distill status RECIPE shows all workers and the time left")
    with progress("label, this worker" if shared else "label", eta=not shared) as report:
        outcome: LabelOutcome = job(report=report)
    print_label_outcome(recipe, folder, outcome, send=send)
    return outcome


def _is_shared(recipe: Recipe, *, worker: bool) -> bool:
    """Whether this process labels as one of several workers."""
    return worker or build.process()[1] > 1 or bool(recipe.labels.meeting)


def label_by_parts(recipe: Recipe) -> Iterator[MadePart]:
    """Labels as a worker and yields after each part, for callers that go part by part (app.cluster)."""
    with kept_recipe(recipe):
        yield from _prepare(recipe, build.labels_folder(recipe), worker=True, steps=True)()


def _prepare(recipe: Recipe, folder: Path, *, worker: bool, steps: bool = False) -> partial[Any]:
    """Loads the teachers and returns the labelling function with its arguments; steps: generator `work_by_parts`."""
    if (folder / CACHED).is_dir():
        raise ValueError(
            f"{folder} keeps only some tars of finished labels (labels.cache_gb), and labelling here would make the "
            "others again: train on it, set labels.cache_gb = 0 to fetch all of them, or delete it"
        )
    if build.process()[0] == 0:
        trusted_recipes.record(as_table(recipe))
    images = input_shards(recipe)
    device = build.device(recipe)
    teachers = teaching.load_teachers(recipe, on=device)
    references = teaching.float32_twins(recipe, on=device)
    if build.process()[0] == 0 and not recipe.labels.meeting:
        _note_other_labels(recipe, folder, images, teachers)
    size, labeller = recipe.crops.size, cast(Callable[..., Any], label)
    measure = partial(tune, folder, teachers, recipe.labels, size=size, device=device, references=references)
    if _is_shared(recipe, worker=worker):
        meeting = worker_meeting(recipe, folder)
        labels, measured = in_turn(meeting, folder / TUNED, measure)
        labeller = partial(work_by_parts if steps else work, meeting=meeting)
    else:
        labels, measured = measure()
    for name, off in measured.get("from_float32", {}).items():
        note(f"teacher {name}: differs from eager float32 by {off['median']:.2%} of the spread (median)")
    return partial(
        labeller,
        images,
        teachers,
        out=folder,
        crops=recipe.crops,
        labels=labels,
        seed=recipe.run.seed,
        device=device,
        recipe=as_table(recipe),
        machine=measured,
        tell=note,
    )


def _note_other_labels(recipe: Recipe, folder: Path, images: list[InputShard], teachers: teaching.Teachers) -> None:
    """Logs where finished labels of the same files are: another run's, or from when the images' path was another."""
    if not (folder / shards.SETTINGS).is_file() and (same := build.labels_of_another_run(recipe)):
        note(
            f"{same} has finished labels of this recipe's images, crops and teachers; they are made again here. To use "
            f"those instead, stop this command and add --set labels.root={shlex.quote(str(same))}"
        )
        return
    settings = settings_of(teachers, recipe.crops, recipe.labels, seed=recipe.run.seed)
    if match := moved.find_moved_labels(folder, settings, images, recipe.crops, recipe.labels):
        other, name = match
        now, then = (stem if images[0].is_tar else stem.rpartition("_")[0] for stem in (images[0].stem, name))
        rename_hint = f"rename {now} back to {then}, " if name else ""
        note(
            f"{other} has finished labels of these files from when their path was different; they are made again here. "
            f"To use those instead, stop this command, {rename_hint}and add --set labels.root={shlex.quote(str(other))}"
        )


def print_label_outcome(recipe: Recipe, folder: Path, outcome: LabelOutcome, *, send: bool = True) -> None:
    """Prints the outcome of labelling; send: upload to the mirror too, if the recipe names one."""
    if recipe.labels.meeting or not outcome.last:
        state = "complete" if outcome.complete else "other workers are making the last parts or the manifest"
        say(f"{labels_place(recipe, folder)}: {state}; {counted(outcome.parts, 'part')} made here")
    elif outcome.complete:
        manifest = shards.read_manifest(folder)
        num_quarantined = len(manifest["quarantine"])
        count = sum(shard["samples"] for shard in manifest["shards"])
        say(
            f"{folder}: {counted(count, 'sample')} in {counted(len(manifest['shards']), 'tar')}, "
            f"{counted(num_quarantined, 'image')} in quarantine",
            labels=str(folder),
            samples=count,
            tars=len(manifest["shards"]),
            quarantined=num_quarantined,
        )
        for line in manifest["quarantine"][:20]:
            note(f"  quarantined {line['origin']}: {line['reason']}")
        if manifest.get("passed"):
            note(f"  ignored: {summarize_counts(manifest['passed'])}")
        if not count:
            raise ValueError(
                f"{folder}: nothing was labelled because no image was usable; fix the quarantined ones above "
                '(those that are too small: a lower crops.min_side, or crops.on_small = "use")'
            )
        if recipe.labels.mirror and send:
            with progress("send to the mirror") as report:
                sent = mirror.publish(folder, recipe.labels.mirror, report=report)
            say(f"{recipe.labels.mirror.rstrip('/')}/{folder.name}: {counted(sent, 'file')} sent")


def run_train(recipe: Recipe) -> TrainResult:
    """Trains the recipe's student on its labels, resuming where an earlier call stopped."""
    with kept_recipe(recipe):
        return _train(recipe)


def _train(recipe: Recipe) -> TrainResult:
    dataset = build.training_labels(recipe)
    if isinstance(cache := getattr(dataset, "cache", None), TarCache):
        note(cache.traffic.sentence)
    student = build.make_student(recipe)
    if warning := build.batch_norm_note(recipe, student):
        note(warning)
    machine.allow_open_files()
    check_disk(recipe, student)
    features = stored_features(recipe, dataset, student)
    with dashboard("train") as report:
        result = train(
            student,
            dataset,
            build.make_objective(recipe, student),
            out=recipe.run.folder / "train",
            settings=build.train_settings(recipe),
            reference=feature_reference(recipe, student),
            card=student_card(recipe, dataset),
            identity=build.identity(recipe),
            save=build.student_saver(recipe),
            report=report,
            tell=note,
            device=build.device(recipe),
            features=features,
        )
    selection = f"held-out loss {result.heldout:.4f}" if result.heldout is not None else "the last step"
    speed = f"{result.images_per_s:.1f} images/s" if result.images_per_s else "already trained: no step was left"
    say(
        f"{result.folder}: step {result.selected_step} of {result.step}, {selection}, {speed}",
        student=str(result.folder),
        step=result.selected_step,
        steps=result.step,
        heldout=result.heldout,
        images_per_s=result.images_per_s,
    )
    return result


def check_disk(recipe: Recipe, student: torch.nn.Module) -> None:
    """Raises OSError if the disk has no room for two checkpoints, hours before a write would fail."""
    size = checkpoints.bytes_of(student)
    free, place = machine.free_disk(recipe.run.folder)
    if free < 2 * size:
        raise OSError(
            f"{place} has {free / 1e9:.2f} GB free, but a checkpoint takes {size / 1e9:.2f} GB while the previous one "
            "is still there: free some space, or set run.out to another disk"
        )
    if free < (recipe.train.keep_last + 2) * size:
        space_needed = f"{recipe.train.keep_last} checkpoints of {size / 1e9:.2f} GB"
        note(f"{place} has {free / 1e9:.2f} GB free: tight for {space_needed}")


def student_card(recipe: Recipe, dataset: Any) -> dict[str, Any]:
    """The student's card: how it was made, from which teachers and images, under which licences."""
    teachers = teachers_of(dataset)
    origins, commercial = lineage(recipe, teachers)
    return {
        "name": recipe.run.name,
        "made_by": f"distill train, {commit()}",
        "recipe": as_table(recipe),
        "kind": f"{recipe.train.kind}, larger is {Kind(recipe.train.kind).larger_is}",
        "teachers": teachers,
        "licence": "what its teachers and images allow; see lineage",
        "commercial": commercial,
        "lineage": origins,
        "images": {"count": len(set(dataset.image_keys)), "licence": recipe.labels.licence},
    }


def run_score(recipe: Recipe, *, teachers: bool = True) -> list[scoring.Score]:
    """Predicts, stores, then scores every model on every benchmark; what is stored already is not predicted again.

    teachers: False leaves out the recipe's, whatever its score.teachers; the kept recipe is the same.

    Images that could not be scored are logged with file and reason; `num_failed` of the results counts them.
    """
    if not recipe.benchmarks:
        raise RecipeError("the recipe names no benchmarks: add a [[benchmarks]] table")
    scored = recipe if teachers else replace(recipe, score=replace(recipe.score, teachers=False))
    with kept_recipe(recipe):
        return score_all(scored)


def run_report(recipe: Recipe) -> Path:
    """Writes RUN/report.html from what the run's folder holds."""
    from distill.eval.reports.report import write_report

    path = write_report(recipe.run.folder)
    say(f"report: {path.resolve()}", report=str(path.resolve()))
    return path


def run_demo(recipe: Recipe) -> Path:
    """The whole loop: label, train, score, report."""
    note(f"the whole loop of {recipe.run.name}: label, train, score, report (into {recipe.run.folder}/)")
    run_label(recipe)
    run_train(recipe)
    run_score(recipe)
    return run_report(recipe)
