"""The verdict of runs on a claim: an effect with its interval, one of four words, and whether the paper's effect fits.

Runs of one seed share data, order and random weights, and all runs share the images they are scored on. So an effect
is a relative margin within a seed, and its mean has two sources of uncertainty: the seeds, and the images, which are
bootstrapped with the same draws for both rows. Both variances are added (a seed's runs see all images, so neither
contains the other); the interval is Student's, its degrees of freedom by Welch and Satterthwaite.

    same sign, decided       the interval lies on the claim's side of zero
    opposite, decided        it lies on the other side
    equivalent               it contains zero, and lies within the margin that the study states beforehand
    undecided                none of these

A claim of "non_inferior" (a non-inferiority test) allows the margin: its interval is compared with minus the margin,
not with zero.

The rules are ours; the papers give one run each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

SAME, OPPOSITE = "same sign, decided", "opposite, decided"
EQUIVALENT, UNDECIDED, UNKNOWN = "equivalent", "undecided", "not run"
BOUNDED = ("below", "above")
"""Claims about single rows: each lies below, or above, a number that the study states beforehand."""
CLAIMS = ("better", "non_inferior", "close", "gap_grows", *BOUNDED)
LEVEL = 0.10
"""Intervals are of 90 %; a claim survives a correction at this level."""
DRAWS = 2000

Values = Mapping[str, Mapping[int, Sequence[np.ndarray]]]
"""By row and seed: for every column the values of its images, (n,) float64. A row's value is the mean of its
columns' means."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """effect: the mean relative margin by which the claim holds (negative: fails), within low to high at 90 %.

    pair: the two deciding rows, if a claim is about several. p: the probability of so large an effect by chance; for an
    equivalence, of so small a one if the true effect is the margin, and for its opposite, of so large a one then.
    """

    word: str
    effect: float = math.nan
    low: float = -math.inf
    high: float = math.inf
    seeds: int = 0
    images: int = 0
    p: float = 1.0
    pair: tuple[str, str] = ("", "")
    why: str = ""

    def excludes(self, size: float) -> bool:
        """Whether an effect of this size lies outside the interval."""
        return not self.low <= size <= self.high


# --- Student's t ------------------------------------------------------------------------------------------------------


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by Lentz's continued fraction (DLMF 8.17.22)."""
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny, upper, lower, value = 1e-300, 1.0, 0.0, 1.0
    for k in range(400):
        m = k // 2
        if k == 0:
            term = 1.0
        elif k % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        lower = 1.0 / (1.0 + term * lower or tiny)
        upper = 1.0 + term / upper or tiny
        value *= upper * lower
        if k and abs(1.0 - upper * lower) < 1e-14:
            break
    return front * (value - 1.0) / a


def two_sided(t: float, freedom: float) -> float:
    """The probability that Student's t with `freedom` degrees of freedom is at least as far from zero as `t`."""
    if math.isinf(t):
        return 0.0
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def quantile(freedom: float, level: float = LEVEL) -> float:
    """The t whose two tails together have the probability `level`."""
    low, high = 0.0, 1.0
    while two_sided(high, freedom) > level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > level else (low, middle)
    return high


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its two-sided 90 % t interval; the half width of a single value is infinite."""
    mean, n = sum(differences) / len(differences), len(differences)
    if n == 1:
        return mean, math.inf
    return mean, quantile(n - 1) * math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)


# --- effects ----------------------------------------------------------------------------------------------------------


def margin(first: float, second: float, *, lower_is_better: bool = True) -> float:
    """How much better `first` is than `second`, as a fraction of `second`."""
    return (second - first if lower_is_better else first - second) / second


def by_image_draws(rows: Sequence[Sequence[Sequence[np.ndarray]]], *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Each row's value in each seed (rows, seeds) for `draws` bootstrap samples of the images: (draws, rows, seeds).

    rows: by row and seed the images' values of each column. Every row and seed sees the same drawn images.
    """
    random = np.random.default_rng(seed)
    columns = []
    for column in range(len(rows[0][0])):
        table = np.array([[seeds[column] for seeds in row] for row in rows])  # (rows, seeds, n)
        n = table.shape[-1]
        weights = random.multinomial(n, np.full(n, 1.0 / n), size=draws) / n
        columns.append(np.einsum("dn,rsn->drs", weights, table))
    return np.mean(columns, axis=0)


def _judged(effects: np.ndarray, drawn: np.ndarray | None, images: int, *, claim: str, equivalence: float) -> Verdict:
    """effects: one per seed. drawn: (draws,) their mean under the bootstrap of the images; None for no bootstrap."""
    seeds, mean = len(effects), float(effects.mean())
    if seeds == 1:
        return Verdict(UNDECIDED, mean, seeds=1, images=images, why="one seed decides nothing")
    of_seeds = float(effects.var(ddof=1)) / seeds
    of_images = 0.0 if drawn is None or images < 2 else float(drawn.var(ddof=1))
    total = of_seeds + of_images
    if total == 0.0:
        half, freedom = 0.0, float(seeds - 1)
    else:
        share = of_seeds**2 / (seeds - 1) + (of_images**2 / (images - 1) if of_images else 0.0)
        freedom = total**2 / share
        half = quantile(freedom) * math.sqrt(total)
    low, high = mean - half, mean + half
    inside = -equivalence < low and high < equivalence

    def chance(distance: float) -> float:
        return two_sided(distance / math.sqrt(total), freedom) if total else float(distance == 0.0)

    p = chance(mean)
    # Two one-sided tests: the nearer margin decides.
    p_same = chance(equivalence - abs(mean)) / 2 if abs(mean) < equivalence else 1.0
    if claim == "non_inferior":
        word = SAME if low > -equivalence else OPPOSITE if high < -equivalence else UNDECIDED
        p = chance(mean + equivalence) / 2
        p = p if mean > -equivalence or word == OPPOSITE else 1 - p
    elif claim == "close":
        apart = low > equivalence or high < -equivalence
        word = EQUIVALENT if inside else OPPOSITE if apart else UNDECIDED
        p = chance(abs(mean) - equivalence) / 2 if apart else p_same
    elif low > 0:
        word = SAME
    elif high < 0:
        word = OPPOSITE
    elif inside:
        word, p = EQUIVALENT, p_same
    else:
        word = UNDECIDED
    return Verdict(word, mean, low, high, seeds, images, p)


def judge(
    claim: str,
    first: Sequence[str],
    second: Sequence[str],
    values: Values,
    *,
    lower_is_better: bool = True,
    equivalence: float = 0.05,
    bound: float = 0.0,
) -> Verdict:
    """Judge one claim about rows. It must hold for each pair of `first` and `second`; the weakest decides and is named.

    better: each of `first` is better than each of `second`. non_inferior: none is worse by more than the margin. close:
    they are equivalent. gap_grows: `first` and `second` are paired rows (e.g. by data size); the relative gap of the
    last pair is wider than that of the first pair. below, above: each of `first` is below or above `bound`, whichever
    is better; `second` is empty.
    """
    named = list(dict.fromkeys((*first, *second)))
    seeds = sorted(set.intersection(*(set(values.get(row, {})) for row in named)))
    if missing := [row for row in named if not values.get(row)] or ([] if seeds else ["a common seed"]):
        return Verdict(UNKNOWN, why=f"no value of {', '.join(missing)}")
    place = {row: i for i, row in enumerate(named)}
    table = [[values[row][seed] for seed in seeds] for row in named]
    plain = np.array([[np.mean([c.mean() for c in columns]) for columns in row] for row in table])  # (rows, seeds)
    images = sum(len(column) for column in table[0][0])
    drawn = by_image_draws(table) if images > len(table[0][0]) else None

    def gain(a: str, b: str, of: np.ndarray) -> np.ndarray:
        value_a, value_b = of[..., place[a], :], of[..., place[b], :]
        return (value_b - value_a if lower_is_better else value_a - value_b) / value_b

    def decided(effect: Callable[[np.ndarray], np.ndarray], pair: tuple[str, str] = ("", "")) -> Verdict:
        under = None if drawn is None else effect(drawn).mean(-1)
        return replace(_judged(effect(plain), under, images, claim=claim, equivalence=equivalence), pair=pair)

    if claim == "gap_grows":
        (a, *_, c), (b, *_, d) = first, second
        return decided(lambda of: gain(c, d, of) - gain(a, b, of))
    if claim in BOUNDED:
        sign = 1.0 if claim == "below" else -1.0

        def room(a: str, of: np.ndarray) -> np.ndarray:
            return sign * (bound - of[..., place[a], :]) / bound

        return _weakest([decided(partial(room, a), (a, f"{bound:g}")) for a in first], claim)
    pairs = [(a, b) for a, b in itertools.product(first, second) if a != b]
    return _weakest([decided(partial(gain, a, b), (a, b)) for a, b in pairs], claim)


def _weakest(verdicts: Sequence[Verdict], claim: str) -> Verdict:
    """The verdict that decides; a claim that holds for every pair is as uncertain as its most uncertain one."""
    close = claim == "close"  # the farther apart, the weaker

    def rank(verdict: Verdict) -> tuple[int, float]:
        words = (OPPOSITE, UNDECIDED, EQUIVALENT, SAME)
        return words.index(verdict.word), -abs(verdict.effect) if close else verdict.effect

    worst = min(verdicts, key=rank)
    holds = worst.word == (EQUIVALENT if close else SAME)
    return replace(worst, p=max(v.p for v in verdicts)) if holds else worst


def paper_effect(
    claim: str, first: Sequence[str], second: Sequence[str], paper: Mapping[str, float], pair: tuple[str, str]
) -> float | None:
    """The same effect in a paper's own errors by row: of `pair`, or of its weakest pair; None where it has none."""
    if claim in BOUNDED or any(row not in paper for row in (*first, *second)):
        return None
    if claim == "gap_grows":
        return margin(paper[first[-1]], paper[second[-1]]) - margin(paper[first[0]], paper[second[0]])
    pairs = [pair] if pair[0] else [(a, b) for a, b in itertools.product(first, second) if a != b]
    return min(margin(paper[a], paper[b]) for a, b in pairs)


def holm(chances: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which of several claims survive Holm's step-down correction for their number, at a family-wise error `level`."""
    survives = [False] * len(chances)
    for rank, index in enumerate(sorted(range(len(chances)), key=lambda i: chances[i])):
        if chances[index] > level / (len(chances) - rank):
            break
        survives[index] = True
    return survives
