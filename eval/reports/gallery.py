"""Predictions shown beside their truth: image, truth, and the map and error of every model.

Maps of one image share the colours of its truth, so that they can be compared by eye; predictions are aligned by the
scale and shift of their score. The images are not chosen by hand: the worst, the best, and equal steps between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from distill.core.depth import DepthMap, Kind
from distill.core.plugins import find
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.fit import alignment_plan
from distill.eval.reports import figures
from distill.eval.reports.page import missing
from distill.eval.score import ImageScore, Score
from distill.eval.stored import read_prediction

PICTURES = 4
"""Images shown of each benchmark, unless the recipe sets score.pictures."""
ERROR_SPAN = (0.01, 1.0)
"""Relative errors at the ends of the error maps' scale, which is logarithmic: 30 % and 100 % are not the same black."""
SPARSE = 0.25
"""A truth with a smaller share of valid pixels is laser points, which are enlarged to be visible."""
_MAX_MODELS = 4

UNREADABLE = (OSError, ValueError, LookupError)
"""Errors from missing or damaged input; each becomes a line in the report."""

_TITLES = {"abs_rel": "AbsRel", "boundary_f1": "boundary F1"}

Recipe = Mapping[str, Any]


def gallery(run_dir: Path, recipe: Recipe, scores: Sequence[Score]) -> str:
    """Pictures of every benchmark of the recipe that the run has predictions of, and notices for the others."""
    if not scores:
        return missing("No pictures: nothing has been scored, so there are no stored predictions.")
    parts, pictures = [], int(recipe.get("score", {}).get("pictures", PICTURES))
    for spec in recipe.get("benchmarks", []):
        label = spec.get("alias") or spec.get("name", "")
        selected = [
            s
            for s in scores
            if s.benchmark == spec.get("name") and (run_dir / "predictions" / _slug(s) / label).is_dir()
        ]
        if not selected:
            parts.append(missing(f"No pictures of {label}: no stored predictions in predictions/MODEL/{label}."))
            continue
        try:
            parts.append(_benchmark_pictures(run_dir, spec, label, selected[:_MAX_MODELS], pictures=pictures))
        except UNREADABLE as error:
            parts.append(missing(f"No pictures of {label}: {error}"))
    if not parts:
        return missing("No pictures: the recipe names no benchmarks.")
    ticks = [(0.0, "1 %"), (0.239, "3 %"), (0.5, "10 %"), (0.739, "30 %"), (1.0, "100 %")]
    intro = (
        '<p class="key">Each prediction is aligned to the truth as its score was, and shown in metres in the colours '
        "of that image’s truth; below it, its error relative to the truth.</p>"
    )
    return intro + figures.legend("error", figures.ERROR, ticks, missing="no truth") + "".join(parts)


def _slug(score: Score) -> str:
    return score.model.replace(" ", "_")


def _benchmark_pictures(run_dir: Path, spec: Recipe, label: str, scores: Sequence[Score], *, pictures: int) -> str:
    samples = {
        s.key: s
        for s in find("distill.eval.benchmarks", spec["name"]).samples(
            spec.get("root") or None, spec.get("list") or None
        )
    }
    ranking = next((s for s in scores if s.model == "student"), scores[0])
    main = ranking.task.main
    measured = [(image.metrics[main], image.key) for image in ranking.images if image.metrics is not None]
    best_first = sorted(measured, reverse=not ranking.task.rows[main].lower_is_better)
    ranked = [key for _, key in best_first if key in samples]
    if not ranked:
        return missing(f"No pictures of {label}: no scored image is in the benchmark’s folder.")
    places = np.unique(np.linspace(len(ranked) - 1, 0, min(pictures, len(ranked))).round().astype(int))[::-1]
    order = f" <small>images ordered by {escape(ranking.model)}’s {_TITLES.get(main, main)}, worst first</small>"
    parts = [f"<h3>{escape(label)}{order if len(ranked) > 1 else ''}</h3>"]
    for place in places:
        key, rank = ranked[place], len(ranked) - int(place)
        name = {1: "the worst of", len(ranked): "the best of"}.get(rank, f"number {rank} of")
        position = f" <small>{name} {len(ranked)}</small>" if len(ranked) > 1 else ""
        parts.append(f"<h4>{escape(key)}{position}</h4>")
        parts.append(_strip(run_dir, label, samples[key], scores))
    return "".join(parts)


def _strip(run_dir: Path, label: str, sample: BenchmarkSample, scores: Sequence[Score]) -> str:
    """Image and truth, then each model's prediction over its error, all on one scale."""
    photo = (sample.image().clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    truth = sample.truth()
    if truth.kind.unknown == "affine":
        raise ValueError(f"{sample.key}: its truth cannot be shown as depth, since it is {truth.kind}")
    truth = truth.convert(Kind(f"{truth.kind.unknown}_depth"))
    depth, valid = truth.values[0].numpy(), truth.valid[0].numpy()
    span = figures.depth_span(depth, valid)
    everywhere = np.ones_like(valid)
    drawing = figures.dots(valid) if valid.mean() < SPARSE else figures.Dots()
    note = f"{valid.mean():.1%} of the pixels, drawn larger" if drawing.grown else ""
    columns = [
        figures.tile("image", figures.shrink(photo), photo=True)
        + figures.tile("truth", drawing.picture(figures.nearness(depth, span), valid, figures.NEARNESS), note=note)
    ]
    for score in scores:
        image = next(i for i in score.images if i.key == sample.key)
        pred = aligned(run_dir / "predictions" / _slug(score) / label / sample.prediction_path, image, score, truth)
        if pred is None or image.metrics is None:
            columns.append(f'<p class="missing">{escape(score.model)}: {escape(image.problem or "not scored")}</p>')
            continue
        error = error_position(np.abs(pred - depth) / np.maximum(depth, 1e-9))
        picture = figures.colourise(figures.nearness(pred, span), everywhere, figures.NEARNESS)
        main = score.task.main
        note = f"{_TITLES.get(main, main)} {image.metrics[main]:.3f}"
        columns.append(
            figures.tile(score.model, figures.shrink(picture))
            + figures.tile(f"{score.model}: error", drawing.picture(error, valid, figures.ERROR), note=note)
        )
    columns_html = "".join(f"<div>{column}</div>" for column in columns)
    return f'<div class="strip">{columns_html}</div>{figures.depth_legend(span)}'


def error_position(relative: np.ndarray) -> np.ndarray:
    """Positions on the error scale, not yet clipped: 0 at ERROR_SPAN's low end, 1 at its high end, by the logarithm."""
    low, high = ERROR_SPAN
    return np.log(np.maximum(relative, 1e-12) / low) / np.log(high / low)


def aligned(path: Path, image: ImageScore, score: Score, truth: DepthMap) -> np.ndarray | None:
    """Read a stored prediction as depth, aligned by the scale and shift of its score; None if it was not scored."""
    if image.metrics is None or image.scale is None or image.shift is None:
        return None
    height, width = truth.values.shape[-2:]
    pred = read_prediction(path, (height, width))[0] * np.float32(image.scale) + np.float32(image.shift)
    plan = alignment_plan(score.kind, truth.kind, score.protocol.alignment)
    if plan.fit == "disparity":
        pred = 1.0 / np.maximum(pred, 1e-6)
    low, high = max(score.protocol.min_depth, 1e-6), score.protocol.max_depth
    if score.protocol.clip == "truth" and plan.unknown == "affine":
        selected = truth.values[truth.valid & (truth.values > low) & (truth.values < high)]
        low, high = max(low, float(selected.min())), min(high, float(selected.max()))
    return np.clip(pred, low, high)
