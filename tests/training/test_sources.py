"""Weighted sources: each has its share of the stream and a stream of its own, whoever asks and from wherever."""

from __future__ import annotations

from collections import Counter

import pytest

from distill.training import sampling
from distill.training.sampling import BLOCK, Order, make_order, source_shares
from tests.training.toys import Toys, assert_same_run, run, settings, steps_of

INDICES = list(range(2, 32))
SOURCES = [0] * 22 + [1] * 6 + [2] * 4


def order(*, weights=(), temperature=1.0, seed=3, indices=INDICES) -> Order:
    return make_order(indices, SOURCES, seed=seed, weights=weights, temperature=temperature)


def stream(one: Order, first: int, last: int) -> list[int]:
    return [place.index for step in range(first, last) for place in one.batch(step, 8)]


def test_nothing_said_is_the_order_that_there_was():
    for weights in ((), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0)):
        assert order(weights=weights) == Order(tuple(INDICES), 3)


def test_a_share_is_images_times_weight_to_the_power_of_one_over_the_temperature():
    assert source_shares([8, 2], [1.0, 1.0], 1.0) == (0.8, 0.2)
    assert source_shares([8, 2], [1.0, 4.0], 1.0) == (0.5, 0.5)
    assert source_shares([9, 1], [1.0, 1.0], 2.0) == (0.75, 0.25)
    assert source_shares([9, 1], [1.0, 9.0], 2.0) == (0.5, 0.5)


@pytest.mark.parametrize("given", [{"weights": (1.0, 2.0, 5.0)}, {"temperature": 3.0}])
def test_every_block_gives_each_source_its_share_and_no_sample_twice_before_all(given):
    one = order(**given)
    shares = dict(zip((0, 1, 2), (share for _, share in one.sources), strict=True))
    seen = stream(one, 0, 3 * BLOCK // 8)
    for block in range(3):
        counts = Counter(SOURCES[index] for index in seen[block * BLOCK : (block + 1) * BLOCK])
        assert all(abs(counts[source] - BLOCK * share) <= 1 for source, share in shares.items())
    for source, count in ((0, 20), (1, 6), (2, 4)):
        own = [index for index in seen if SOURCES[index] == source]
        epochs = [own[i : i + count] for i in range(0, len(own) - count, count)]
        assert all(len({*epoch}) == count for epoch in epochs) and epochs[0] != epochs[1]


def test_a_source_of_less_than_a_place_in_a_block_still_has_its_turn():
    """A quarter of a place: about one block of 16 in four has one."""
    rare = Order((0, 1), 3, (((0,), 63 / 64), ((1,), 1 / 64)), block=16)
    assert sum(stream(rare, 0, 160)) == pytest.approx(160 * 8 / 64, abs=8)


def test_any_place_can_be_asked_for_first():
    """What a resumed run sees far into the stream is what the run that got there saw."""
    whole = stream(order(temperature=2.0), 0, 600)
    sampling._starts.cache_clear()
    sampling._dealt.cache_clear()
    assert stream(order(temperature=2.0), 590, 600) == whole[590 * 8 :]
    assert stream(order(temperature=2.0, seed=4), 590, 600) != whole[590 * 8 :]


def test_a_source_of_no_weight_is_not_learnt_from():
    one = order(weights=(1.0, 0.0, 1.0))
    assert {SOURCES[index] for index in stream(one, 0, 200)} == {0, 2} and len(one.indices) == 24
    with pytest.raises(ValueError, match="every source of images has weight 0"):
        order(weights=(0.0, 0.0, 0.0))


def test_settings_refuse_a_temperature_and_weights_that_mean_nothing():
    with pytest.raises(ValueError, match="source_temperature must be finite and above 0, not 0.0; a source's weight"):
        settings(source_temperature=0.0, source_weights=(1.0, -1.0))


class Sourced(Toys):
    """Toys whose last third comes from another source."""

    def __init__(self) -> None:
        super().__init__()
        self.sources = [0] * 16 + [1] * 8


def test_a_weighted_run_does_not_know_how_it_was_cut_or_stopped(tmp_path):
    given = {"source_weights": (1.0, 4.0), "source_temperature": 2.0, "steps": 12, "save_every": 5}
    run(tmp_path / "whole", dataset=Sourced(), **given)
    run(tmp_path / "parts", dataset=Sourced(), accumulate=4, workers=1, **given)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")

    class Stop(Exception):
        pass

    def report(done, total, **numbers):
        if done == 8:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "cut", dataset=Sourced(), report=report, **given)
    run(tmp_path / "cut", dataset=Sourced(), **given)
    assert steps_of(tmp_path / "cut") == steps_of(tmp_path / "whole")
    with pytest.raises(ValueError, match="source_weights"):
        run(tmp_path / "whole", dataset=Sourced(), **(given | {"source_weights": (1.0, 1.0)}))
