"""Recipes of these tests share their few scenes, each rendered once, and the benchmark's are small."""

from __future__ import annotations

import functools

import pytest

from distill.data import scenes
from distill.eval.benchmarks import scenes as benchmark

drawn = functools.cache(scenes.render)


def small(seed: int) -> scenes.View:
    return drawn(seed, size=(48, 64) if seed % 4 == 3 else (56, 56))


@pytest.fixture(scope="module", autouse=True)
def scenes_drawn_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "render", drawn)
        patch.setattr(benchmark, "_view", small)
        yield
