"""The recipes that a user has run here: only these may be run again because a manifest contains them.

Nothing in a folder can prove who wrote it, and a recipe names files, addresses and Python files. So `distill label`
stores the hash of every recipe that it runs, one per line, in $XDG_STATE_HOME/distill/recipes (~/.local/state).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _file() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()) / "distill" / "recipes"


def _hash(recipe: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()


def was_run_here(recipe: Mapping[str, Any]) -> bool:
    """Whether this resolved recipe, as a plain table, has been run here."""
    try:
        return _hash(recipe) in _file().read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return False


def record(recipe: Mapping[str, Any]) -> None:
    """Records that this resolved recipe is run here; if that cannot be written, it will not be known later."""
    if not was_run_here(recipe):
        with contextlib.suppress(OSError):
            _file().parent.mkdir(parents=True, exist_ok=True)
            with _file().open("a", encoding="ascii") as file:
                file.write(_hash(recipe) + "\n")
