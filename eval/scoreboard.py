"""Scores as tables: one for each benchmark and setting, since only such numbers compare; the best two are marked.

Behind every table, folded away: the parts of the benchmark, both floors of disparity, remarks on single images, and
the protocol in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from eval.metrics import METRICS
from eval.page import details, missing, name, pairs, table
from eval.score import Score


def scoreboard(scores: Sequence[Score], faults: Sequence[str]) -> str:
    """All score tables; faults are told first."""
    told = "".join(missing(fault) for fault in faults)
    if not scores:
        return told + missing("No scores: run distill score with this run’s recipe.")
    settings = dict.fromkeys((s.benchmark, s.protocol.setting) for s in scores)
    parts = [
        '<p class="key"><span class="best">best</span> and <span class="second">second best</span> of a column; '
        "arrows say which way is better. A mean is over all images of the list. Numbers compare only inside one table: "
        "its rows share everything but the alignment, and each ends with the id of its protocol.</p>"
    ]
    for benchmark, setting in settings:
        group = [s for s in scores if (s.benchmark, s.protocol.setting) == (benchmark, setting)]
        parts.append(_benchmark_table(benchmark, group))
    return told + "".join(parts)


def _benchmark_table(benchmark: str, scores: Sequence[Score]) -> str:
    """All models on one benchmark under one setting, with what lies behind the numbers folded away."""
    first = scores[0]
    head = ["model", *_metric_heads(), "images", "protocol"]
    ranks = {key: _ranks([s.metrics[key] for s in scores], row.lower_is_better) for key, row in METRICS.items()}
    rows = []
    for i, score in enumerate(scores):
        cells = [_number(score.metrics[key], key, ranks[key][i], score) for key in METRICS]
        count = str(score.num_images)
        if score.num_failed:
            count += f' <b class="bad">{score.num_failed} failed</b>'
        model = f"{name(score.model)}<br><small>{escape(score.protocol.alignment)}</small>"
        rows.append([model, *cells, count, f"<code>{score.protocol.id}</code>"])
    folded = details("By part of the benchmark", _group_table(scores))
    folded += details("Under either floor of disparity", _floor_table(scores))
    lines = [(s.model, line) for s in scores for line in s.problems()]
    problems = "".join(f"<li><b>{escape(model)}</b> {escape(line)}</li>" for model, line in lines)
    folded += details(f"Remarks on images ({len(lines)})", f'<ul class="lines">{problems}</ul>' if lines else "")
    protocol = [(k, str(v)) for k, v in first.protocol.as_dict().items() if k != "alignment"]
    folded += details("The protocol in full", f'<dl class="plain">{pairs(protocol)}</dl>')
    title = f"{escape(benchmark)} <small>{escape(first.protocol.mode)} protocol, {first.num_images} images</small>"
    return f"<h3>{title}</h3>{table(head, rows, kind='scores')}{folded}"


def _metric_heads() -> list[str]:
    return [f"{escape(key)}&nbsp;{'↓' if row.lower_is_better else '↑'}" for key, row in METRICS.items()]


def _ranks(values: Sequence[float | None], lower_is_better: bool) -> list[int]:
    """1 for the best, 2 for the second best, 0 for all others; equal values share a rank, one alone has none."""
    known = sorted({v for v in values if v is not None}, reverse=not lower_is_better)
    if sum(v is not None for v in values) < 2:
        return [0] * len(values)
    return [0 if v is None or known.index(v) > 1 else known.index(v) + 1 for v in values]


def _number(value: float | None, metric: str, rank: int = 0, score: Score | None = None) -> str:
    if value is None:
        reason = f"{score.num_failed} images failed, so there is no mean" if score and score.num_failed else "no value"
        return f'<span class="none" title="{reason}">–</span>'
    text = METRICS[metric].format.format(value)
    if score is not None and score.partial:
        text += f'<sup title="without the {score.num_failed} images that failed">−{score.num_failed}</sup>'
    return f'<span class="{("best", "second")[rank - 1]}">{text}</span>' if rank else text


def _group_table(scores: Sequence[Score]) -> str:
    rows = []
    for score in scores:
        for part, group in score.groups.items():
            cells = [_number(group["metrics"].get(metric), metric) for metric in METRICS]
            rows.append([f"{name(score.model)} · {escape(part)}", *cells, str(group["num_images"])])
    return table(["model · part", *_metric_heads(), "images"], rows) if rows else ""


def _floor_table(scores: Sequence[Score]) -> str:
    rows = [
        [f"{name(s.model)} · {escape(floor)}", *(_number(means.get(metric), metric) for metric in METRICS)]
        for s in scores
        for floor, means in s.floors.items()
    ]
    return table(["model · floor", *_metric_heads()], rows) if rows else ""
