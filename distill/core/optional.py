"""Optional packages (pip extras), imported when they are needed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any


def optional(name: str, extra: str = "export") -> Any:
    """Import and return the module `name`; raises a one-line ImportError naming the extra if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.split(".")[0] != error.name.split(".")[0]:
            raise
        raise ImportError(_line([name], extra)) from error


def require(names: Sequence[str], extra: str = "export") -> None:
    """As `optional` for several packages, but without importing them: fails before anything heavy is loaded."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ImportError(_line(missing, extra))


def _line(names: Sequence[str], extra: str) -> str:
    verb = "is" if len(names) == 1 else "are"
    return f"{', '.join(names)} {verb} not installed; run pip install 'depth-distill[{extra}]'"
