"""A folder of three samples."""

from __future__ import annotations

import pytest

from tests.shards.samples import make_sample, write


@pytest.fixture
def folder(tmp_path):
    return write(
        tmp_path / "labels", [make_sample("sa_1", seed=1), make_sample("sa_1", 1), make_sample("sa_2", seed=2)]
    )
