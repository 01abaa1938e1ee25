"""What training a latent network takes, for `distill doctor`: memory and hours, from one probed step and a count.

The probe's step says how much arithmetic this device does in a second on the recipe's own network; the count says how
much a step of Stable Diffusion's sizes is. An estimate, good to a factor: a small network keeps a large device idle.
"""

from __future__ import annotations

from collections.abc import Iterator

from distill.app.recipe import Recipe
from distill.core.findings import Finding
from distill.teachers import _unet_costs
from distill.teachers._latent_student import LatentStudent
from distill.teachers._unet_costs import UNetCost

PIXELS = (512, 768)
PROCESSES = (1, 8)
VAE_PARAMETERS = 83_653_863
"""Of Stable Diffusion's autoencoder; frozen, in float32."""


def passes(recipe: Recipe) -> float:
    """The UNet's passes for each image of a step: one for the map, and one for the trajectory, or for the filter.

    Of images of both sorts half each; a backward pass is two forward ones, and checkpointing runs one more.
    """
    spec = recipe.latent
    second = (bool(spec.trajectory), spec.pseudo == "filter") if spec.method == "feed_forward" else (False, False)
    each = 1.0 + sum(second) / 2.0
    return each * (4.0 if recipe.train.gradient_checkpointing else 3.0)


def step_flops(recipe: Recipe, cost: UNetCost) -> float:
    """Of a whole step's UNet passes."""
    return cost.flops * passes(recipe) * recipe.train.batch_size


def memory(recipe: Recipe, cost: UNetCost, *, frozen: int, processes: int) -> tuple[float, float]:
    """Bytes of weights, gradients, Adam's moments, EMA and frozen parts; and of what a micro-batch's passes keep."""
    train = recipe.train
    copies = 4 + bool(train.ema)
    fixed = 4.0 * (cost.parameters * copies + frozen)
    images = max(1, train.batch_size // (train.accumulate * processes))
    each = cost.saved * (0.5 if train.precision == "bf16" else 1.0) * passes(recipe) / 3.0
    if train.gradient_checkpointing:
        each *= 0.25  # of the blocks' inputs and one block's inside; ours
    return fixed, images * each


def about(recipe: Recipe, student: LatentStudent, seconds: float, where: str) -> Iterator[Finding]:
    """The findings for the recipe's own network, and for Stable Diffusion's two at two sizes."""
    own = _unet_costs.cost(_unet_costs.on_meta(student.unet), recipe.crops.size // student.factor)
    frozen = sum(p.numel() for p in student.parts.vae.parameters())
    fixed, kept = memory(recipe, own, frozen=frozen, processes=1)
    ema = " and EMA" if recipe.train.ema else ""
    yield Finding(
        "ok",
        f"memory of the network, its gradients, Adam's moments{ema}: {fixed / 1e9:.2f} GB, and about "
        f"{kept / 1e9:.2f} GB for a micro-batch of {recipe.train.batch_size // recipe.train.accumulate}",
    )
    rate = step_flops(recipe, own) / seconds
    for name in _unet_costs.SIZES:
        unet = _unet_costs.stable_diffusion(name)
        told = [_line(recipe, _unet_costs.cost(unet, pixels // 8), pixels, rate) for pixels in PIXELS]
        yield Finding("ok", f"{name}'s UNet at this {where}'s {rate / 1e12:.3g} TFLOP/s: {'; '.join(told)}")


def _line(recipe: Recipe, cost: UNetCost, pixels: int, rate: float) -> str:
    hours = step_flops(recipe, cost) * recipe.train.steps / rate / 3600.0
    parts = []
    for processes in PROCESSES:
        fixed, kept = memory(recipe, cost, frozen=VAE_PARAMETERS, processes=processes)
        parts.append(f"{hours / processes:,.1f} h and {(fixed + kept) / 1e9:.0f} GB on {processes}")
    return f"{pixels} px {', '.join(parts)}"
