"""The report's section on fidelity: the student against each teacher, beside its accuracy, and where they differ."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from distill.eval.reports.gallery import UNREADABLE
from distill.eval.reports.page import missing, table
from distill.eval.score import Score

_SIDE, _EDGE = 300, 44


def fidelity_section(run_dir: Path, scores: Sequence[Score]) -> str:
    """A table row per benchmark and teacher, and a scatter of depths; a notice if nothing was measured."""
    rows, charts = [], []
    for path in sorted((run_dir / "fidelity").glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = [content[key] for key in ("benchmark", "student", "teacher")]
            numbers = [float(content[key]) for key in ("abs_rel", "delta1", "boundary_f1")]
            points = [(float(a), float(b)) for a, b in content["points"]]
        except (*UNREADABLE, KeyError, TypeError) as error:
            return missing(f"{path} cannot be read: {error}.")
        own_abs_rel = {
            s.model: s.metrics.get("abs_rel") for s in scores if s.benchmark == names[0] and s.task.main == "abs_rel"
        }
        accuracy = ["–" if own_abs_rel.get(n) is None else f"{own_abs_rel[n]:.4f}" for n in names[1:]]
        rows.append([*map(escape, names), *(f"{v:.4f}" for v in numbers), *accuracy, str(content["images"])])
        charts.append(scatter(names[0], (names[1], names[2]), points))
    if not rows:
        return missing("No benchmark with dense depth was scored for both a student and a teacher.")
    head = ["benchmark", "student", "teacher", "AbsRel&nbsp;↓", "delta1&nbsp;↑", "boundary&nbsp;F1&nbsp;↑"]
    head += ["student’s AbsRel to the truth", "teacher’s", "images"]
    key = (
        '<p class="key">The student is compared with its teacher, which replaces the truth after its own alignment. '
        "A student close to its teacher but far from the truth is limited by the labels.</p>"
    )
    return key + table(head, rows, kind="scores") + f'<div class="charts">{"".join(charts)}</div>'


def scatter(benchmark: str, models: tuple[str, str], points: Sequence[tuple[float, float]]) -> str:
    """Depths by the first model over those by the second, in metres on logarithmic axes, with the line of agreement.

    points: (second's, first's).
    """
    logs = [(math.log(a), math.log(b)) for a, b in points if a > 0 and b > 0]
    if not logs:
        return ""
    low = min(min(pair) for pair in logs)
    span = (max(max(pair) for pair in logs) - low) or 1.0
    ends = (f"{math.exp(low):.3g}", f"{math.exp(low + span):.3g}")
    placed = [((a - low) / span, (b - low) / span) for a, b in logs]
    note = f"depth across: {models[1]}; upwards: {models[0]}; on the line they agree"
    return _square(f"{models[0]} against {models[1]}, {benchmark}", placed, ends, " m", note)


def agreement(teachers: tuple[str, str], points: Sequence[tuple[float, float]]) -> str:
    """Nearness by two teachers, each pixel a dot (Distill-Any-Depth, Fig. 9, where the second is the ground truth).

    points: (first's, second's), 0 and 1 at the ends of the first's range; values far beyond are drawn at the edge.
    """
    placed = [(min(max(b, -0.05), 1.05), min(max(a, -0.05), 1.05)) for a, b in points]
    if not placed:
        return ""
    note = f"across: {teachers[1]}, fitted to {teachers[0]}; upwards: {teachers[0]}; on the line they agree"
    return _square(f"{teachers[0]} against {teachers[1]}", placed, ("far", "near"), "", note)


def _square(title: str, points: Sequence[tuple[float, float]], ends: tuple[str, str], unit: str, note: str) -> str:
    """Dots in a square whose axes go from 0 to 1, named by their ends, with the diagonal."""

    def place(value: float) -> float:
        return value * (_SIDE - 2 * _EDGE) + _EDGE

    dots = "".join(
        f'<circle class="s1" cx="{place(a):.0f}" cy="{_SIDE - place(b):.0f}" r="1.5" '
        f'style="stroke:none;fill-opacity:.35"/>'
        for a, b in points
    )
    texts = "".join(
        f'<text x="{place(at):.0f}" y="{_SIDE - 12}" text-anchor="middle">{word}{unit}</text>'
        f'<text x="2" y="{_SIDE - place(at) + 4:.0f}">{word}</text>'
        for at, word in zip((0.0, 1.0), ends, strict=True)
    )
    line = f'<path class="line s2" d="M{_EDGE} {_SIDE - _EDGE}L{_SIDE - _EDGE} {_EDGE}"/>'
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b></figcaption>'
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" role="img" aria-label="{escape(title)}">{dots}{line}{texts}</svg>'
        f"<p>{escape(note)}</p></figure>"
    )
