"""The top of a report: the verdict on a run in one sentence, and its models' costs beside their scores.

Choosing a model needs both: the table has each model's size, FLOPs, time and memory first, then its main metric on
every benchmark with its interval, and a chart shows score against time. The machines on which time and memory were
measured are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from distill.core.printable import printable
from distill.core.wording import counted
from distill.eval.intervals import FEWEST, distinguishable, mean_interval, rank_marks
from distill.eval.reports import figures
from distill.eval.reports.page import digits, missing, name, short, table
from distill.eval.scorefile import Score

TITLES = {"abs_rel": "AbsRel", "delta1": "δ1", "boundary_f1": "boundary F1", "accuracy": "accuracy"}
PLANE = "plane baseline"
"""The name of the plane baseline in score files."""
_COST_COLUMNS = ("weights", "parameters", "GFLOPs", "ms an image", "memory")


def summary(scores: Sequence[Score]) -> str:
    """The section: sentence, table and chart; a notice if nothing was scored."""
    if not scores:
        return missing("Nothing was scored, so there is no verdict yet.")
    groups = _groups(scores)
    drawn = "".join(score_against_time(group) for group in groups)
    charts = f'<div class="charts">{drawn}</div>' if drawn else ""
    tables = f"<div>{cost_table(scores)}{_cost_note(scores)}</div>"
    return f'<p class="lead">{escape(verdict(scores))}</p><div class="beside">{tables}{charts}</div>'


def _groups(scores: Sequence[Score]) -> list[list[Score]]:
    """Groups of comparable scores: of one benchmark under one setting."""
    keys = dict.fromkeys((s.benchmark, s.protocol.setting) for s in scores)
    return [[s for s in scores if (s.benchmark, s.protocol.setting) == key] for key in keys]


# --- the sentence -----------------------------------------------------------------------------------------------------


def verdict(scores: Sequence[Score]) -> str:
    """One sentence: how good the student is beside the best of the others and the plane baseline, and at what cost.

    It is about the benchmark with the most images; without a student, about the leading model.
    """
    scored = [g for g in _groups(scores) if any(s.metrics.get(s.task.main) is not None for s in g)]
    group = max(scored, key=lambda g: g[0].num_images, default=None)
    if group is None:
        return "No model has a mean: images are missing or could not be scored; see below."
    main = group[0].task.main
    with_mean = [s for s in group if s.metrics.get(main) is not None]
    about = next((s for s in with_mean if s.model == "student"), None) or _leading(with_mean, main)
    others = [s for s in with_mean if s is not about and s.model != PLANE]
    prior = next((s for s in with_mean if s.model == PLANE and s is not about), None)
    parts = [f"On {about.benchmark} ({about.count_text}), {about.model} has {_value(about, main)}"]
    if others:
        parts.append(_against(about, _leading(others, main), main))
    if prior is not None:
        better = _is_better(about, prior, main)
        relation = (
            ("better" if better else "worse") if distinguishable(about, prior, main) else "not clearly better or worse"
        )
        parts.append(f"{relation} than the plane baseline ({_number(prior, main)})")
    if cost := _cost_words(about, others):
        parts.append(cost)
    return ", ".join(parts) + "."


def _leading(scores: Sequence[Score], metric: str) -> Score:
    lower = scores[0].task.rows[metric].lower_is_better
    return min(scores, key=lambda s: (1.0 if lower else -1.0) * float(s.metrics[metric] or 0.0))


def _is_better(first: Score, second: Score, metric: str) -> bool:
    return _leading([first, second], metric) is first


def _number(score: Score, metric: str) -> str:
    return f"{score.metrics[metric]:.3f}"


def _value(score: Score, metric: str) -> str:
    span = mean_interval(score, metric)
    between = f" (95 % interval {span[0]:.3f} to {span[1]:.3f})" if span else ""
    return f"{TITLES.get(metric, metric)} {_number(score, metric)}{between}"


def _against(about: Score, other: Score, metric: str) -> str:
    if not distinguishable(about, other, metric):
        return f"which these images do not tell apart from {other.model}’s {_number(other, metric)}"
    better = "better" if _is_better(about, other, metric) else "worse"
    ours, theirs = float(about.metrics[metric] or 0.0), float(other.metrics[metric] or 0.0)
    by = f"{100 * abs(ours - theirs) / abs(theirs):.0f} % " if theirs else ""
    return f"{by}{better} than {other.model} ({_number(other, metric)})"


def _cost_words(about: Score, others: Sequence[Score]) -> str:
    cost = about.cost or {}
    if not cost.get("latency_s"):
        return ""
    text = f"at {_ms(cost)} ms an image of {cost.get('image', '?')} on {cost.get('device', '?')}"
    rival = _leading(others, about.task.main) if others else None
    theirs = (rival.cost or {}).get("latency_s") if rival else None
    if rival and theirs and (rival.cost or {}).get("device") == cost.get("device"):
        text += f", {digits(cost['latency_s'] / theirs, 2)} times as long as {rival.model}"
    return text


# --- the table --------------------------------------------------------------------------------------------------------


def cost_table(scores: Sequence[Score]) -> str:
    """A row per model: its cost, as far as measured, then its main metric on each benchmark."""
    groups = _groups(scores)
    models = list(dict.fromkeys(s.model for s in scores))
    costs = [cost_cells(cost_of(scores, model)) for model in models]
    known = [i for i in range(len(_COST_COLUMNS)) if any(cells[i] != "–" for cells in costs)]
    head = ["model", *(_COST_COLUMNS[i] for i in known)]
    rows = {model: [name(model), *(cells[i] for i in known)] for model, cells in zip(models, costs, strict=True)}
    for group in groups:
        main, row = group[0].task.main, group[0].task.rows[group[0].task.main]
        head.append(
            f"{escape(group[0].benchmark)}<br>{TITLES.get(main, main)}&nbsp;{'↓' if row.lower_is_better else '↑'}"
        )
        marks = rank_marks(group, main, lower_is_better=row.lower_is_better)
        cells = {s.model: _cell(s, main, mark) for s, mark in zip(group, marks, strict=True)}
        for model in models:
            rows[model].append(cells.get(model, '<span class="none">–</span>'))
    return table(head, rows.values(), kind="scores")


def cost_of(scores: Sequence[Score], model: str) -> Mapping[str, Any]:
    """The fullest measurement of a model's cost among its scores; empty where there is none."""
    costs = [s.cost for s in scores if s.model == model and s.cost]
    return max(costs, key=lambda cost: cost.get("images") or 0, default={})


def cost_cells(cost: Mapping[str, Any]) -> list[str]:
    """The columns _COST as text, "–" if unknown, as are weights and memory of a model without parameters."""
    parameters, flops = cost.get("parameters"), cost.get("flops")
    memory = cost.get("memory_bytes")
    return [
        f"{digits(cost['weight_bytes'] / 1e6)} MB" if parameters and cost.get("weight_bytes") else "–",
        f"{digits(parameters / 1e6)} M" if parameters else "–",
        digits(flops / 1e9) if flops else "–",
        _ms(cost) if cost.get("latency_s") else "–",
        f"{digits(memory / 1e6)} MB" if parameters and memory else "–",
    ]


def _ms(cost: Mapping[str, Any]) -> str:
    return digits(1000 * cost["latency_s"])


def _cell(score: Score, metric: str, mark: int) -> str:
    value, span = score.metrics.get(metric), mean_interval(score, metric)
    if value is None:
        failed = counted(score.num_failed, "image")
        return f'<span class="none" title="{failed} failed">–</span>'
    number_format = score.task.rows[metric].format
    text = number_format.format(value)
    shown = f'<span class="{("best", "second")[mark - 1]}">{text}</span>' if mark else text
    return shown + (f"<br><small>{short(span)}</small>" if span else "")


def _cost_note(scores: Sequence[Score]) -> str:
    costs = {model: cost_of(scores, model) for model in dict.fromkeys(s.model for s in scores)}
    known = {model: cost for model, cost in costs.items() if cost}
    if not known:
        return (
            '<p class="key">The models’ cost was not measured: their maps were stored without it. Delete '
            "predictions/ and score again.</p>"
        )
    setups = dict.fromkeys(f"{cost.get('device', '?')}, images of {cost.get('image', '?')}" for cost in known.values())
    return (
        f'<p class="key">Measured on {escape(printable("; ".join(setups)))}: the median time of single images, the '
        "first one left out; memory: weights and what predicting added, at the peak; weights: as loaded. FLOPs: 2 per "
        f"multiply-add. Below a score its 95 % interval by bootstrap over the images, from {FEWEST} images on.</p>"
    )


# --- the chart --------------------------------------------------------------------------------------------------------


def score_against_time(scores: Sequence[Score]) -> str:
    """A figure of main metric against milliseconds an image; nothing below two models with both."""
    main = scores[0].task.main
    points = [
        (1000 * float(s.cost["latency_s"]), float(s.metrics[main] or 0.0), s.model)
        for s in scores
        if s.cost and s.cost.get("latency_s") and s.cost.get("parameters") and s.metrics.get(main) is not None
    ]
    if len(points) < 2:
        return ""
    arrow = "lower" if scores[0].task.rows[main].lower_is_better else "higher"
    title = f"{scores[0].benchmark}: {TITLES.get(main, main)} against ms an image"
    return figures.scatter(title, points, across="ms", note=f"{arrow} and further left is better")
