"""The compare command: which models of a recipe it compares, on which images, and where results are stored.

    RUN/compare/MODEL/        maps, settings, card and cost of each model (distill.eval.compare)
    RUN/compare/compare.json  everything that was measured
    RUN/compare.html          the page

The recipe may name any number of teachers; training takes at most two. The student takes part once it is trained, under
a name with its revision, so that after further training it is another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.app import build, teaching
from distill.app.console import note, progress, say, table
from distill.app.inputs import input_shards
from distill.app.kept_recipe import kept_recipe
from distill.app.recipe import Recipe
from distill.app.strict import RecipeError
from distill.core import crops
from distill.core.depth import DepthMap, Kind
from distill.core.division import unit_range
from distill.core.focal import resized
from distill.core.plugins import file_hashes
from distill.data.corruptions import Corruptions
from distill.data.sources import BadImageError, Entry, Rejected
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.compare import Entrant, ModelComparison, compare, predict_missing, write_comparison
from distill.eval.reports.compare_page import sentences, write_page
from distill.eval.reports.page import digits
from distill.eval.timing import RunTime, paper_run_times, run_time
from distill.labelling.run import TRUTH
from distill.teachers import Card, revision_of
from distill.teachers._settings import TeacherSettings
from distill.teachers.checkpoint import Teacher as CheckpointTeacher


def run_compare(recipe: Recipe) -> Path:
    """Predicts what is missing, measures, and writes the page; returns its path."""
    with kept_recipe(recipe):
        return _compare(recipe)


def _compare(recipe: Recipe) -> Path:
    folder = recipe.run.folder / "compare"
    samples, rejected = chosen_samples(recipe)
    models = entrants(recipe, samples)
    for entrant in models:
        with progress(f"predict {entrant.name}") as report:
            predict_missing(entrant, samples, folder, report=report)
    names = [entrant.name for entrant in models]
    with progress("compare") as report:
        result = compare(names, samples, folder, report=report)
    run_times = _run_times(recipe, models)
    remarks = [f"left out {line.origin}: {line.reason}" for line in rejected]
    settings = {"side": recipe.compare.side, "limit": recipe.compare.limit, "left_out": remarks}
    settings |= {"run_time": {name: asdict(t) for name, t in run_times.items()}} if run_times else {}
    write_comparison(result, folder / "compare.json", more=settings)
    path = write_page(
        result,
        samples,
        folder,
        recipe.run.folder / "compare.html",
        title=recipe.run.name,
        facts=[
            ("longer side", f"at most {recipe.compare.side} pixels"),
            ("images’ licence", recipe.labels.licence),
            *(
                (f"run time of {name} at {t.size} × {t.size}", f"{digits(t.seconds)} s ({t.device})")
                for name, t in run_times.items()
            ),
        ],
        remarks=remarks,
        again=f"distill compare {recipe.run.folder / 'recipe.toml'}",
    )
    _print_agreement(result, rejected)
    _print_run_times(run_times)
    say(f"comparison: {path.resolve()}", comparison=str(path.resolve()))
    return path


def _print_agreement(result: ModelComparison, rejected: Sequence[Rejected]) -> None:
    rows = [
        [
            row["a"],
            row["b"],
            *("-" if row[key] is None else f"{row[key]:.3f}" for key in ("error", "order", "edges", "sky")),
        ]
        for row in result.pairs
    ]
    table("agreement", ["model", "with", "error", "order", "edges", "sky"], rows)
    for line in sentences(result):
        say(line)
    note_left_out(rejected)


def note_left_out(rejected: Sequence[Rejected]) -> None:
    """Logs the first images that could not be used, with the reasons."""
    for line in rejected[:20]:
        note(f"  left out {line.origin}: {line.reason}")


def _run_times(recipe: Recipe, entered: Sequence[Entrant]) -> dict[str, RunTime]:
    """The run time of every model at the size compare.time_at; empty if the recipe does not ask for it."""
    size, on, times = recipe.compare.time_at, build.device(recipe), {}
    if not size:
        return {}
    for entrant in entered:
        teacher = entrant.load()
        if getattr(teacher, "card", None) is not None and teacher.card.name != TRUTH:
            with progress(f"time {entrant.name}"):
                # Time does not depend on the focal length, but a student of canonical depth needs one.
                predict: Callable[[Tensor], DepthMap] = teacher.predict
                if isinstance(teacher, CheckpointTeacher) and teacher.takes_focal:
                    predict = partial(teacher.predict, focal=float(size))
                times[entrant.name] = run_time(predict, size, on)
        del teacher  # before the next one takes its memory
    return times


def _print_run_times(timed: Mapping[str, RunTime]) -> None:
    if not timed:
        return
    size = next(iter(timed.values())).size
    our_rows = [
        [name, digits(t.seconds), f"{digits(t.fastest)} to {digits(t.slowest)}", t.device, ""]
        for name, t in timed.items()
    ]
    paper_rows = [
        [p.model, digits(p.seconds), "", p.device, f"{p.paper}, {p.where}"] for p in paper_run_times() if p.size == size
    ]
    head = ["model", "seconds", "range", "device", "from"]
    table(f"run time of one image of {size} x {size} pixels", head, [*our_rows, *paper_rows])


# --- images -----------------------------------------------------------------------------------------------------------


def chosen_samples(recipe: Recipe) -> tuple[list[BenchmarkSample], list[Rejected]]:
    """The images to compare on, spread evenly over the recipe's, and those that cannot be read."""
    shards = input_shards(recipe)
    scans = [(shard.stem, shard.scan()) for shard in shards]
    entries = [(stem, entry) for stem, scan in scans for entry in scan.entries]
    rejected = [line for _, scan in scans for line in scan.rejected]
    limit = recipe.compare.limit
    indices = np.unique(np.linspace(0, len(entries) - 1, min(limit or len(entries), len(entries))).round().astype(int))
    repeated_keys = len({entry.key for _, entry in entries}) < len(entries)
    samples = []
    for index in indices:
        stem, entry = entries[int(index)]
        try:
            *_, focal = _view(entry, recipe.compare.side)
        except BadImageError as error:
            rejected.append(Rejected(entry.origin, entry.key, str(error)))
            continue
        key = f"{stem}/{entry.key}" if repeated_keys else entry.key
        samples.append(_sample(entry, key, f"{stem}/{entry.key}.npy", recipe.compare.side, focal))
    if not samples:
        first = f" (the first: {rejected[0].origin}: {rejected[0].reason})" if rejected else ""
        raise RecipeError(
            f"none of the recipe's {len(entries) or len(rejected)} images can be used{first}; check [[images]]"
        )
    return samples, rejected


def _sample(entry: Entry, key: str, path: str, side: int, focal: float) -> BenchmarkSample:
    get_focal = (lambda: focal) if focal else None
    return BenchmarkSample(key, path, partial(_image, entry, side), partial(_truth, entry, side), focal=get_focal)


@lru_cache(maxsize=128)  # little over 2 MB each at 640 x 480; every model, the measures and the page read them
def _view(entry: Entry, side: int) -> tuple[Tensor, DepthMap, float]:
    """A photo (3,h,w) uint8, its longer side at most `side`, its ground truth, and its focal length in those pixels.

    Without truth the map is nowhere valid; an unknown focal length is 0.
    """
    photo = entry.load()
    height, width = photo.rgb.shape[1:]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    image, focal = photo.rgb, photo.focal and resized(photo.focal, (height, width), size)
    if size != (height, width):
        image = crops.resize(image[None].float(), *size)[0].round().clamp(0, 255).to(torch.uint8)
    if photo.truth is None:
        no_truth = DepthMap(torch.zeros(1, *size), torch.zeros(1, *size, dtype=torch.bool), Kind.METRIC_DEPTH)
        return image, no_truth, focal
    values, valid = photo.truth.values, photo.truth.valid
    if size != (height, width):
        values = F.interpolate(values[None], size=size, mode="nearest-exact")[0]
        valid = F.interpolate(valid[None].float(), size=size, mode="nearest-exact")[0] > 0.5
    return image, DepthMap(values, valid, photo.truth.kind), focal


def _image(entry: Entry, side: int) -> Tensor:
    return unit_range(_view(entry, side)[0])


def _truth(entry: Entry, side: int) -> DepthMap:
    return _view(entry, side)[1]


# --- models -----------------------------------------------------------------------------------------------------------


def entrants(recipe: Recipe, samples: Sequence[BenchmarkSample]) -> list[Entrant]:
    """The recipe's teachers in their order, and its student where it is trained. Raises RecipeError."""
    teaching.check_teachers(recipe)
    on = build.device(recipe)
    sources = [{k: v for k, v in asdict(table).items() if v and k != "limit"} for table in recipe.images]
    shared = {"side": recipe.compare.side, "images": sources, "seed": recipe.run.seed}
    models = []
    for spec in recipe.teachers:
        if spec.name == TRUTH and not spec.options:
            continue  # uncorrupted truth is compared anyway, wherever an image has it
        table = {"name": spec.name, "weights": spec.weights, "dtype": spec.dtype, "options": spec.options}
        table |= {"files": files} if (files := file_hashes(spec.name)) else {}
        load = (
            partial(_CorruptedTruth, spec, samples)
            if spec.name == TRUTH
            else partial(teaching.load_teacher, spec, on=on)
        )
        models.append(Entrant(spec.alias_or_name, load, {**table, **shared}))
    folder = recipe.run.folder / "train" / "student"
    if recipe.compare.student and folder.is_dir():
        revision = revision_of(folder)
        name = f"student-{revision.rpartition(':')[2][:6]}"
        models.append(
            Entrant(name, partial(build.trained_student_teacher, recipe, on=on), {"revision": revision, **shared})
        )
    if not models:
        raise RecipeError("there is nothing to compare: add [[teachers]], or train the student first")
    return models


class _CorruptedTruth:
    """A model that predicts corrupted truth (distill.data.corruptions); nowhere valid for an image without truth."""

    def __init__(self, spec: TeacherSettings, samples: Sequence[BenchmarkSample]) -> None:
        self.faults = Corruptions(**spec.options)
        self.truths = {sample.key: sample.truth for sample in samples}
        self.label = spec.alias_or_name
        self.card = Card(
            name="truth",
            weights="the images' own truth",
            kind=Kind.AFFINE_DISPARITY,
            licence="that of the images",
            code_licence="Apache-2.0",
            commercial=False,
            revision=repr(self.faults),
            source="ours",
            note="ground truth with controlled errors, for experiments",
            seeded=True,
        )

    def predict(self, images: Tensor, *, keys: Sequence[str] | None = None) -> DepthMap:
        """The corrupted truth of the one key in `keys`."""
        assert keys is not None and len(keys) == 1
        truth = self.truths[keys[0]]()
        if not truth.valid.any():
            return DepthMap(truth.values, truth.valid, self.card.kind)
        corrupted = self.faults.apply(truth, f"{self.label}.{keys[0]}")
        return DepthMap(corrupted.values, corrupted.valid, self.card.kind)
