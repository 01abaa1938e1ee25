"""Published numbers beside those measured here: within tolerance, outside, or not run.

One of our numbers is compared with a paper's only if everything that both depend on is the same: Marigold's protocol,
on the whole published list, with the alignment of the prediction's kind, no image lost, the released weights of the
row, and those weights used as there: resized by their authors' rule, at the row's size, with its steps and its
ensemble, in its number format. Anything else is "not run", with the reason. The numbers are data (eval/papers.toml),
with their place in the paper and the tolerance of a repetition.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from distill.core.plugins import find, names
from distill.core.wording import counted
from distill.eval.scorefile import Score

_FILE = Path(__file__).with_name("papers.toml")
_TABLE = ("paper", "number", "title", "metrics", "unit", "digits", "protocol", "row")
_RUN_SETTINGS = ("native_size", "steps", "ensemble")
_ROW = ("model", "weights", "note", "dtype", *_RUN_SETTINGS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperNumber:
    """One number of a paper. value: a share, not per cent. tolerance: how far ours may be from it. weights: the row's
    released ones, () if there are none. protocol: "marigold", or why none of ours matches. required_settings: the
    teacher's (resize, native_size, steps, ensemble) and dtype. note: how it was run.
    """

    paper: str
    where: str
    model: str
    benchmark: str
    metric: str
    value: float
    tolerance: float
    weights: tuple[str, ...]
    protocol: str
    required_settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True)
class PaperVerdict:
    """A paper's number with ours, if a comparable one exists; reason: why there is none."""

    number: PaperNumber
    status: Literal["within", "outside", "not run"]
    ours: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Scored:
    """A score and how it was predicted. weights: "" if unknown. used: their settings (resize, native_size, steps,
    ensemble, dtype), {} if unknown.
    """

    score: Score
    weights: str = ""
    used: Mapping[str, Any] = field(default_factory=dict)


@cache
def paper_numbers() -> tuple[PaperNumber, ...]:
    """Every number of eval/papers.toml, in its order; raises ValueError naming an inconsistent row."""
    content = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    results = []
    for table in content["table"]:
        where = f"{table['paper']}, {table['number']}"
        unknown = set(table) - set(_TABLE)
        if unknown:
            raise ValueError(f"{_FILE.name}: {where}: unknown key {', '.join(sorted(unknown))}")
        for row in table["row"]:
            results += _row_numbers(table, row, content["tolerance"])
    return tuple(results)


def _row_numbers(table: dict[str, Any], row: dict[str, Any], tolerances: dict[str, Any]) -> list[PaperNumber]:
    where = f"{table['paper']}, {table['number']}, {row['model']}"
    known = names("distill.eval.benchmarks")
    results = []
    for benchmark, values in row.items():
        if benchmark in _ROW:
            continue
        if benchmark not in known or len(values) != len(table["metrics"]):
            raise ValueError(
                f"{_FILE.name}: {where}: {benchmark} is not a benchmark or does not have {len(table['metrics'])} values"
            )
        for metric, printed in zip(table["metrics"], values, strict=True):
            value = float(printed) * table["unit"]
            tolerance = tolerances[metric]
            margin = tolerance.get("relative", 0.0) * value + tolerance.get("absolute", 0.0)
            results.append(
                PaperNumber(
                    paper=table["paper"],
                    where=table["number"],
                    model=row["model"],
                    benchmark=benchmark,
                    metric=metric,
                    value=value,
                    tolerance=margin + 0.5 * 10.0 ** -table["digits"] * table["unit"],
                    weights=tuple(row.get("weights", ())),
                    protocol=table["protocol"],
                    required_settings=_required_settings(row, benchmark),
                    note=row.get("note", ""),
                )
            )
    return results


def _required_settings(row: dict[str, Any], benchmark: str) -> dict[str, Any]:
    """The settings of a row of released weights on a benchmark; by default the authors' resizing, float32."""
    stated = {key: row[key] for key in (*_RUN_SETTINGS, "dtype") if key in row}
    settings = {key: value[benchmark] if isinstance(value, dict) else value for key, value in stated.items()}
    return {"resize": "native", "dtype": "float32"} | settings


def verdicts(scored: Sequence[Scored], numbers: Sequence[PaperNumber] | None = None) -> list[PaperVerdict]:
    """A verdict on every number of the papers, from the first score that is comparable with it."""
    return [_verdict(number, scored) for number in (paper_numbers() if numbers is None else numbers)]


def _verdict(number: PaperNumber, scored: Sequence[Scored]) -> PaperVerdict:
    if not number.weights:
        return PaperVerdict(number, "not run", reason="the row names no released weights")
    candidates = [
        candidate
        for candidate in scored
        if candidate.score.benchmark == number.benchmark and _same_weights(candidate.weights, number)
    ]
    if not candidates:
        return PaperVerdict(number, "not run", reason="no score of these weights on this benchmark")
    reasons = [_obstacle(candidate, number) for candidate in candidates]
    for candidate, obstacle in zip(candidates, reasons, strict=True):
        ours = candidate.score.metrics.get(number.metric)
        if not obstacle and ours is not None:
            within = abs(ours - number.value) <= number.tolerance + 1e-9
            return PaperVerdict(number, "within" if within else "outside", ours)
    return PaperVerdict(number, "not run", reason=reasons[0])


def _same_weights(weights: str, number: PaperNumber) -> bool:
    scored = weights.rstrip("/").lower()
    return bool(scored) and any(
        scored == known.lower() or scored.endswith("/" + known.lower()) for known in number.weights
    )


def _obstacle(scored: Scored, number: PaperNumber) -> str:
    """Why this score is not comparable with the number, or ""."""
    score = scored.score
    published = find("distill.eval.benchmarks", number.benchmark).PROTOCOL
    if number.protocol != "marigold":
        return f"the protocol of the paper's number is {number.protocol}"
    if score.protocol.mode != "marigold":
        return f"scored by the {score.protocol.mode} protocol"
    if score.protocol.list_sha256 != published.list_sha256:
        return f"scored on {score.protocol.num_images} images that are not the published list"
    if score.protocol.alignment != published.with_kind(score.kind).alignment:
        return f"aligned differently: {score.protocol.alignment}"
    if score.protocol.offset_positive:
        return "fitted with --offset-positive, which the published protocol does not use"
    if score.num_failed:
        return f"{counted(score.num_failed, 'image')} failed"
    if not scored.used:
        return "how the maps were predicted (size, steps, format) is not recorded"
    differences = [
        f"{key} {scored.used.get(key, 'unknown')}, not {expected}"
        for key, expected in number.required_settings.items()
        if scored.used.get(key) != expected
    ]
    return f"predicted differently: {'; '.join(differences)}" if differences else ""
