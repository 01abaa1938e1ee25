"""A few seconds of `make chaos`, with a fixed seed: damaged files, and kills of labelling and of a download."""

from __future__ import annotations

from random import Random

import pytest

from tests.chaos import fuzz, kills, recipes
from tests.chaos.lab import Lab
from tests.chaos.sweep import Counts, sweep


@pytest.fixture
def counts():
    outcomes = Counts("short")
    yield outcomes
    assert not outcomes.faults, "\n".join(outcomes.faults)
    assert sum(outcomes.kinds.values())


@pytest.mark.parametrize("part", ["photos", "tars", "predictions", "students"])
def test_files_that_went_bad(part, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "STEP", 20)
    world = () if part == "photos" else (tmp_path / part,)
    steps = getattr(fuzz, part)(counts, Random(7), *world)
    next(steps)
    assert {"told", "accepted"} <= counts.kinds.keys()


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Lab(tmp_path / "lab", photos=1, per_tar=2)


def test_labels_that_went_bad_and_labelling_that_is_killed(counts, lab, monkeypatch):
    next(kills.label(counts, Random(7), lab))
    monkeypatch.setattr(fuzz, "STEP", 16)
    next(fuzz.labels(counts, Random(7), lab))


def test_a_download_that_is_killed(counts, tmp_path):
    next(kills.fetch(counts, Random(7), tmp_path / "fetch"))


def test_hostile_values_reach_the_first_second_of_labelling(counts, lab, monkeypatch):
    """tests/app/test_hostile.py loads every key; here labelling runs with a sample of them."""
    monkeypatch.setattr(recipes, "SECONDS", 1.0)
    done = lab.call("label", "r.toml")
    assert done.rc == 0, done.said
    rng, base = Random(7), recipes.read_toml(lab.folder / "r.toml")
    chosen = [(part, key) for part, key in recipes.keys() if recipes.COMMANDS.get(part) == ("label",)]
    items = [
        (f"{part}.{key} = {str(value)[:40]}", ("label", part, key, value))
        for part, key in rng.sample(chosen, 12)
        for value in rng.sample(recipes.HOSTILE, 2)
    ]
    sweep(counts, items, lambda item: recipes.in_folder(lab.folder, base, item), limit=30)
