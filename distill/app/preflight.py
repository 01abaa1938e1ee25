"""The checks of `distill doctor RECIPE` before a night of labelling or a day of training, from names to a short probe.

Nothing is written. Teachers and student are loaded, one photo is labelled and one training step is taken, and the
measured rates are extrapolated to the whole run: an estimate from one photo, good to a factor, not to a tenth. A fault
in one check does not hide faults in others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from distill.app import build, latent, latent_costs, scaling, teaching, weights
from distill.app.image_survey import Images, survey
from distill.app.recipe import Recipe
from distill.app.sample_checks import sample_findings
from distill.core import machine
from distill.core.findings import Finding, Level
from distill.core.wording import counted, first_line
from distill.eval.completeness import check_benchmark
from distill.labelling.annotate import label_photo
from distill.labelling.jobs import TRUTH
from distill.shards.cache import Traffic
from distill.shards.codec import Sample, collate, encode_sample
from distill.students import Student
from distill.teachers._latent_student import LatentStudent
from distill.training import checkpoints
from distill.training.batches import MicroBatch, TaughtRows
from distill.training.label_choice import convert_labels
from distill.training.latent import LatentTask
from distill.training.schedule import in_steps

T = TypeVar("T")
PROCESSES = (1, 2, 4, 8)
SPARE = 1.15  # safety factor on disk space: other photos may need more than the probe's
LONG, TOO_LONG = 24.0, 14 * 24.0
"""Hours. More than LONG on one process is a warning; more than TOO_LONG on as many as can work is a fault."""
_FAULTS = (ValueError, LookupError, OSError, ImportError, RuntimeError)


def check_recipe(recipe: Recipe, *, only: Literal["", "compare", "score"] = "") -> list[Finding]:
    """One finding per check, worst last; raises nothing that a recipe can cause.

    only: the recipe is for `distill compare`, which neither cuts crops nor trains, or for `distill score`, which needs
    no images either.
    """
    findings: list[Finding] = []
    if (weight_findings := _try(findings, "weights", lambda: weights.weight_findings(recipe))) is not None:
        findings += weight_findings
    missing = {finding.subject for finding in findings if finding.level != "ok"}
    device = _try(findings, "device", lambda: build.device(recipe))
    if device is None:
        recipe = replace(recipe, run=replace(recipe.run, device="cpu"))
        device = torch.device("cpu")
    images = _try(findings, "images", lambda: survey(recipe, crops=not only)) if only != "score" else None
    if images is not None:
        findings += _about_images(recipe, images, crops=not only)
    teachers: Any = []
    if recipe.teachers and not any(subject.startswith("teacher ") for subject in missing):
        teachers = _try(findings, "teachers", lambda: teaching.load_teachers(recipe, on=device)) or []
        findings += _about_teachers(teachers)
    if only:
        findings += _about_benchmarks(recipe, findings) if only == "score" else []
        return _worst_last(findings)
    findings += _about_start(recipe)
    student = None
    if not any(subject.startswith("student.") for subject in missing):
        student = _try(findings, "student", lambda: build.make_student(recipe))
    findings += _about_sizes(recipe, teachers, student)
    findings += [*_about_batches(recipe), *_about_machine(recipe)]
    if images and images.photos and teachers:
        _probe(findings, recipe, images, teachers, student, device)
    return _worst_last(findings)


def _probe(
    findings: list[Finding],
    recipe: Recipe,
    images: Images,
    teachers: Any,
    student: Student | LatentStudent | None,
    device: torch.device,
) -> None:
    """Adds the findings of a labelled photo and, if there is a student, of a training step on it."""
    probe = _try(findings, "probe of the teachers", lambda: _label_one(recipe, images, teachers))
    if probe is None:
        return
    sample, seconds = probe
    findings += _about_labelling(recipe, images, sample, seconds, device)
    if student is None:
        return
    step = _try(findings, "probe of a training step", lambda: _step(recipe, student, sample, device))
    if step is None:
        return
    findings += _about_training(recipe, student, step, device, images)
    if device.type != "cpu":
        codec = recipe.labels.codec
        cpu_seconds = scaling.reading_seconds(sample, codec, list(sample.labels))
        gpu_seconds = step / recipe.train.batch_size
        findings.append(scaling.finding("training", gpu_seconds, cpu_seconds, scaling.cores(), codec))


def _about_benchmarks(recipe: Recipe, findings: list[Finding]) -> list[Finding]:
    """The findings of `distill doctor --benchmark` for each benchmark, under the recipe's name for it."""
    all_findings: list[Finding] = []
    for spec in recipe.benchmarks:
        name = spec.alias_or_name
        results = _try(findings, name, partial(check_benchmark, spec.name, spec.root or None, spec.list or None))
        all_findings += [replace(finding, what=f"{name}: {finding.what}") for finding in results or []]
    return all_findings


def _worst_last(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: ("ok", "warn", "bad").index(finding.level))


def _try(findings: list[Finding], what: str, work: Callable[[], T]) -> T | None:
    """The result of `work`; a fault becomes a finding, and the result None."""
    try:
        return work()
    except _FAULTS as error:
        line = first_line(error)
        findings.append(Finding("bad", f"{what}: {line}", "fix this first; what depends on it was not checked"))
        return None


# --- images and teachers ----------------------------------------------------------------------------------------------


def _about_images(recipe: Recipe, images: Images, *, crops: bool) -> Iterator[Finding]:
    about = "" if images.scanned else "about "
    if not images.count:
        why = images.rejected[0] if images.rejected else "the source is empty"
        yield Finding("bad", f"no images: {why}", "fix the file, or name others in [[images]]")
        return
    yield Finding("ok", f"{about}{counted(images.count, 'image')}; parts to label: {about}{images.parts}")
    if images.bad:
        tried = len(images.bad) + len(images.photos)
        level: Level = "warn" if images.photos else "bad"
        line = f"{len(images.bad)} of the first {tried} images cannot be used"
        remedy = "a few are normal and go to quarantine; if all are too small, lower crops.min_side or crops.size"
        yield Finding(level, f"{line}: {images.bad[0]}", remedy)
    idle = [n for n in PROCESSES if images.parts < n] if crops else []
    if idle:
        suggested = max(1, images.count * recipe.crops.crops_per_image // (4 * PROCESSES[-1]))
        yield Finding(
            "warn",
            f"parts to label: {images.parts}; processes beyond that number would be idle",
            f"with {idle[0]} processes or more set labels.samples_per_part = {suggested}",
        )
    if recipe.labels.licence == "unknown":
        yield Finding("warn", "labels.licence is unknown", "set it: it goes into the manifest and the student's card")
    if crops:
        yield from sample_findings(recipe, images)


def _about_teachers(teachers: Any) -> Iterator[Finding]:
    for name, teacher in teachers:
        card = getattr(teacher, "card", None)
        if teacher == TRUTH or card is None:
            yield Finding("ok", f"teacher {name}: the images' own ground truth")
            continue
        yield Finding("ok", f"teacher {name}: weights {card.weights} ({card.revision}), predicts {card.kind}")
        level: Level = "ok" if card.commercial else "warn"
        remedy = "" if card.commercial else "its students may not be sold; labels.commercial_only = true refuses it"
        yield Finding(level, f"teacher {name}: licence {card.licence}", remedy)


def _about_start(recipe: Recipe) -> Iterator[Finding]:
    """A finding if the encoder starts from random weights: it learns little from as much as such a recipe shows it."""
    student = recipe.student
    if student.weights or student.init_from or student.encoder_init_from:
        return
    line = f"student.encoder: {student.encoder} begins with random weights"
    remedy = (
        'student.weights = "pretrained" (or a file), or student.encoder_init_from = "pocket"; published students begin '
        "with a pretrained encoder"
    )
    if recipe.train.freeze_encoder:
        yield Finding("bad", f"{line}, and train.freeze_encoder keeps them random", remedy)
    else:
        yield Finding("warn", line, remedy)


def _about_sizes(recipe: Recipe, teachers: Any, student: torch.nn.Module | None) -> Iterator[Finding]:
    size, patch = recipe.crops.size, recipe.crops.patch_size or recipe.crops.size
    multiples = {f"teacher {name}": getattr(getattr(t, "card", None), "multiple", 1) for name, t in teachers}
    for who, multiple in multiples.items():
        for key, side in (("crops.size", size), ("crops.patch_size", patch)):
            if side % multiple:
                yield Finding(
                    "warn",
                    f"{key} = {side} is not a multiple of {multiple}, as {who} expects",
                    f"use {side // multiple * multiple or multiple}, or let it resize",
                )
    step = student.factor if isinstance(student, LatentStudent) else 1
    step = getattr(getattr(student, "encoder", None), "patch_size", step)
    if recipe.crops.width % step:
        yield Finding(
            "warn", f"crops.width = {recipe.crops.width} is not a multiple of the student's patch, {step}", ""
        )
    if size % step:
        yield Finding("warn", f"crops.size = {size} is not a multiple of the student's patch, {step}", "it will pad")
    if recipe.crops.min_side < size:
        yield Finding("warn", f"crops.min_side = {recipe.crops.min_side} < size = {size}: small regions are enlarged")


def _about_batches(recipe: Recipe) -> Iterator[Finding]:
    train = recipe.train
    fits = [n for n in PROCESSES if train.batch_size % (n * train.accumulate) == 0]
    level: Level = "ok" if fits == list(PROCESSES) else "warn"
    yield Finding(
        level,
        f"train.batch_size = {train.batch_size}, accumulate = {train.accumulate}: trains on "
        f"{', '.join(map(str, fits))} of {', '.join(map(str, PROCESSES))} processes",
        "" if level == "ok" else "make batch_size a multiple of processes x accumulate",
    )


def _about_machine(recipe: Recipe) -> Iterator[Finding]:
    free, limit = machine.shared_memory(), machine.open_files()
    if recipe.train.workers and free is not None:
        line = f"{free / 1e6:,.0f} MB of shared memory free at {machine.SHARED_MEMORY_DIR}"
        remedy = "fewer processes will read, and less ahead; give the container more: docker run --shm-size=8g"
        yield Finding("warn", line, remedy) if free < machine.LOW_MEMORY else Finding("ok", line)
    if limit is not None and limit < 1024:
        yield Finding("warn", f"a process may open only {limit} files", "raise it: ulimit -n 4096")


# --- probes -----------------------------------------------------------------------------------------------------------


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _label_one(recipe: Recipe, images: Images, teachers: Any) -> tuple[Sample, float]:
    """The last of two labelled photos as a sample, and the seconds that it took; the first one warms up."""
    device = build.device(recipe)
    sample, seconds = None, math.nan
    for photo in (images.photos * 2)[:2]:
        start = time.perf_counter()
        sample = label_photo(photo, teachers, crops=recipe.crops, labels=recipe.labels, seed=recipe.run.seed)
        _wait(device)
        seconds = time.perf_counter() - start
    assert sample is not None
    return sample, seconds


def _about_labelling(
    recipe: Recipe, images: Images, sample: Sample, seconds: float, device: torch.device
) -> Iterator[Finding]:
    total = images.count * recipe.crops.crops_per_image
    sample_bytes = sum(len(data) for _, data in encode_sample(sample, codec=recipe.labels.codec))
    maps = sum(1 + (0 if labels.local is None else len(labels.local)) for labels in sample.labels.values())
    if recipe.labels.online:
        yield Finding("ok", f"labels are made during training: {seconds:.2f} s per sample on one {device.type}")
        return
    max_processes = min(images.parts, PROCESSES[-1])
    work = f"{counted(total, 'sample')} of {counted(maps, 'map')}"
    made = len([*build.labels_folder(recipe).glob("*.tar")])
    missing = max(0.0, 1 - made / max(1, images.parts))
    if made:
        yield Finding("ok", f"{counted(made, 'label tar')} are there already; hours and disk below are for the rest")
    yield _time(
        f"labelling {f'{missing:.0%} of ' if made else ''}{images.most} {work} at {1 / seconds:.2f} samples/s: ",
        missing * total * seconds,
        device,
        max_processes,
        "more processes or cards, a smaller teacher, fewer crops.crops_per_image or images.limit",
    )
    if device.type != "cpu" and images.photos:
        cpu_seconds = scaling.labelling_seconds(images.photos[0], sample, recipe.crops, recipe.labels.codec)
        yield scaling.finding("labelling", seconds, cpu_seconds, scaling.cores(), recipe.labels.codec)
    yield _disk(
        "labels",
        build.labels_folder(recipe),
        missing * total * sample_bytes * SPARE,
        f"{sample_bytes / 1e6:.2f} MB per sample",
    )
    if limit := recipe.labels.cache_gb * 1e9:
        traffic = Traffic(tars=images.parts, samples=total, size=float(total * sample_bytes), limit=limit)
        remedy = "raise labels.cache_gb: tars not kept here are fetched again at every visit"
        level: Level = "ok" if traffic.fits else "warn"
        yield Finding(level, traffic.sentence, "" if traffic.fits else remedy)


def _step(recipe: Recipe, student: Student | LatentStudent, sample: Sample, device: torch.device) -> float:
    """Seconds of one optimizer step without data loading: forward, loss, backward; a first one warms up."""
    if isinstance(student, LatentStudent):
        return _latent_step(recipe, student, sample, device)
    # The feature term takes little time, and a second encoder.
    probe_recipe = replace(recipe, loss=recipe.loss.without("feature"))
    settings, objective = build.train_settings(recipe), build.make_objective(probe_recipe, student)
    assert not isinstance(objective, LatentTask)
    micro = max(1, settings.batch_size // settings.accumulate)
    # Time scales with the batch, which may not fit in memory beside a teacher; one sample keeps a CPU busy.
    probe_size = min(micro, 1 if device.type == "cpu" else 4)
    batch = collate([sample] * probe_size)
    student.to(device).train()
    images, labels = batch.images.to(device), next(iter(batch.labels.values())).to(device)
    labels = convert_labels(labels, settings.kind)
    seconds = math.nan
    for _ in range(2):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            pred = student(images)
        objective(pred.float(), labels)[0].mean().backward()
        _wait(device)
        seconds = time.perf_counter() - start
    student.zero_grad(set_to_none=True)
    return seconds * settings.batch_size / probe_size


def _latent_step(recipe: Recipe, student: LatentStudent, sample: Sample, device: torch.device) -> float:
    """The same for a latent network, with ground truth for half of the images and with its VAE, which a cache saves."""
    settings = build.train_settings(recipe)
    probe_recipe = replace(recipe, latent=replace(recipe.latent, cache=False))
    task = build.make_objective(probe_recipe, student)
    assert isinstance(task, LatentTask)
    probe_size = 2
    batch = collate([sample] * probe_size)
    taught = []
    for row, truth in enumerate((True, False)):
        labels = convert_labels(next(iter(batch.labels.values())), settings.kind, True)
        row_labels = replace(labels, shared=labels.shared[row : row + 1], local=None, boxes=labels.boxes[row : row + 1])
        row_labels = replace(row_labels, supervision=replace(row_labels.supervision, truth=truth)).to(device)
        taught.append(TaughtRows(torch.tensor([row], device=device), row_labels, "probe"))
    micro = MicroBatch(batch.keys, batch.images.to(device), tuple(taught), (0, 1), (False, False))
    student.to(device).train()
    if settings.gradient_checkpointing:
        student.set_grad_checkpointing()
    seconds = math.nan
    for _ in range(2):
        start = time.perf_counter()
        task(student, micro, precision=settings.precision).losses.mean().backward()
        _wait(device)
        seconds = time.perf_counter() - start
    student.zero_grad(set_to_none=True)
    return seconds * settings.batch_size / probe_size


def _about_training(
    recipe: Recipe, student: torch.nn.Module, seconds: float, device: torch.device, images: Images
) -> Iterator[Finding]:
    samples = images.learnt * recipe.crops.crops_per_image
    train = in_steps(recipe.train, max(1, round(samples * (1 - recipe.train.val_fraction))))
    held_out = ", less those held out" if train.val_fraction else ""
    an_epoch = f"{images.most} {counted(samples, 'sample')}{held_out}"
    epochs = f" ({train.epochs:g} epochs of {an_epoch})" if train.epochs else ""
    max_processes = max([n for n in PROCESSES if train.batch_size % (n * train.accumulate) == 0], default=1)
    steps = counted(train.steps, "step")
    yield _time(
        f"training {steps} of {train.batch_size}{epochs} at {train.batch_size / seconds:.1f} images/s: ",
        train.steps * seconds,
        device,
        max_processes,
        "more processes or cards, a smaller student or crops.size, fewer train.steps",
    )
    needed = (train.keep_last + 2.0) * checkpoints.bytes_of(student)
    yield _disk("checkpoints", recipe.run.folder, needed, f"{train.keep_last} kept, the best one and one being written")
    if isinstance(student, LatentStudent):
        if kind := latent.mismatched_prediction_type(recipe, student):
            yield Finding(
                "warn",
                f"student.weights: its scheduler says that the network predicts {kind}, but it is trained to predict "
                "velocity, which it must learn from scratch: there is no trajectory to keep",
                "use a base that predicts it (Stable Diffusion 2 or 2.1 of 768 pixels), or set latent.trajectory = 0",
            )
        yield from latent_costs.cost_findings(
            replace(recipe, train=train), student, seconds, device.type.upper(), samples
        )


def _time(what: str, seconds: float, device: torch.device, most: int, remedy: str) -> Finding:
    """How long it takes, judged: fine, worth a second look, or too long even on as many processes as can work."""
    hours = seconds / 3600
    level: Level = "bad" if hours / max(1, most) > TOO_LONG else "warn" if hours > LONG else "ok"
    return Finding(level, f"{what}{_times(seconds, device, most)}", "" if level == "ok" else remedy)


def _times(seconds: float, device: torch.device, max_processes: int) -> str:
    """Device hours, and when 1, 2, 4 and 8 processes with one device each would finish if they started now."""
    ends = []
    for processes in (n for n in PROCESSES if n <= max(1, max_processes)):
        duration = timedelta(seconds=round(seconds / processes))
        ends.append(f"{processes}: {duration} (until {(datetime.now() + duration):%Y-%m-%d %H:%M})")
    return f"{seconds / 3600:.2f} {device.type.upper()}-hours; with processes {', '.join(ends)}"


def _disk(what: str, folder: Path, need: float, why: str) -> Finding:
    free, place = machine.free_disk(folder)
    line = f"{what}: {need / 1e9:.2f} GB needed ({why}), {free / 1e9:.0f} GB free at {place}"
    if need > free:
        return Finding("bad", line, "free some, or put labels.root or run.out on another disk")
    return Finding("warn" if need > 0.8 * free else "ok", line, "it will be tight" if need > 0.8 * free else "")
