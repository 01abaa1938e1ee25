"""What several parts know of folders on disk: the file that marks a latent network, and the student that ships."""

from __future__ import annotations

from pathlib import Path

LATENT = "distill.json"
"""The file in a latent network's folder that says what it is, from whom it learnt, and under which licence."""
POCKET = "pocket"
"""The name of the student that ships with the project."""


def pocket() -> Path:
    """The folder of the student that ships with the project."""
    return Path(__file__).parents[1] / "assets" / POCKET
