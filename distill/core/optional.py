"""Packages of an extra, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def optional(name: str, extra: str = "export") -> Any:
    """The module `name`; ImportError in one line that names the extra where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.split(".")[0] != error.name.split(".")[0]:
            raise
        raise ImportError(f"{name} is not installed; pip install 'depth-distill[{extra}]' brings it") from error
