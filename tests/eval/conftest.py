"""A folder of predictions."""

from __future__ import annotations

import numpy as np
import pytest

from tests.eval.known_maps import noisy


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "store"
    (folder / "part").mkdir(parents=True)
    for i in range(5):
        np.save(folder / f"part/pred_{i:02d}.npy", noisy(i))
    return folder
