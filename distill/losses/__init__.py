"""The losses, each one value per image, and the objective, their weighted sum.

`distillation_loss`, `gradient_loss` and `hdn_loss` are exported here and imported on first access: a recipe's settings
are in this package too, and reading a recipe should not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.losses.losses import distillation_loss, gradient_loss, hdn_loss

__all__ = ["distillation_loss", "gradient_loss", "hdn_loss"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("distill.losses.losses"), name)
