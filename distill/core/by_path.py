"""A user's Python files as modules `distill.core.by_path.STEM_HEX`, where HEX spells the file's path.

A process that gets a class by pickle (a worker of a DataLoader under "spawn") knows nothing but its module's name, so
the name alone has to lead to the file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

__path__: list[str] = []  # what makes this module one that may have others below it


def module_name(file: Path) -> str:
    """The module that `file` is imported as: one per file, however its path is written."""
    whole = file.expanduser().resolve()
    return f"{__name__}.{re.sub(r'[^0-9a-zA-Z_]', '_', whole.stem)}_{str(whole).encode().hex()}"


class _Files(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of a name that `module_name` made; None for all others."""
        package, _, last = fullname.rpartition(".")
        if package != __name__:
            return None
        file = bytes.fromhex(last.rpartition("_")[2]).decode()
        return spec_from_file_location(fullname, file)


if not any(type(finder).__qualname__ == _Files.__qualname__ for finder in sys.meta_path):
    sys.meta_path.append(_Files())
