"""The table of a study: mean and spread over seeds, the paper's number beside it, verdicts, curves and pictures.

Spread is the sample standard deviation over seeds. The paper's numbers come from other benchmarks and are there for
their order alone; they are never averaged with ours.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from distill.core import files
from distill.core.depth import Kind
from distill.core.plugins import find
from distill.eval.reports import figures, page
from distill.eval.reports.gallery import UNREADABLE, aligned
from distill.eval.score import read_scores
from distill.eval.verdict import Verdict

PICTURES = 3
_WIDTH, _NAME, _ROW = 860, 230, 26

Curves = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class AblationRow:
    """values: by seed, one per column, None where there is none. paper: one per column of the paper, or empty.

    failures: what stopped trainings. curves: by seed and name. folders: of the cells that are done, in seed order.
    """

    name: str
    values: dict[int, list[float | None]]
    paper: Sequence[float]
    failures: Sequence[str]
    curves: Mapping[int, Curves]
    folders: Sequence[Path]

    def means(self) -> dict[int, float | None]:
        """The mean over the columns by seed, None where one is missing."""
        return {
            seed: None if None in row or not row else statistics.fmean(v for v in row if v is not None)
            for seed, row in self.values.items()
        }

    def column(self, i: int) -> list[float]:
        """The values of one column over the seeds that have one."""
        return [v for row in self.values.values() if (v := row[i]) is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A study's result. verdicts: claim, its source, ours, the paper's. benchmarks: label, plug-in, root, list."""

    name: str
    title: str
    source: str
    columns: Sequence[str]
    paper_columns: Sequence[str]
    rows: Sequence[AblationRow]
    verdicts: Sequence[tuple[str, str, Verdict, Verdict]]
    benchmarks: Sequence[tuple[str, str, str, str]]
    made_by: str

    def text(self) -> list[list[str]]:
        """The table as text, the head first; the smallest mean of a column is starred."""
        with_paper = any(row.paper for row in self.rows)
        head = ["", *self.columns, *(f"paper: {name}" for name in self.paper_columns if with_paper)]
        best = [
            min((statistics.fmean(c) for row in self.rows if (c := row.column(i))), default=math.nan)
            for i in range(len(self.columns))
        ]
        lines = [head]
        for row in self.rows:
            cells = [_spread(row.column(i), best[i]) for i in range(len(self.columns))]
            if with_paper:
                cells += [f"{v:.3f}" for v in row.paper] or ["-"] * len(self.paper_columns)
            lines.append([row.name + (" (diverged)" if row.failures else ""), *cells])
        return lines

    def margin(self, verdict: Verdict) -> str:
        """The margin of a verdict with its interval."""
        if not verdict.seeds:
            return verdict.why
        if not math.isfinite(verdict.half_width):
            return f"{verdict.effect:+.1%} ({verdict.why})"
        return f"{verdict.effect:+.1%} ± {verdict.half_width:.1%} ({verdict.seeds} seeds)"

    def as_dict(self) -> dict[str, Any]:
        """All of it but the curves, as JSON would have it."""
        return {
            "name": self.name,
            "title": self.title,
            "source": self.source,
            "made_by": self.made_by,
            "columns": list(self.columns),
            "paper_columns": list(self.paper_columns),
            "rows": [
                {
                    "name": row.name,
                    "values": row.values,
                    "paper": list(row.paper),
                    "failures": list(row.failures),
                    "cells": [str(folder) for folder in row.folders],
                }
                for row in self.rows
            ],
            "orderings": [
                {"claim": claim, "source": source, "here": _plain(ours), "paper": theirs.word}
                for claim, source, ours, theirs in self.verdicts
            ],
        }


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(verdict).items()}


def _spread(values: Sequence[float], best: float) -> str:
    if not values:
        return "-"
    mean = statistics.fmean(values)
    text = f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
    return text + (" *" if mean == best else "")


def markdown(table: Table) -> str:
    """The table and its verdicts in Markdown."""
    lines = [f"### {table.title} ({table.source})", ""]
    head, *body = table.text()
    lines += [_md(head), _md(["---"] * len(head)), *map(_md, body), ""]
    if table.verdicts:
        claims = [[claim, ours.word, table.margin(ours)] for claim, _, ours, _ in table.verdicts]
        lines += [
            _md(["ordering of the paper", "here", "margin, 90 % interval"]),
            _md(["---"] * 3),
            *map(_md, claims),
            "",
        ]
    return "\n".join([*lines, f"{table.name}, {table.made_by}.", ""])


def _md(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace(" *", " **\\***") for cell in cells) + " |"


# --- the page ---------------------------------------------------------------------------------------------------------


def write_page(table: Table, path: Path) -> None:
    """One HTML file that opens offline."""
    head, *body = table.text()
    rows = [[page.name(row[0]), *(_marked(cell) for cell in row[1:])] for row in body]
    key = '<p class="key">Errors: mean over seeds ± standard deviation; the smallest mean of a column is marked.'
    key += (
        " The paper’s numbers are of its own data and benchmarks.</p>" if any(r.paper for r in table.rows) else "</p>"
    )
    lost = [f"{row.name}: {failure}" for row in table.rows for failure in row.failures]
    stopped = (
        page.details(f"{len(lost)} trainings stopped", "".join(f"<p>{escape(line)}</p>" for line in lost))
        if lost
        else ""
    )
    sections = [
        ("table", "Table", page.table([escape(h) for h in head], rows, kind="scores") + key + _dots(table) + stopped)
    ]
    if table.verdicts:
        sentences_of_row = [
            [
                escape(claim),
                f'<b class="{"bad" if ours.word.startswith("not rep") else ""}">{ours.word}</b>',
                escape(table.margin(ours)),
                f"{theirs.effect:+.0%}" if theirs.seeds else "-",
                escape(source),
            ]
            for claim, source, ours, theirs in table.verdicts
        ]
        heads = ["ordering", "here", "margin, 90 % interval", "margin in the paper", "source"]
        note = (
            '<p class="key">The margin by which the claim holds, relative, over paired seeds; negative where it fails. '
            "The paper’s own table has one run per row: a margin, without an interval.</p>"
        )
        sections.append(("orderings", "Orderings", page.table(heads, sentences_of_row) + note))
    sections.append(("curves", "Curves", _curves(table)))
    sections.append(("pictures", "Pictures", _pictures(table)))
    seeds = sorted({seed for row in table.rows for seed in row.values})
    facts = page.pairs([("source", table.source), ("seeds", ", ".join(map(str, seeds))), ("made by", table.made_by)])
    files.write_text(path, page.page(table.title, facts, sections))


def _marked(cell: str) -> str:
    return f'<span class="best">{cell.removesuffix(" *")}</span>' if cell.endswith(" *") else cell


def _dots(table: Table) -> str:
    """Every seed's value of every row, one panel per column."""
    panels = []
    for i, column in enumerate(table.columns):
        values = [v for row in table.rows for v in row.column(i)]
        if not values:
            continue
        low, high = min(values), max(values)
        span = (high - low) or 1.0
        height = _ROW * len(table.rows) + 30

        def px(v: float, low: float = low, span: float = span) -> float:
            return _NAME + (v - low) / span * (_WIDTH - _NAME - 40) + 15

        parts = []
        for k, row in enumerate(table.rows):
            y = _ROW * k + _ROW / 2 + 4
            parts.append(f'<path class="grid" d="M{_NAME} {y}H{_WIDTH}"/>')
            parts.append(f'<text x="{_NAME - 8}" y="{y + 4}" text-anchor="end">{escape(row.name)}</text>')
            values = row.column(i)
            for v in values:
                dot = f'<circle class="s1" cx="{px(v):.1f}" cy="{y}" r="4" fill-opacity=".55">'
                parts.append(f"{dot}<title>{v:.4f}</title></circle>")
            if values:
                mean = px(statistics.fmean(values))
                parts.append(f'<path class="line s2" d="M{mean:.1f} {y - 8}V{y + 8}"/>')
        for v in (low, (low + high) / 2, high):
            parts.append(f'<text x="{px(v):.1f}" y="{height - 6}" text-anchor="middle">{v:.3f}</text>')
        panels.append(
            f'<figure class="chart"><figcaption><b>{escape(column)}</b></figcaption>'
            f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" '
            f'aria-label="{escape(column)} by row and seed">{"".join(parts)}</svg>'
            "<p>a dot per seed, the line is their mean; left is better</p></figure>"
        )
    return "".join(panels)


def _curves(table: Table) -> str:
    """The first six rows' training loss, and the output's scale relative to the labels'."""
    charts = []
    for key, title, note in (
        ("scale", "Scale of the output", "mean deviation of the output over that of the labels, first seed"),
        ("loss", "Training loss", "smoothed, first seed; only rows of one loss compare"),
    ):
        series = []
        for k, row in enumerate(table.rows[:6]):
            points = next(iter(row.curves.values()), {}).get(key, [])
            if points:
                y = figures.smooth([v for _, v in points], 0.9)
                series.append(figures.Series(name=row.name, x=[s for s, _ in points], y=y, colour=k + 1))
        charts.append(figures.chart(title, series, note=note, log=True))
    return (
        f'<div class="charts">{"".join(charts)}</div>' if any(charts) else page.missing("No curves: no cell is done.")
    )


def _pictures(table: Table) -> str:
    """The same views by every row's first seed: the first, the middle and the last of the benchmark."""
    parts = []
    for label, name, root, listed in table.benchmarks:
        try:
            samples = list(find("distill.eval.benchmarks", name).samples(root or None, listed or None))
            shown = _strips(table, label, name, samples)
        except UNREADABLE as error:
            shown = page.missing(f"No pictures of {label}: {error}")
        parts.append(f"<h3>{escape(label)}</h3>{shown}")
    return "".join(parts)


def _strips(table: Table, label: str, name: str, samples: Sequence[Any]) -> str:
    cells = [(row.name, row.folders[0]) for row in table.rows if row.folders]
    scored = [
        (row, f, read_scores(f / "scores" / f"{label}--student.json"))
        for row, f in cells
        if (f / "scores" / f"{label}--student.json").is_file()
    ]
    if not scored:
        return page.missing("No pictures: nothing has been scored.")
    keys = {image.key for image in scored[0][2].images if image.metrics is not None}
    usable = [sample for sample in samples if sample.key in keys]
    parts = []
    for k in np.unique(np.linspace(0, len(usable) - 1, PICTURES).round().astype(int)):
        sample = usable[k]
        photo = (sample.image().clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        truth = sample.truth()
        truth = truth.convert(Kind(f"{truth.kind.unknown}_depth"))
        depth, valid = truth.values[0].numpy(), truth.valid[0].numpy()
        span = figures.depth_span(depth, valid)
        tiles = [figures.tile("image", figures.shrink(photo), photo=True)]
        tiles.append(
            figures.tile(
                "truth", figures.shrink(figures.colourise(figures.nearness(depth, span), valid, figures.NEARNESS))
            )
        )
        for row, folder, score in scored:
            image = next(i for i in score.images if i.key == sample.key)
            pred = aligned(folder / "predictions" / "student" / label / sample.prediction_path, image, score, truth)
            if pred is None or image.metrics is None:
                continue
            picture = figures.colourise(figures.nearness(pred, span), np.ones_like(valid), figures.NEARNESS)
            tiles.append(figures.tile(row, figures.shrink(picture), note=f"{image.metrics['abs_rel']:.3f}"))
        strip = "".join(f"<div>{tile}</div>" for tile in tiles)
        parts.append(f'<h4>{escape(sample.key)}</h4><div class="strip">{strip}</div>')
    return "".join(parts)
