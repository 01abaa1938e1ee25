"""Symbolic links under temporary names, as a downloaded folder may have: writing there would write to their target."""

from __future__ import annotations

from pathlib import Path


def unlink_link(path: Path) -> None:
    """Remove `path` if it is a link; its target stays. Raises OSError."""
    if path.is_symlink():
        path.unlink()
