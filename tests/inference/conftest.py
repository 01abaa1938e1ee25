"""A folder of photos."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    ramp = np.tile(np.arange(0, 160, 4, dtype=np.uint8), (30, 1))
    for name in ("a.png", "a.jpg", "sub/b.png"):
        Image.fromarray(np.stack([ramp, ramp * 0, ramp * 0], -1)).save(folder / name)
    return folder
