"""What `distill score` does: predict, store and score every model of a recipe on every benchmark, show the results."""

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
"""The file beside the predicted maps that says what predicting them cost."""


def score_all(recipe: Recipe) -> list[scoring.Score]:
    """The scores of all models on all benchmarks, written to the run's folder and shown as one table."""
    results, remarks = [], []
    models, prior_of = Models(recipe), _Priors(recipe)
    for spec in recipe.benchmarks:
        protocol, samples = build.benchmark(spec)
        scored = models(spec)
        teacher_names = [name for name, _ in scored if name != "student"]
        for name, teacher in scored + prior_of(spec):
            scores, lines = _score_model(recipe, spec, name, teacher, samples, protocol)
            results += scores
            remarks += lines
        if recipe.score.student:
            for name in teacher_names:
                _fidelity(recipe, spec.alias_or_name, name, samples, protocol)
    _show(recipe, results)
    for line in remarks + _scale_errors(results):
        note(line)
    return results


class _Priors:
    """The plane that is scored beside the models on each benchmark; the default plane is fitted once and shared."""

    def __init__(self, recipe: Recipe) -> None:
        self.wanted = recipe.score.plane_prior
        self._fitted: dict[tuple[str, ...], Any] = {}

    def __call__(self, spec: BenchmarkSettings) -> list[tuple[str, Any]]:
        """Its name and the plane; empty if there is none."""
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
    """The scores of a model on a benchmark (two with `edges`), once written; and lines on images without a score."""
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
    return scores, left_out + _failed_images(result, samples, store)


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
    table(
        f"scores of {recipe.run.name} (* best, + not told apart from the best by these images)", *as_text(side_by_side)
    )
    for line in side_by_side.notes:
        note(f"  {line}")


def _scale_errors(results: Sequence[scoring.Score]) -> list[str]:
    """A line for every model whose metric depth was scored without alignment."""
    return [
        f"{result.model} on {result.benchmark}: scale error {result.scale_error:.4f}, without alignment"
        for result in results
        if result.scale_error is not None
    ]


def _predict(
    recipe: Recipe, spec: BenchmarkSettings, name: str, teacher: Any, samples: Sequence[BenchmarkSample], store: Path
) -> dict[str, Any] | None:
    """Predicts and stores a model's missing maps; returns the cost, or the stored cost of earlier maps, if known."""
    settings = {
        "weights": teacher.card.weights,
        "revision": teacher.card.revision,
        "benchmark": spec.alias_or_name,
        **prediction_settings(recipe, name, spec),
    }
    cost_file = store / COST
    try:
        summary = dict(json.loads(cost_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none yet, or damaged: it is measured again
        summary = None
    cost = Cost()
    used = how_used(recipe, name, teacher, spec)
    with progress(f"predict {spec.alias_or_name} {name}") as report:
        done = scoring.predict(
            cost.timed(cost.attach(teacher)), samples, store, settings=settings, used=used, report=report, tell=note
        )
    if done:
        summary = cost.summary(summary)
        files.write_json(cost_file, summary)
    return summary


def _fidelity(
    recipe: Recipe, benchmark: str, teacher: str, samples: Sequence[BenchmarkSample], protocol: Protocol
) -> None:
    """Writes the student's distance to a teacher to RUN/fidelity/BENCHMARK--TEACHER.json, and prints it in a line."""
    predictions = recipe.run.folder / "predictions"
    teacher_maps = predictions / teacher.replace(" ", "_") / benchmark
    measures = fidelity(predictions / "student" / benchmark, teacher_maps, samples, protocol)
    if measures is None:
        return
    path = recipe.run.folder / "fidelity" / f"{benchmark}--{teacher.replace(' ', '_')}.json"
    files.write_json(path, {"benchmark": benchmark, "student": "student", "teacher": teacher, **measures})
    note(
        f"  {benchmark}: student against {teacher}: AbsRel {measures['abs_rel']:.3f}, delta1 {measures['delta1']:.3f}, "
        f"boundary F1 {measures['boundary_f1']:.3f}"
    )


def _failed_images(result: scoring.Score, samples: Sequence[BenchmarkSample], store: Path) -> list[str]:
    """Which images could not be scored, why, and what to do; empty if all could."""
    failures = [
        f"  {store / sample.prediction_path}: {image.problem}"
        for sample, image in zip(samples, result.images, strict=True)
        if image.failed
    ]
    if not failures:
        return []
    count = f"{len(failures)} of {len(samples)} images of {result.benchmark} could not be scored for {result.model}"
    omitted = [f"  and {len(failures) - 20} more"] if len(failures) > 20 else []
    remedy = "  fix the benchmark's files and delete the maps that are named above, then score again"
    return [f"{count}; no mean", *failures[:20], *omitted, remedy]
