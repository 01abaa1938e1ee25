"""Scores as tables: one per benchmark and setting, since only such numbers are comparable; means have intervals.

A best is marked only where the images tell it apart from all others (eval.intervals).

Collapsed below every table: the parts of the benchmark, both floors of disparity, remarks on single images, and
the protocol in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from distill.core.wording import counted
from distill.eval.intervals import FEWEST, mean_interval, rank_marks
from distill.eval.metrics import MetricRow
from distill.eval.papers import PaperVerdict
from distill.eval.reports.page import details, missing, name, pairs, short, table
from distill.eval.scorefile import Score


def scoreboard(scores: Sequence[Score], faults: Sequence[str]) -> str:
    """All score tables, preceded by the faults."""
    notices = "".join(missing(fault) for fault in faults)
    if not scores:
        return notices + missing("No scores: run distill score with this run’s recipe.")
    settings = dict.fromkeys((s.benchmark, s.protocol.setting) for s in scores)
    parts = [
        '<p class="key"><span class="best">best</span> of a column, if the images distinguish it from every other, '
        'else those that <span class="second">share the lead</span>. Arrows say which way is better. A number is a '
        "mean over all images of the list, below it its 95 % interval by bootstrap over the images "
        f"(from {FEWEST} on); DA-2K’s is over all pairs. A mean in metres is not given where a truth has no metres. "
        "Numbers compare only within one table: its rows share everything but the alignment, and each ends with the id "
        "of its protocol.</p>"
    ]
    for benchmark, setting in settings:
        group = [s for s in scores if (s.benchmark, s.protocol.setting) == (benchmark, setting)]
        parts.append(_benchmark_table(benchmark, group))
    return notices + "".join(parts)


def _benchmark_table(benchmark: str, scores: Sequence[Score]) -> str:
    """All models on one benchmark under one setting, with the details of the numbers collapsed."""
    first = scores[0]
    metrics = first.task.rows
    head = ["model", *_metric_heads(metrics), "images", "protocol"]
    marks = {key: rank_marks(scores, key, lower_is_better=row.lower_is_better) for key, row in metrics.items()}
    rows = []
    for i, score in enumerate(scores):
        cells = [
            _number(score.metrics[key], row, marks[key][i], score) + _span(score, key) for key, row in metrics.items()
        ]
        count = str(score.num_images)
        if score.num_failed:
            count += f' <b class="bad">{score.num_failed} failed</b>'
        model = f"{name(score.model)}<br><small>{escape(score.protocol.alignment)}</small>"
        rows.append([model, *cells, count, f"<code>{score.protocol.id}</code>"])
    folded = details("By part of the benchmark", _group_table(scores))
    folded += details("With either floor of disparity", _floor_table(scores))
    lines = [(s.model, line) for s in scores for line in s.problems()]
    problems = "".join(f"<li><b>{escape(model)}</b> {escape(line)}</li>" for model, line in lines)
    folded += details(f"Remarks on images ({len(lines)})", f'<ul class="lines">{problems}</ul>' if lines else "")
    protocol = [(k, str(v)) for k, v in first.protocol.as_dict().items() if k != "alignment"]
    folded += details("The protocol in full", f'<dl class="plain">{pairs(protocol)}</dl>')
    title = f"{escape(benchmark)} <small>{escape(first.protocol.mode)} protocol, {first.count_text}</small>"
    return f"<h3>{title}</h3>{table(head, rows, kind='scores')}{folded}"


def _metric_heads(rows: Mapping[str, MetricRow]) -> list[str]:
    return [f"{escape(key)}&nbsp;{'↓' if row.lower_is_better else '↑'}" for key, row in rows.items()]


def _number(value: float | None, row: MetricRow, rank: int = 0, score: Score | None = None) -> str:
    failed = counted(score.num_failed, "image") if score else ""
    if value is None:
        reason = f"{failed} failed, so there is no mean" if score and score.num_failed else "no value"
        return f'<span class="none" title="{reason}">–</span>'
    text = row.format.format(value)
    if score is not None and score.partial:
        text += f'<sup title="without the {failed} that failed">−{score.num_failed}</sup>'
    return f'<span class="{("best", "second")[rank - 1]}">{text}</span>' if rank else text


def _span(score: Score, metric: str) -> str:
    """The mean's interval, in a line of its own below it."""
    span = mean_interval(score, metric)
    return "" if span is None else f"<br><small>{short(span)}</small>"


def _group_table(scores: Sequence[Score]) -> str:
    rows = []
    for score in scores:
        for part, group in score.groups.items():
            cells = [_number(group["metrics"].get(metric), row) for metric, row in score.task.rows.items()]
            rows.append([f"{name(score.model)} · {escape(part)}", *cells, str(group["num_images"])])
    return table(["model · part", *_metric_heads(scores[0].task.rows), "images"], rows) if rows else ""


def _floor_table(scores: Sequence[Score]) -> str:
    rows = [
        [f"{name(s.model)} · {escape(floor)}", *(_number(means.get(key), row) for key, row in s.task.rows.items())]
        for s in scores
        for floor, means in s.floors.items()
    ]
    return table(["model · floor", *_metric_heads(scores[0].task.rows)], rows) if rows else ""


def paper_table(verdicts: Sequence[PaperVerdict]) -> str:
    """Published numbers beside ours; those without a comparable score are collapsed. "" if none was run."""
    heads = ["paper", "model", "benchmark", "metric", "paper’s", "ours", "", "why not"]
    run = [v for v in verdicts if v.status != "not run"]
    not_run = [v for v in verdicts if v.status == "not run"]
    if not run:
        return ""
    run_table = table(heads[:-1], [_paper_row(v)[:-1] for v in run], kind="scores")
    counts = ", ".join(f"{sum(v.status == s for v in verdicts)} {s}" for s in ("within", "outside", "not run"))
    intro = (
        f'<p class="key">{len(verdicts)} numbers of the papers: {counts}. Ours is compared with a paper’s only for '
        "the same released weights, Marigold’s protocol, the whole published list and no failed image; the tolerance "
        "is ours, stated in eval/papers.toml.</p>"
    )
    folded = details(
        f"Not run ({len(not_run)})", table(heads, [_paper_row(v) for v in not_run], kind="reasons") if not_run else ""
    )
    return intro + run_table + folded


def _paper_row(verdict: PaperVerdict) -> list[str]:
    number = verdict.number
    marks = {
        "within": '<span class="best">within</span>',
        "outside": '<b class="bad">outside</b>',
        "not run": "not run",
    }
    ours = "–" if verdict.ours is None else f"{verdict.ours:.4f}"
    return [
        f"{escape(number.paper)} <small>{escape(number.where)}</small>",
        escape(number.model) + (f" <small>{escape(number.note)}</small>" if number.note else ""),
        escape(number.benchmark),
        escape(number.metric),
        f"{number.value:.4f} ± {number.tolerance:.4f}",
        ours,
        marks[verdict.status],
        escape(verdict.reason),
    ]
