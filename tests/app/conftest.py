"""Recipes of these tests share a few scenes, each rendered once; the benchmark's scenes are small."""

from __future__ import annotations

import functools

import pytest

from distill.data import scenes
from distill.eval.benchmarks import scenes as benchmark
from distill.eval.cost import _Timed

drawn = functools.cache(scenes.render)


def small(seed: int, size: tuple[int, int]) -> scenes.View:
    """A view of the benchmark, but smaller than asked."""
    return drawn(seed, size=(48, 64) if seed % 4 == 3 else (56, 56))


@pytest.fixture(scope="module", autouse=True)
def scenes_drawn_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "render", drawn)
        patch.setattr(benchmark, "_view", small)
        yield


@pytest.fixture
def uncounted(monkeypatch):
    """Scoring counts no FLOPs, half of tiny networks' time; test_commands.py and test_every_recipe.py count them."""
    monkeypatch.setattr(_Timed, "_counted", lambda self, images, more: self.teacher.predict(images, **more))
