"""The verb compare: which models of a recipe, over which of its images, kept where.

    RUN/compare/MODEL/        maps, settings, card and cost of each model (distill.eval.compare)
    RUN/compare/compare.json  everything that was measured
    RUN/compare.html          the page

The recipe may name any number of teachers; training takes two. The student joins once it is trained, under a name that
carries its revision, so that a student trained on is another model.
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
from distill.core.focal import resized
from distill.core.plugins import file_hashes
from distill.data.corruptions import Corruptions
from distill.data.sources import BadImageError, Entry, Rejected
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.compare import Entrant, ModelComparison, compare, gather, write_comparison
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
    entered = entrants(recipe, samples)
    for entrant in entered:
        with progress(f"predict {entrant.name}") as report:
            gather(entrant, samples, folder, report=report)
    names = [entrant.name for entrant in entered]
    with progress("compare") as report:
        result = compare(names, samples, folder, report=report)
    timed = _timed(recipe, entered)
    remarks = [f"left out {line.origin}: {line.reason}" for line in rejected]
    settings = {"side": recipe.compare.side, "limit": recipe.compare.limit, "left_out": remarks}
    settings |= {"run_time": {name: asdict(took) for name, took in timed.items()}} if timed else {}
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
                for name, t in timed.items()
            ),
        ],
        remarks=remarks,
        again=f"distill compare {recipe.run.folder / 'recipe.toml'}",
    )
    _tell(result, rejected)
    _tell_times(timed)
    say(f"comparison: {path.resolve()}", comparison=str(path.resolve()))
    return path


def _tell(result: ModelComparison, rejected: Sequence[Rejected]) -> None:
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
    for left_out in rejected[:20]:
        note(f"  left out {left_out.origin}: {left_out.reason}")


def _timed(recipe: Recipe, entered: Sequence[Entrant]) -> dict[str, RunTime]:
    """The run time of every model, as the recipe has it; nothing where it is not asked for."""
    size, on, found = recipe.compare.time_at, build.device(recipe), {}
    if not size:
        return {}
    for entrant in entered:
        teacher = entrant.load()
        if getattr(teacher, "card", None) is not None and teacher.card.name != TRUTH:
            with progress(f"time {entrant.name}"):
                # Time does not depend on the camera, but a student of canonical depth asks for one.
                predict: Callable[[Tensor], DepthMap] = teacher.predict
                if isinstance(teacher, CheckpointTeacher) and teacher.takes_focal:
                    predict = partial(teacher.predict, focal=float(size))
                found[entrant.name] = run_time(predict, size, on)
        del teacher  # before the next one takes its memory
    return found


def _tell_times(timed: Mapping[str, RunTime]) -> None:
    if not timed:
        return
    size = next(iter(timed.values())).size
    ours = [
        [name, digits(t.seconds), f"{digits(t.fastest)} to {digits(t.slowest)}", t.device, ""]
        for name, t in timed.items()
    ]
    printed = [
        [p.model, digits(p.seconds), "", p.device, f"{p.paper}, {p.where}"] for p in paper_run_times() if p.size == size
    ]
    head = ["model", "seconds", "range", "device", "from"]
    table(f"run time of one image of {size} x {size} pixels", head, [*ours, *printed])


# --- images -----------------------------------------------------------------------------------------------------------


def chosen_samples(recipe: Recipe) -> tuple[list[BenchmarkSample], list[Rejected]]:
    """The images to compare on, evenly taken from all of the recipe's, and those that cannot be read."""
    shards = input_shards(recipe)
    scans = [(shard.stem, shard.scan()) for shard in shards]
    every = [(stem, entry) for stem, scan in scans for entry in scan.entries]
    rejected = [line for _, scan in scans for line in scan.rejected]
    limit = recipe.compare.limit
    places = np.unique(np.linspace(0, len(every) - 1, min(limit or len(every), len(every))).round().astype(int))
    twice = len({entry.key for _, entry in every}) < len(every)
    samples = []
    for place in places:
        stem, entry = every[int(place)]
        try:
            *_, focal = _view(entry, recipe.compare.side)
        except BadImageError as error:
            rejected.append(Rejected(entry.origin, entry.key, str(error)))
            continue
        key = f"{stem}/{entry.key}" if twice else entry.key
        samples.append(_sample(entry, key, f"{stem}/{entry.key}.npy", recipe.compare.side, focal))
    if not samples:
        first = f" (the first: {rejected[0].origin}: {rejected[0].reason})" if rejected else ""
        raise RecipeError(
            f"none of the recipe's {len(every) or len(rejected)} images can be used{first}; check [[images]]"
        )
    return samples, rejected


def _sample(entry: Entry, key: str, path: str, side: int, focal: float) -> BenchmarkSample:
    told = (lambda: focal) if focal else None
    return BenchmarkSample(key, path, partial(_image, entry, side), partial(_truth, entry, side), focal=told)


@lru_cache(maxsize=128)  # at 640 x 480 not much over 2 MB each; every model, the measures and the page ask for them
def _view(entry: Entry, side: int) -> tuple[Tensor, DepthMap, float]:
    """A photo (3,h,w) uint8 and its truth, its longer side at most `side`; without truth one that is nowhere valid.

    And the focal length in pixels of that size, 0 where nobody knows it.
    """
    photo = entry.load()
    height, width = photo.rgb.shape[1:]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    image, focal = photo.rgb, photo.focal and resized(photo.focal, (height, width), size)
    if size != (height, width):
        image = crops.resize(image[None].float(), *size)[0].round().clamp(0, 255).to(torch.uint8)
    if photo.truth is None:
        nowhere = DepthMap(torch.zeros(1, *size), torch.zeros(1, *size, dtype=torch.bool), Kind.METRIC_DEPTH)
        return image, nowhere, focal
    values, valid = photo.truth.values, photo.truth.valid
    if size != (height, width):
        values = F.interpolate(values[None], size=size, mode="nearest-exact")[0]
        valid = F.interpolate(valid[None].float(), size=size, mode="nearest-exact")[0] > 0.5
    return image, DepthMap(values, valid, photo.truth.kind), focal


def _image(entry: Entry, side: int) -> Tensor:
    return _view(entry, side)[0].float() / 255


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
            continue  # the truth itself takes part wherever an image has one
        table = {"name": spec.name, "weights": spec.weights, "dtype": spec.dtype, "options": spec.options}
        table |= {"files": files} if (files := file_hashes(spec.name)) else {}
        load = partial(_Spoilt, spec, samples) if spec.name == TRUTH else partial(teaching.load_teacher, spec, on=on)
        models.append(Entrant(spec.alias_or_name, load, {**table, **shared}))
    folder = recipe.run.folder / "train" / "student"
    if recipe.compare.student and folder.is_dir():
        revision = revision_of(folder)
        name = f"student-{revision.rpartition(':')[2][:6]}"
        models.append(Entrant(name, partial(build.trained, recipe, on=on), {"revision": revision, **shared}))
    if not models:
        raise RecipeError("there is nothing to compare: add [[teachers]], or train the student first")
    return models


class _Spoilt:
    """The truth spoilt in known ways (distill.data.corruptions) as a model; it has no map of an image without truth."""

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
        """The spoilt truths of `keys`."""
        assert keys is not None and len(keys) == 1
        truth = self.truths[keys[0]]()
        if not truth.valid.any():
            return DepthMap(truth.values, truth.valid, self.card.kind)
        made = self.faults.apply(truth, f"{self.label}.{keys[0]}")
        return DepthMap(made.values, made.valid, self.card.kind)
