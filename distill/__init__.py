"""A distillation and teacher-comparison workbench for zero-shot monocular depth.

    from distill import load
    depth = load("pocket")("photo.jpg")

`load`, `load_teacher` and `Depth` live in distill.inference.api; they are found here too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.inference.api import Depth, load, load_teacher

__version__ = "0.1.0"
__all__ = ["Depth", "__version__", "load", "load_teacher"]


def __getattr__(name: str) -> Any:
    # Late, for `distill --help` and `import distill` must not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("distill.inference.api"), name)
