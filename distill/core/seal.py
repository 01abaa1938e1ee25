"""A JSON table that carries the checksum of its own content, so that a changed byte is detected on reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "sha256"


def _digest(table: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in table.items() if key != KEY}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with its checksum: the sha256 of its canonical JSON (sorted keys, no spaces) without that key."""
    return {**table, KEY: _digest(table)}


def is_broken(table: Mapping[str, Any]) -> bool:
    """Whether the table does not match the checksum that it carries; False if it carries none (earlier versions)."""
    return KEY in table and table[KEY] != _digest(table)
