"""Imports a user's Python files as modules `distill.core.by_path.STEM_HEX`, where HEX encodes the file's path.

A process that unpickles a class (a DataLoader worker under "spawn") knows only the name of its module, so the name
alone must lead to the file.
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

from distill.core.home import home_expanded

__path__: list[str] = []  # makes this module a package, which can have submodules


def module_name(file: Path) -> str:
    """Return the module name that `file` is imported under: one per file, however its path is written."""
    resolved = home_expanded(file).resolve()
    return f"{__name__}.{re.sub(r'[^0-9a-zA-Z_]', '_', resolved.stem)}_{str(resolved).encode().hex()}"


class _Files(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a name made by `module_name`, None for any other name."""
        package, _, module = fullname.rpartition(".")
        if package != __name__:
            return None
        file = bytes.fromhex(module.rpartition("_")[2]).decode()
        return spec_from_file_location(fullname, file)


if not any(type(finder).__qualname__ == _Files.__qualname__ for finder in sys.meta_path):
    sys.meta_path.append(_Files())
