"""What is learnt: the losses, each one value per image, and the objective that weighs them."""

from distill.losses.losses import distillation_loss, gradient_loss, hdn_loss

__all__ = ["distillation_loss", "gradient_loss", "hdn_loss"]
