"""Two tars of photos; scenes are rendered once."""

from __future__ import annotations

import pytest

from distill.data import scenes
from tests.labelling.formula import two_tars


@pytest.fixture(scope="module", autouse=True)
def scenes_drawn_once():
    with scenes.cached_views():
        yield


@pytest.fixture
def tars(tmp_path):
    return two_tars(tmp_path)
