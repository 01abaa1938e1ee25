"""Texts without the places where files lie on this machine and without passwords, for what is given away."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.core.addresses import public

_ROOT = r"(?: ~[\w.-]*[/\\] | [A-Za-z]:[/\\] | / | \\\\ )"
"""Of a home folder, a drive, a disk or a server. One backslash begins a pattern or a formula, not a place."""
_NAME = r"""[^\s/\\:;,'"|()<>\[\]{}]+"""
# A root, then at least two names. Not the path of a URL, "image/png" or "1/(a d + b)".
_PLACE = re.compile(
    rf"(?<![\w./\\:~-])  (?: file:// )?  {_ROOT} {_NAME} (?: [/\\] {_NAME} )+ [/\\]?",
    re.VERBOSE,
)
_WHOLE = re.compile(rf"(?: file:// )? {_ROOT} (?: [^:\n] | :(?!\s) )* | ~[\w.-]*", re.VERBOSE)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def without_places(value: Any) -> Any:
    """A copy of plain values (as JSON holds them) in which each absolute path is only a name.

    That is its last part, or the hub's id where it lies in the hub's cache. Relative paths and URLs stay. Texts that
    only mention paths are treated likewise, keys of tables too. URLs lose what grants access (distill.core.addresses).
    """
    if isinstance(value, Mapping):
        return {without_places(key): without_places(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(inner) for inner in value]
    if isinstance(value, Path):
        return without_places(str(value))
    if not isinstance(value, str):
        return value
    if _WHOLE.fullmatch(value):
        return _name(value)
    return _PLACE.sub(lambda match: _name(match[0]), str(public(value)))


def _name(path: str) -> str:
    if cached := _CACHED.search(path):
        return f"{cached[1]}/{cached[2]}"
    parts = [part for part in re.split(r"[/\\]", path) if part]
    return parts[-1] if parts else path
