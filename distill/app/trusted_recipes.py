"""Which recipes a person has run here: only those may be run again because a manifest carries them.

Nothing in a folder can prove who wrote it, and a recipe names files, addresses and Python files. So the hash of every
recipe that `distill label` runs is kept, in $XDG_STATE_HOME/distill/recipes (~/.local/state), a line each.
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


def known(recipe: Mapping[str, Any]) -> bool:
    """Whether this resolved recipe, as a plain table, has been run here."""
    try:
        return _hash(recipe) in _file().read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return False


def remember(recipe: Mapping[str, Any]) -> None:
    """Note that this resolved recipe is run here; where that cannot be written, it is not known later."""
    if not known(recipe):
        with contextlib.suppress(OSError):
            _file().parent.mkdir(parents=True, exist_ok=True)
            with _file().open("a", encoding="ascii") as file:
                file.write(_hash(recipe) + "\n")
