"""What `distill score` does: every model of a recipe on every benchmark, predicted, stored, scored and told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.app import build
from distill.app.console import note, progress, table, values
from distill.app.recipe import Recipe
from distill.app.scoring import Models, how_used, prediction_settings
from distill.core import files
from distill.eval import score as scoring
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.cost import Cost
from distill.eval.fidelity import fidelity
from distill.eval.protocol import Protocol
from distill.eval.reports.tables import as_text, grid
from distill.eval.settings import BenchmarkSettings

COST = "cost.json"
"""What predicting cost, beside the maps that were predicted."""


def score_all(recipe: Recipe) -> list[scoring.Score]:
    """The scores of all models on all benchmarks, written to the run's folder and shown as one table."""
    results, remarks = [], []
    models, prior_of = Models(recipe), _Priors(recipe)
    for spec in recipe.benchmarks:
        protocol, samples = build.benchmark(spec)
        scored = models(spec)
        taught_by = [name for name, _ in scored if name != "student"]
        for name, teacher in scored + prior_of(spec):
            made, lines = _score_model(recipe, spec, name, teacher, samples, protocol)
            results += made
            remarks += lines
        if recipe.score.student:
            for name in taught_by:
                _fidelity(recipe, spec.alias_or_name, name, samples, protocol)
    _show(recipe, results)
    for line in remarks + _scale_errors(results):
        note(line)
    return results


class _Priors:
    """The plane that is scored beside the models, benchmark by benchmark; the default is the same for all of them."""

    def __init__(self, recipe: Recipe) -> None:
        self.wanted = recipe.score.plane_prior
        self._fitted: dict[tuple[str, ...], Any] = {}

    def __call__(self, spec: BenchmarkSettings) -> list[tuple[str, Any]]:
        """Its name and itself, or nothing where there is none."""
        if not self.wanted:
            return []
        fitted_on = (spec.name, spec.root, spec.prior) if spec.prior else ()
        if fitted_on not in self._fitted:
            samples = build.prior_samples(spec)
            self._fitted[fitted_on] = scoring.fit_plane(samples) if samples else None
        plane = self._fitted[fitted_on]
        return [] if plane is None else [("plane baseline", plane)]


def _score_model(
    recipe: Recipe,
    spec: BenchmarkSettings,
    name: str,
    teacher: Any,
    samples: Sequence[BenchmarkSample],
    protocol: Protocol,
) -> tuple[list[scoring.Score], list[str]]:
    """The scores of a model on a benchmark (two with `edges`), written; and lines about what could not be scored."""
    slug = name.replace(" ", "_")
    store = recipe.run.folder / "predictions" / slug / spec.alias_or_name
    cost = _predict(recipe, spec, name, teacher, samples, store)
    result = scoring.score(
        store, None, samples, protocol, alignment=spec.alignment, offset_positive=spec.offset_positive, model=name
    )
    result = replace(result, cost=cost)
    scoring.write_scores(result, recipe.run.folder / "scores" / f"{spec.alias_or_name}--{slug}.json")
    scores = [result]
    if spec.edges:
        scores.append(scoring.score(store, None, samples, protocol.of_edges(), model=name))
        scoring.write_scores(scores[1], recipe.run.folder / "scores" / f"{spec.alias_or_name}.edges--{slug}.json")
    left_out = [f"{name} on {spec.alias_or_name}: {result.left_out}"] if result.left_out else []
    return scores, left_out + _lost(result, samples, store)


def _show(recipe: Recipe, results: Sequence[scoring.Score]) -> None:
    for result in results:
        values(
            model=result.model,
            benchmark=result.benchmark,
            protocol=result.protocol.id,
            metrics=result.metrics,
            images=result.num_images,
            failed=result.num_failed,
            cost=result.cost,
        )
    side_by_side = grid(results)
    table(f"scores of {recipe.run.name} (* best, + these images do not tell who is)", *as_text(side_by_side))
    for line in side_by_side.notes:
        note(f"  {line}")


def _scale_errors(results: Sequence[scoring.Score]) -> list[str]:
    """A line for every model whose metres were scored as they are."""
    return [
        f"{one.model} on {one.benchmark}: scale error {one.scale_error:.4f}, without alignment"
        for one in results
        if one.scale_error is not None
    ]


def _predict(
    recipe: Recipe, spec: BenchmarkSettings, name: str, teacher: Any, samples: Sequence[BenchmarkSample], store: Path
) -> dict[str, Any] | None:
    """Predicts and stores what is missing of one model; what that cost, or did when the maps were made, if known."""
    settings = {
        "weights": teacher.card.weights,
        "revision": teacher.card.revision,
        "benchmark": spec.alias_or_name,
        **prediction_settings(recipe, name, spec),
    }
    kept = store / COST
    try:
        before = dict(json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none yet, or damaged: it is only measured again
        before = None
    cost = Cost()
    used = how_used(recipe, name, teacher, spec)
    with progress(f"predict {spec.alias_or_name} {name}") as report:
        done = scoring.predict(
            cost.timed(cost.of(teacher)), samples, store, settings=settings, used=used, report=report, tell=note
        )
    if done:
        before = cost.summary(before)
        files.write_json(kept, before)
    return before


def _fidelity(
    recipe: Recipe, benchmark: str, teacher: str, samples: Sequence[BenchmarkSample], protocol: Protocol
) -> None:
    """Writes how far the student is from a teacher, RUN/fidelity/BENCHMARK--TEACHER.json, and says it in a line."""
    predictions = recipe.run.folder / "predictions"
    theirs = predictions / teacher.replace(" ", "_") / benchmark
    found = fidelity(predictions / "student" / benchmark, theirs, samples, protocol)
    if found is None:
        return
    path = recipe.run.folder / "fidelity" / f"{benchmark}--{teacher.replace(' ', '_')}.json"
    files.write_json(path, {"benchmark": benchmark, "student": "student", "teacher": teacher, **found})
    note(
        f"  {benchmark}: student against {teacher}: AbsRel {found['abs_rel']:.3f}, delta1 {found['delta1']:.3f}, "
        f"boundary F1 {found['boundary_f1']:.3f}"
    )


def _lost(result: scoring.Score, samples: Sequence[BenchmarkSample], store: Path) -> list[str]:
    """Which images could not be scored, why, and what to do; nothing where all could."""
    files = [
        f"  {store / sample.prediction_path}: {image.problem}"
        for sample, image in zip(samples, result.images, strict=True)
        if image.failed
    ]
    if not files:
        return []
    count = f"{len(files)} of {len(samples)} images of {result.benchmark} could not be scored for {result.model}"
    more = [f"  and {len(files) - 20} more"] if len(files) > 20 else []
    way_out = "  fix the benchmark's files that are named, delete the maps that are, and score again"
    return [f"{count}; no mean", *files[:20], *more, way_out]
