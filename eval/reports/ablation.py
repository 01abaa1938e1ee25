"""The table of a study: the labels' quality, mean and spread over seeds beside the paper's, claims, curves, pictures.

Spread is the sample standard deviation over seeds. The paper's numbers come from other benchmarks and are shown only
for their order; they are never averaged with ours.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from distill.core import files
from distill.core.depth import Kind
from distill.core.markdown import inline
from distill.core.plugins import find
from distill.core.wording import counted
from distill.eval.labels import LabelQuality
from distill.eval.reports import figures, page
from distill.eval.reports.gallery import UNREADABLE, aligned
from distill.eval.score import read_scores
from distill.eval.verdict import EQUIVALENT, OPPOSITE, SAME, UNDECIDED, UNKNOWN, Verdict, holm

PICTURES = 3
WORDS = (SAME, OPPOSITE, EQUIVALENT, UNDECIDED, UNKNOWN)
NOTE = (
    "The effect is the relative margin by which the claim holds within a seed; its interval covers the spread over "
    "seeds and, by a bootstrap, over images. A claim about several rows is as good as its weakest pair, which is "
    "named. The paper’s own table has one run per row: a margin, without an interval."
)
_WIDTH, _NAME, _ROW = 860, 230, 26

Curves = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class AblationRow:
    """values: by seed, one per column, None if missing. paper: one per column of the paper, or empty.

    failures: why trainings stopped. curves: by seed and name. folders: of the finished cells, in seed order.
    """

    name: str
    values: dict[int, list[float | None]]
    paper: Sequence[float]
    failures: Sequence[str]
    curves: Mapping[int, Curves]
    folders: Sequence[Path]

    def column(self, i: int) -> list[float]:
        """The values of one column over the seeds that have one."""
        return [v for row in self.values.values() if (v := row[i]) is not None]


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of a paper, in one metric. paper: the effect in the paper's own numbers, if they are of this metric.

    survives: whether it is still decided after Holm's correction for all claims of the table. bounded: whether it
    compares with a number instead of other rows.
    """

    text: str
    source: str
    metric: str
    ours: Verdict
    paper: float | None
    survives: bool
    bounded: bool = False

    @property
    def effect_text(self) -> str:
        """The effect with its interval."""
        ours = self.ours
        if not ours.seeds:
            return ours.why
        if not math.isfinite(ours.low):
            return f"{ours.effect:+.1%} ({ours.why})"
        between = "beside" if self.bounded else "over"
        pair = f", {ours.pair[0]} {between} {ours.pair[1]}" if ours.pair[0] else ""
        return f"{ours.effect:+.1%} [{ours.low:+.1%}, {ours.high:+.1%}] ({counted(ours.seeds, 'seed')}{pair})"

    @property
    def paper_text(self) -> str:
        """The paper's effect, and whether the interval here excludes it."""
        if self.paper is None:
            return "-"
        if not math.isfinite(self.ours.low):
            return f"{self.paper:+.1%}"
        return f"{self.paper:+.1%}, {'excluded' if self.ours.excludes(self.paper) else 'not excluded'}"

    def cells(self) -> list[str]:
        """Its row in the table of claims."""
        return [
            self.text,
            self.metric,
            self.paper_text,
            self.effect_text,
            self.ours.word,
            "yes" if self.survives else "no",
        ]


CLAIM_HEAD = ["claim", "in", "paper’s effect", "here, 90 % interval", "verdict", "survives Holm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A study's result. lower_is_better: by column. labels: the quality of the teachers' labels, by row.

    benchmarks: label, plug-in, root, list.
    """

    name: str
    title: str
    source: str
    columns: Sequence[str]
    lower_is_better: Sequence[bool]
    paper_columns: Sequence[str]
    rows: Sequence[AblationRow]
    claims: Sequence[Claim]
    labels: Sequence[tuple[str, LabelQuality]]
    equivalence: float
    benchmarks: Sequence[tuple[str, str, str, str]]
    made_by: str

    def text(self) -> list[list[str]]:
        """The table as text, the head first; the best mean of a column is starred."""
        with_paper = any(row.paper for row in self.rows)
        head = ["", *self.columns, *(f"paper: {name}" for name in self.paper_columns if with_paper)]
        best = [
            (min if lower else max)(
                (statistics.fmean(c) for row in self.rows if (c := row.column(i))), default=math.nan
            )
            for i, lower in enumerate(self.lower_is_better)
        ]
        lines = [head]
        for row in self.rows:
            cells = [_spread(row.column(i), best[i]) for i in range(len(self.columns))]
            if with_paper:
                cells += [f"{v:.3f}" for v in row.paper] or ["-"] * len(self.paper_columns)
            lines.append([row.name + (" (diverged)" if row.failures else ""), *cells])
        return lines

    def label_text(self) -> list[list[str]]:
        """The quality of the teachers' labels as text, the head first."""
        lines = [["labels by", "of", "AbsRel", "boundary F1", "maps"]]
        for name, q in self.labels:
            lines.append([name, q.context, f"{q.abs_rel:.3f}", f"{q.boundary_f1:.3f}", str(q.maps)])
        return lines

    def verdict_line(self) -> str:
        """The number of claims, their verdicts, and how many survive a correction for their number."""
        words = Counter(claim.ours.word for claim in self.claims)
        counts = ", ".join(f"{words[word]} {word}" for word in WORDS if words[word])
        robust = sum(claim.survives for claim in self.claims)
        return (
            f"{counted(len(self.claims), 'claim')}: {counts}. {robust} survive Holm’s correction for their number "
            f"(family error 10 %). Equivalent: within {self.equivalence:.0%}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything except the curves, as plain JSON values."""
        return {
            "name": self.name,
            "title": self.title,
            "source": self.source,
            "made_by": self.made_by,
            "columns": list(self.columns),
            "paper_columns": list(self.paper_columns),
            "equivalence": self.equivalence,
            "labels": [{"rows": name, **asdict(quality)} for name, quality in self.labels],
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
            "claims": [
                {
                    "claim": c.text,
                    "source": c.source,
                    "metric": c.metric,
                    "here": _plain(c.ours),
                    "paper": c.paper,
                    "excluded": c.paper is not None and c.ours.excludes(c.paper),
                    "survives": c.survives,
                }
                for c in self.claims
            ],
        }


def joint_holm_line(tables: Sequence[Table]) -> str:
    """A line on how many claims of several studies survive a correction for their total number."""
    decided = [claim for table in tables for claim in table.claims if claim.ours.word != UNKNOWN]
    survive = holm([claim.ours.p for claim in decided])
    count = sum(survives and claim.ours.word != UNDECIDED for claim, survives in zip(decided, survive, strict=True))
    names = ", ".join(table.name for table in tables)
    return (
        f"{names}: of {counted(len(decided), 'claim')} that were run {count} survive Holm’s correction for all of them."
    )


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(verdict).items()}


def _spread(values: Sequence[float], best: float) -> str:
    if not values:
        return "-"
    mean = statistics.fmean(values)
    text = f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
    return text + (" *" if mean == best else "")


def markdown(table: Table) -> str:
    """The labels, the table and its claims in Markdown."""
    lines = [f"### {inline(table.title)} ({inline(table.source)})", ""]
    parts = [table.label_text()] if table.labels else []
    for head, *body in [*parts, table.text()]:
        lines += [_md(head), _md(["---"] * len(head)), *map(_md, body), ""]
    if table.claims:
        claims = [claim.cells() for claim in table.claims]
        lines += [
            _md(CLAIM_HEAD),
            _md(["---"] * len(CLAIM_HEAD)),
            *map(_md, claims),
            "",
            inline(table.verdict_line()),
            "",
        ]
    return "\n".join([*lines, f"{inline(table.name)}, {inline(table.made_by)}.", ""])


def _md(cells: Sequence[str]) -> str:
    return "| " + " | ".join(inline(cell).replace(" *", " **\\***") for cell in cells) + " |"


# --- the page ---------------------------------------------------------------------------------------------------------


def write_page(table: Table, path: Path) -> None:
    """Write the table as one HTML file that opens offline."""
    head, *body = table.text()
    rows = [[page.name(row[0]), *(_marked(cell) for cell in row[1:])] for row in body]
    key = '<p class="key">Mean over seeds ± standard deviation; the best mean of a column is marked.'
    key += (
        " The paper’s numbers are of its own data and benchmarks.</p>" if any(r.paper for r in table.rows) else "</p>"
    )
    failures = [f"{row.name}: {failure}" for row in table.rows for failure in row.failures]
    stopped = (
        page.details(f"{len(failures)} trainings stopped", "".join(f"<p>{escape(line)}</p>" for line in failures))
        if failures
        else ""
    )
    label_rows = [[page.name(cells[0]), *map(escape, cells[1:])] for cells in table.label_text()[1:]]
    labels = (
        page.table([*map(escape, table.label_text()[0])], label_rows, kind="scores")
        if label_rows
        else page.missing("The labels’ quality is unknown: no unaltered truth was stored with them.")
    )
    sections = [
        ("labels", "The teachers’ own labels", labels),
        ("table", "Table", page.table([escape(h) for h in head], rows, kind="scores") + key + _dots(table) + stopped),
    ]
    if table.claims:
        lines = [
            [
                f'<b class="{"bad" if c.ours.word == OPPOSITE else ""}">{escape(v)}</b>' if i == 4 else escape(v)
                for i, v in enumerate(c.cells())
            ]
            for c in table.claims
        ]
        note = f'<p class="key">{escape(table.verdict_line())} {NOTE}</p>'
        sections.append(("claims", "Claims", page.table(CLAIM_HEAD, lines) + note))
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
        low, high, side = min(values), max(values), "left" if table.lower_is_better[i] else "right"
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
            f'<div style="overflow-x:auto"><svg viewBox="0 0 {_WIDTH} {height}" style="min-width:600px" role="img" '
            f'aria-label="{escape(column)} by row and seed">{"".join(parts)}</svg></div>'
            f"<p>a dot per seed, the line is their mean; {side} is better</p></figure>"
        )
    return "".join(panels)


def _curves(table: Table) -> str:
    """The first six rows' training loss, and the output's scale relative to the labels'."""
    charts = []
    for key, title, note in (
        ("scale", "Scale of the output", "mean deviation of the output over that of the labels, first seed"),
        ("loss", "Training loss", "smoothed, first seed; only rows with the same loss are comparable"),
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
            shown = _strips(table, label, samples)
        except UNREADABLE as error:
            shown = page.missing(f"No pictures of {label}: {error}")
        parts.append(f"<h3>{escape(label)}</h3>{shown}")
    return "".join(parts)


def _strips(table: Table, label: str, samples: Sequence[Any]) -> str:
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
