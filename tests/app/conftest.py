"""Recipes of these tests share their few scenes: each is rendered once per file of tests."""

from __future__ import annotations

import functools

import pytest

from distill.data import scenes


@pytest.fixture(scope="module", autouse=True)
def scenes_drawn_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "render", functools.cache(scenes.render))
        yield
