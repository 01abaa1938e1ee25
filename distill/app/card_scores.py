"""Scores and costs for a student's card, of the student and of its teachers, as its run measured them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.eval.reports.page import digits
from distill.eval.scorefile import Score, read_scores


def scored(folder: Path, revision: str) -> dict[str, list[dict[str, str]]]:
    """The "scores" and "cost" of a card, a row per model; empty if no run around RUN/train/student has scored it.

    revision: teachers.revision_of(folder); benchmarks scored with other weights, before the student was trained again,
    are left out, the teachers' rows included.
    """
    run = folder.parent.parent
    scores: list[Score] = []
    for path in sorted((run / "scores").glob("*--student.json")):
        alias = path.name.removesuffix("--student.json")
        settings_file = run / "predictions" / "student" / alias / "settings.json"
        predicted_with = (
            json.loads(settings_file.read_text(encoding="utf-8"))["settings"] if settings_file.is_file() else {}
        )
        if predicted_with.get("revision") == revision:
            others = sorted(p for p in (run / "scores").glob(f"{alias}--*.json") if p != path)
            scores += [read_scores(p) for p in (path, *others)]
    costs = {score.model: score.cost for score in reversed(scores) if score.cost and score.cost.get("parameters")}
    rows = [
        _cost_row(model, dict(costs[model] or {})) for model in dict.fromkeys(s.model for s in scores) if model in costs
    ]
    card = {"scores": [_score_row(score) for score in scores], "cost": rows}
    return {key: value for key, value in card.items() if value}


def _score_row(score: Score) -> dict[str, str]:
    metrics = {key: score.metrics[key] for key in ("abs_rel", "delta1") if key in score.metrics}
    shown = {key: "-" if value is None else f"{value:.4f}" for key, value in (metrics or score.metrics).items()}
    if score.scale_error is not None:
        shown["scale_error"] = f"{score.scale_error:.4f}"
    about = {"images": str(score.num_images), "protocol": score.protocol.id}
    return {"model": score.model, "benchmark": score.benchmark, **shown, **about}


def _cost_row(model: str, cost: dict[str, Any]) -> dict[str, str]:
    def number(key: str, scale: float) -> str:
        return digits(cost[key] * scale, 4).replace(",", "") if cost.get(key) else "-"

    return {
        "model": model,
        "M parameters": number("parameters", 1e-6),
        "MB as loaded": number("weight_bytes", 1e-6),
        "GFLOPs": number("flops", 1e-9),
        "ms an image": number("latency_s", 1e3),
        "MB of memory": number("memory_bytes", 1e-6),
        "image": str(cost.get("image", "-")),
        "measured on": str(cost.get("device", "-")),
    }
