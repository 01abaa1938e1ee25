"""Scores as one table of models and benchmarks: for the terminal, for Markdown, for LaTeX.

A column is a metric on one benchmark under one setting, so that all numbers of a column compare; a benchmark that was
scored in two ways has two sets of columns. Models whose kinds differ are aligned differently, as in every paper: the
second column says how. A best is marked where the images tell it apart from all others (eval.intervals); else those
that share the lead are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distill.core.markdown import inline
from distill.core.printable import printable
from distill.eval.intervals import rank_marks
from distill.eval.metrics import MetricRow
from distill.eval.scorefile import Score

DEFAULT = ("abs_rel", "delta1")


@dataclass(frozen=True, slots=True)
class TableCell:
    """A number as text, "-" where there is none. rank: of eval.intervals.rank_marks: 1 best, 2 shares the lead."""

    text: str
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: head, rows of the same length, and a line for every set of columns on how it was made."""

    head: list[str]
    rows: list[list[TableCell]]
    notes: list[str]


def grid(scores: Sequence[Score], metrics: Sequence[str] = DEFAULT) -> Grid:
    """All scores side by side. metrics: those to show; benchmarks that have none of them show their main one."""
    sets = list(dict.fromkeys((s.benchmark, s.protocol.setting) for s in scores))
    models = list(dict.fromkeys((s.model, _special_alignment(s)) for s in scores))
    by_row = {((s.model, _special_alignment(s)), (s.benchmark, s.protocol.setting)): s for s in scores}
    head, columns, notes = ["model", "aligned"], [], []
    for benchmark, setting in sets:
        first = next(s for s in scores if (s.benchmark, s.protocol.setting) == (benchmark, setting))
        title = (
            benchmark
            if sum(name == benchmark for name, _ in sets) == 1
            else f"{benchmark} ({first.protocol.mode}{', offset' if first.protocol.offset_positive else ''})"
        )
        shown = [name for name in metrics if name in first.task.rows] or [first.task.main]
        for metric in shown:
            row = first.task.rows[metric]
            head.append(f"{title} {metric} {'↓' if row.lower_is_better else '↑'}")
            columns.append(_column([by_row.get((model, (benchmark, setting))) for model in models], metric, row))
        notes.append(
            f"{title}: {first.protocol.mode} protocol, {first.count_text}, {first.protocol.pooling}, setting {setting}"
        )
    rows = []
    for i, (model, special) in enumerate(models):
        of_model = [s for s in scores if (s.model, _special_alignment(s)) == (model, special)]
        alignments = (
            ", ".join(dict.fromkeys(s.protocol.alignment for s in of_model if s.protocol.alignment != "none")) or "none"
        )
        rows.append([TableCell(model), TableCell(alignments), *(column[i] for column in columns)])
    return Grid(head, rows, notes)


def _special_alignment(score: Score) -> str:
    """The alignment if it is not the default one of the kind, else ""."""
    usual = score.protocol.with_kind(score.kind).alignment
    return "" if score.protocol.alignment == usual else score.protocol.alignment


def _column(scores: Sequence[Score | None], metric: str, row: MetricRow) -> list[TableCell]:
    values = [None if s is None else s.metrics.get(metric) for s in scores]
    cells = []
    marks = rank_marks(scores, metric, lower_is_better=row.lower_is_better)
    for score, value, rank in zip(scores, values, marks, strict=True):
        text = "-" if value is None else row.format.format(value)
        if score is not None and value is not None and score.num_failed:
            text += f" (without {score.num_failed})"
        cells.append(TableCell(text, rank))
    return cells


def as_text(table: Grid) -> tuple[list[str], list[list[str]]]:
    """Head and rows for a terminal: * stands behind the best, + behind those that share the lead."""
    return table.head, [[cell.text + ("", "*", "+")[cell.rank] for cell in row] for row in table.rows]


def as_markdown(table: Grid) -> str:
    """A pipe table: a best is bold, those that share the lead are underlined."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    marks = ("{}", "**{}**", "<u>{}</u>")
    marked = [[marks[cell.rank].format(inline(cell.text)) for cell in row] for row in table.rows]
    rule = ["---", "---", *("---:" for _ in table.head[2:])]
    notes = "\n".join(f"- {inline(note)}" for note in table.notes)
    return "\n".join([line([inline(cell) for cell in table.head]), line(rule), *map(line, marked)]) + f"\n\n{notes}\n"


def as_latex(table: Grid) -> str:
    """A tabular that needs the package booktabs: a best is bold, those that share the lead are underlined."""
    marks = ("{}", "\\textbf{{{}}}", "\\underline{{{}}}")
    head = " & ".join(_tex(cell) for cell in table.head)
    rows = [" & ".join(marks[cell.rank].format(_tex(cell.text)) for cell in row) + r" \\" for row in table.rows]
    notes = [f"% {printable(note)}" for note in table.notes]
    columns = "ll" + "r" * (len(table.head) - 2)
    body = [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", rf"{head} \\", r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([*notes, *body, r"\end{tabular}"]) + "\n"


_TEX = {c: f"\\{c}" for c in "_&%#{}$"} | {"\\": r"\textbackslash{}", "↓": r"$\downarrow$", "↑": r"$\uparrow$"}
# Behind the \\ that ends a row, [ and * would be read as its options; ^ and ~ are the accents without their letter.
_TEX |= {"[": "{[}", "*": "{*}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in printable(text))
