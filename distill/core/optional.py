"""Packages of an extra, imported when they are needed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any


def optional(name: str, extra: str = "export") -> Any:
    """The module `name`; ImportError in one line that names the extra where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.split(".")[0] != error.name.split(".")[0]:
            raise
        raise ImportError(_line([name], extra)) from error


def require(names: Sequence[str], extra: str = "export") -> None:
    """As `optional` for packages, all at once and without importing them: said before anything heavy is loaded."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ImportError(_line(missing, extra))


def _line(names: Sequence[str], extra: str) -> str:
    are = "is" if len(names) == 1 else "are"
    return f"{', '.join(names)} {are} not installed; pip install 'depth-distill[{extra}]' brings it"
