"""What is learnt: the losses, each one value per image, and the objective that weighs them.

`distillation_loss`, `gradient_loss` and `hdn_loss` live in distill.losses.losses; they are found here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.losses.losses import distillation_loss, gradient_loss, hdn_loss

__all__ = ["distillation_loss", "gradient_loss", "hdn_loss"]


def __getattr__(name: str) -> Any:
    # Late, for the settings of the losses are read (distill.losses.settings) where nobody wants to wait for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from distill.losses import losses

    return getattr(losses, name)
