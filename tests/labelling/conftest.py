"""Two tars of photos."""

from __future__ import annotations

import pytest

from tests.labelling.formula import two_tars


@pytest.fixture
def tars(tmp_path):
    return two_tars(tmp_path)
