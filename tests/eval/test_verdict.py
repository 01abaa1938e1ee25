"""Effects, intervals and words on values with a known answer, and Student's t against its tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distill.eval.verdict import (
    EQUIVALENT,
    OPPOSITE,
    SAME,
    UNDECIDED,
    UNKNOWN,
    by_image_draws,
    holm,
    interval,
    judge,
    paper_effect,
    quantile,
    two_sided,
)


def rows(**values):
    """A single image in a single column, by row and seed."""
    return {name: {seed: [np.array([v])] for seed, v in enumerate(row)} for name, row in values.items()}


def test_students_t_is_that_of_the_tables():
    for freedom, t in ((1, 6.314), (2, 2.920), (7, 1.895), (30, 1.697)):
        assert quantile(freedom) == pytest.approx(t, abs=1e-3)
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.920 / math.sqrt(3), rel=1e-4))
    assert interval([1.0]) == (1.0, math.inf)
    assert two_sided(2.228, 10) == pytest.approx(0.05, abs=1e-4) and two_sided(0.0, 3) == pytest.approx(1.0)
    assert two_sided(math.inf, 3) == 0.0


def test_the_interval_over_seeds_is_students():
    verdict = judge("better", ["a"], ["b"], rows(a=[0.9, 0.8, 0.7], b=[1.0, 1.0, 1.0]))
    assert verdict.effect == pytest.approx(0.2) and verdict.seeds == 3 and verdict.images == 1
    assert verdict.high - verdict.effect == pytest.approx(2.920 * 0.1 / math.sqrt(3), rel=1e-3)
    assert verdict.p == pytest.approx(two_sided(0.2 / (0.1 / math.sqrt(3)), 2))
    assert verdict.excludes(0.5) and not verdict.excludes(0.1)


@pytest.mark.parametrize(
    ("claim", "first", "second", "word"),
    [
        ("better", [0.10, 0.11, 0.12], [0.20, 0.22, 0.23], SAME),
        ("better", [0.20, 0.22, 0.23], [0.10, 0.11, 0.12], OPPOSITE),
        ("better", [0.10, 0.20, 0.12], [0.11, 0.15, 0.14], UNDECIDED),
        ("better", [0.10], [0.20], UNDECIDED),
        ("better", [0.100, 0.102, 0.101], [0.101, 0.101, 0.101], EQUIVALENT),
        ("close", [0.100, 0.101, 0.102], [0.101, 0.102, 0.101], EQUIVALENT),
        ("close", [0.10, 0.10, 0.10], [0.20, 0.20, 0.21], OPPOSITE),
        ("close", [0.10, 0.20, 0.12], [0.11, 0.15, 0.14], UNDECIDED),
    ],
)
def test_words_of_known_values(claim, first, second, word):
    assert judge(claim, ["a"], ["b"], rows(a=first, b=second), equivalence=0.05).word == word


def test_what_grows_is_better_when_it_is_larger():
    values = rows(a=[0.40, 0.41, 0.42], b=[0.20, 0.21, 0.21])
    assert judge("better", ["a"], ["b"], values, lower_is_better=False).word == SAME
    assert judge("better", ["a"], ["b"], values).word == OPPOSITE


def test_the_weakest_pair_decides_and_is_named_and_pairs_are_within_a_seed():
    values = rows(a=[0.1, 0.2, 0.3], b=[0.11, 0.22, 0.33], c=[0.1, 0.2, 0.3])
    assert judge("better", ["a"], ["b"], values).word == SAME  # 9 % in each seed, though seeds differ by 200 %
    worst = judge("better", ["a"], ["b", "c"], values)
    assert worst.word == EQUIVALENT and worst.pair == ("a", "c")
    assert judge("better", ["a"], ["b"], {"a": rows(a=[1.0])["a"], "b": {1: [np.ones(1)]}}).word == UNKNOWN
    assert judge("better", ["a"], ["gone"], values).word == UNKNOWN


def test_images_widen_the_interval_and_are_drawn_alike_for_both_rows():
    random = np.random.default_rng(1)
    hard = random.uniform(0.5, 2.0, 40)  # images differ fourfold; both rows see them
    values = {
        name: {seed: [hard * factor * (1 + 0.001 * seed)] for seed in range(4)}
        for name, factor in (("a", 0.9), ("b", 1.0))
    }
    same = judge("better", ["a"], ["b"], values)
    assert same.word == SAME and same.high - same.low < 1e-6  # the ratio is one in every image
    uneven = hard * (0.9 + random.normal(0, 0.1, 40))
    values["a"] = {seed: [uneven * (1 + 0.001 * seed)] for seed in range(4)}
    wide = judge("better", ["a"], ["b"], values)
    # The effect is 1 - sum(a) / sum(b): its deviation by the delta method.
    ratio = uneven.sum() / hard.sum()
    deviation = np.sqrt(np.mean((uneven - ratio * hard) ** 2) / 40) / hard.mean()
    assert wide.effect == pytest.approx(1 - ratio)
    assert (wide.high - wide.low) / 2 == pytest.approx(quantile(39) * deviation, rel=0.08)


def test_the_bootstrap_draws_the_same_images_for_all_rows_and_weighs_columns_alike():
    one, two = np.arange(10.0), np.full(3, 5.0)
    drawn = by_image_draws([[[one, two]], [[one * 2, two * 2]]], draws=500)
    assert drawn.shape == (500, 2, 1) and np.allclose(drawn[:, 1], 2 * drawn[:, 0])
    assert drawn[:, 0].mean() == pytest.approx((4.5 + 5.0) / 2, abs=0.05)
    assert drawn[:, 0].std() == pytest.approx(one.std() / math.sqrt(10) / 2, rel=0.1)


def test_a_bound_is_judged_whichever_side_is_better():
    values = rows(a=[0.40, 0.42, 0.41], b=[0.7, 0.7, 0.71], c=[0.3, 0.7, 0.5])
    under = judge("below", ["a"], [], values, bound=0.5, lower_is_better=False)
    assert (under.word, under.pair) == (SAME, ("a", "0.5")) and under.effect == pytest.approx(0.18)
    assert judge("below", ["a", "b"], [], values, bound=0.5).word == OPPOSITE, "the weakest row decides"
    assert judge("above", ["b"], [], values, bound=0.5).word == SAME
    assert judge("above", ["c"], [], values, bound=0.5).word == UNDECIDED
    assert judge("below", ["d"], [], values, bound=0.5).word == UNKNOWN
    assert paper_effect("below", ["a"], [], {"a": 1.0}, ("a", "0.5")) is None


def test_close_to_several_is_as_uncertain_as_to_the_farthest():
    values = rows(a=[1.0] * 4, b=[0.999, 0.9991, 0.9989, 0.999], c=[1.03, 1.045, 1.01, 1.035])
    pairs = {row: judge("close", ["a"], [row], values, equivalence=0.05) for row in "bc"}
    both = judge("close", ["a"], ["b", "c"], values, equivalence=0.05)
    assert both.word == EQUIVALENT and both.pair == ("a", "c") and both.effect == pairs["c"].effect
    # By hand: effects 0.03/1.03 ...; t = (0.05 - mean) / (deviation / 2), three degrees of freedom, one side.
    effects = np.array([0.03 / 1.03, 0.045 / 1.045, 0.01 / 1.01, 0.035 / 1.035])
    t = (0.05 - effects.mean()) / (effects.std(ddof=1) / 2)
    assert both.p == pytest.approx(two_sided(t, 3) / 2) and pairs["b"].p < 1e-6


def test_not_close_is_a_difference_larger_than_the_margin():
    values = rows(a=[1.0] * 4, b=[1.06, 1.065, 1.055, 1.075])
    apart = judge("close", ["a"], ["b"], values, equivalence=0.05)
    # scipy.stats.ttest_1samp([0.06/1.06, ...], 0.05, alternative="greater").pvalue; against 0 it would be 0.0003.
    assert apart.word == OPPOSITE and apart.p == pytest.approx(0.0392543, rel=1e-4)
    turned = judge("close", ["b"], ["a"], values, equivalence=0.05)
    assert turned.word == OPPOSITE and turned.pair == ("b", "a") and turned.p < 0.05


def test_non_inferior_allows_the_margin():
    values = rows(a=[1.02, 1.0, 1.01], b=[1.0, 1.0, 1.0], c=[1.2, 1.21, 1.22], d=[0.7, 1.4, 1.0])
    same = judge("non_inferior", ["a"], ["b"], values)
    assert same.word == SAME and same.effect == pytest.approx(-0.01) and same.p < 0.05
    assert judge("non_inferior", ["c"], ["b"], values).word == OPPOSITE
    assert judge("non_inferior", ["d"], ["b"], values).word == UNDECIDED
    assert judge("non_inferior", ["b"], ["c"], values).word == SAME


def test_a_gap_that_grows():
    values = rows(o1=[0.10, 0.11, 0.10], b1=[0.10, 0.11, 0.10], o2=[0.05, 0.05, 0.05], b2=[0.10, 0.11, 0.10])
    assert judge("gap_grows", ["o1", "o2"], ["b1", "b2"], values).word == SAME
    assert judge("gap_grows", ["o2", "o1"], ["b2", "b1"], values).word == OPPOSITE


def test_the_papers_effect_is_of_the_pair_that_decided():
    paper = {"a": 0.10, "b": 0.20, "c": 0.11}
    assert paper_effect("better", ["a"], ["b", "c"], paper, ("", "")) == pytest.approx(1 / 11)
    assert paper_effect("better", ["a"], ["b", "c"], paper, ("a", "b")) == pytest.approx(0.5)
    assert paper_effect("better", ["a"], ["d"], paper, ("", "")) is None


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5], level=0.1) == [True, True, True, False]  # .025, .033, .05, .1
    assert holm([0.03, 0.04, 0.5], level=0.1) == [True, True, False]
    assert holm([0.04, 0.2, 0.3]) == [False, False, False] and holm([]) == []
