"""Does a claimed ordering hold? Paired differences over seeds, with a t interval, and one of three words.

Runs of one seed share data, order and random weights, so each claim is judged on the differences within a seed, which
are much less noisy than the values. "within noise" is said of whatever the seeds do not decide; nothing is rounded up.
Values are errors: smaller is better. The rules are ours; the papers give one run each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# One-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
REPRODUCED, NOISE, REFUTED, UNKNOWN = "reproduced", "within noise", "not reproduced", "not run"

Values = Mapping[str, Mapping[int, float]]
"""Error by row and seed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """effect: the relative margin by which the claim holds (negative: fails), its 90 % interval's half width, seeds."""

    word: str
    effect: float = math.nan
    half_width: float = math.nan
    seeds: int = 0
    why: str = ""


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its two-sided 90 % t interval; the half width of a single value is infinite."""
    n = len(differences)
    mean = sum(differences) / n
    if n == 1:
        return mean, math.inf
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return mean, _T95[min(n - 1, len(_T95)) - 1] * math.sqrt(variance / n)


def _better(first: float, second: float, _tolerance: float) -> float:
    return (second - first) / second


def _far_better(first: float, second: float, tolerance: float) -> float:
    return (second - first) / first - tolerance


def _close(first: float, second: float, tolerance: float) -> float:
    return tolerance - abs(first - second) / second


_MARGINS: dict[str, Callable[[float, float, float], float]] = {
    "better": _better,
    "not_worse": _better,
    "far_better": _far_better,
    "close": _close,
}
CLAIMS = (*_MARGINS, "gap_grows")


def judge(
    claim: str, first: Sequence[str], second: Sequence[str], values: Values, *, tolerance: float = 0.0
) -> Verdict:
    """One claim about rows. Every pair of `first` and `second` must hold; the weakest decides.

    better: each of `first` has the smaller error. not_worse: the same, but equal will do. far_better: the error of
    `second` is more than (1 + tolerance) times as large. close: they differ by less than `tolerance`, relatively.
    gap_grows: `first` and `second` are rows in step (by data size, say); the relative gap of the last pair is wider
    than that of the first pair.
    """
    seeds = sorted(set.intersection(*(set(values.get(row, {})) for row in (*first, *second))))
    missing = [row for row in (*first, *second) if not values.get(row)]
    if missing or not seeds:
        return Verdict(UNKNOWN, why=f"no value of {', '.join(missing) or 'a common seed'}")
    if claim == "gap_grows":
        gaps = [[_better(values[a][s], values[b][s], 0.0) for a, b in zip(first, second, strict=True)] for s in seeds]
        return _word(claim, [gap[-1] - gap[0] for gap in gaps])
    margin = _MARGINS[claim]
    verdicts = [
        _word(claim, [margin(values[a][s], values[b][s], tolerance) for s in seeds])
        for a in first
        for b in second
        if a != b
    ]
    return min(verdicts, key=lambda v: ((REFUTED, NOISE, REPRODUCED).index(v.word), v.effect))


def _word(claim: str, differences: Sequence[float]) -> Verdict:
    mean, half = interval(differences)
    if mean + half < 0:
        word = REFUTED
    elif mean - half > 0 or (claim == "not_worse" and mean >= 0 and math.isfinite(half)):
        word = REPRODUCED
    else:
        word = NOISE
    why = "one seed decides nothing" if len(differences) == 1 else ""
    return Verdict(word, mean, half, len(differences), why)
