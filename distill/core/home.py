"""Paths below a home directory, as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def home_expanded(path: Path | str) -> Path:
    """The path with a leading "~" or "~user" expanded; one without a known home stays as it is, like any odd name."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (Path's raises RuntimeError then)
