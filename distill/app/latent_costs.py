"""What training a latent network takes, for `distill doctor`: memory and hours, from one probed step and a count.

The probe's step says how much arithmetic this device does in a second on the recipe's own network; the count says how
much a step of Stable Diffusion's sizes is, its VAE's part included. An estimate, good to a factor: a small network
keeps a large device idle. Memory is that of tensors: a card's own context and its allocator's waste come on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from distill.app.recipe import Recipe
from distill.core.findings import Finding
from distill.teachers import _unet_costs
from distill.teachers._latent_student import LatentStudent
from distill.teachers._unet_costs import UNetCost, VAECost

PIXELS = (512, 768)
PROCESSES = (1, 8)


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step of a recipe is made of. unet, vae: one image's pass."""

    recipe: Recipe
    unet: UNetCost
    vae: VAECost

    @property
    def passes(self) -> float:
        """The UNet's forward passes for each image: one for the map, and one for the trajectory, or for the filter.

        Of images of both sorts half each.
        """
        spec = self.recipe.latent
        second = (bool(spec.trajectory), spec.pseudo == "filter") if spec.method == "feed_forward" else (False, False)
        return 1.0 + sum(second) / 2.0

    @property
    def decoded(self) -> float:
        """The share of images whose map is decoded, to be compared as an image."""
        spec = self.recipe.latent
        compared = any(spec.image_weights) and self.recipe.student.head == "vae" and spec.method == "feed_forward"
        return float(compared) * (0.5 if spec.pseudo == "filter" else 1.0)

    @property
    def learning(self) -> float:
        """FLOPs of a step on latents that are at hand. A backward pass is two forward ones, checkpointing runs one more
        first; the VAE has no gradients of its own.
        """
        runs = 4.0 if self.recipe.train.gradient_checkpointing else 3.0
        each = self.unet.flops * self.passes * runs + self.vae.decode * self.decoded * 2.0
        return each * self.recipe.train.batch_size

    def encoding(self, samples: int) -> float:
        """FLOPs of so many samples' latents, the image's and the map's."""
        return 2.0 * self.vae.encode * samples

    def run(self, steps: int, samples: int) -> float:
        """FLOPs of a run; a cache computes the latents of each of the `samples` once, both ways round."""
        train = self.recipe.train
        seen = steps * train.batch_size
        kept = samples * (2 if train.hflip else 1)
        return steps * self.learning + self.encoding(min(seen, kept) if self.recipe.latent.cache else seen)

    def memory(self, processes: int) -> tuple[float, float]:
        """Bytes that stay, and bytes that a micro-batch's passes keep until their gradients are known.

        What stays: weights, gradients, Adam's two moments, EMA, the buckets in which several processes exchange
        gradients, all float32; the weights' bfloat16 copies, which live as long as the passes; the VAE, float32.
        """
        train = self.recipe.train
        copies = 4.0 + bool(train.ema) + (processes > 1) + (0.5 if train.precision == "bf16" else 0.0)
        fixed = 4.0 * (self.unet.parameters * copies + self.vae.parameters)
        images = max(1, train.batch_size // (train.accumulate * processes))
        each = self.unet.saved * self.passes + self.vae.saved * self.decoded
        return fixed, images * (each + self.unet.inside)


def about(recipe: Recipe, student: LatentStudent, seconds: float, where: str, samples: int) -> Iterator[Finding]:
    """The findings for the recipe's own network, and for Stable Diffusion's two at two sizes.

    seconds: of a step that encodes what it learns from. samples: how many there are to learn from.
    """
    side, vae = recipe.crops.size, _unet_costs.on_meta(student.parts.vae)
    own = StepCost(
        recipe,
        _cost(recipe, _unet_costs.on_meta(student.unet), side // student.factor),
        _unet_costs.vae_cost(vae, side),
    )
    fixed, kept = own.memory(1)
    ema = " and EMA" if recipe.train.ema else ""
    yield Finding(
        "ok",
        f"memory of the network, its gradients, Adam's moments{ema}: {fixed / 1e9:.2f} GB, and about "
        f"{kept / 1e9:.2f} GB for a micro-batch of {recipe.train.batch_size // recipe.train.accumulate}",
    )
    rate = (own.learning + own.encoding(recipe.train.batch_size)) / seconds
    vae = _unet_costs.stable_diffusion_vae()
    decoders = {pixels: _unet_costs.vae_cost(vae, pixels) for pixels in PIXELS}
    for name in _unet_costs.SIZES:
        unet = _unet_costs.stable_diffusion(name)
        told = [
            _line(StepCost(recipe, _cost(recipe, unet, pixels // 8), decoders[pixels]), pixels, rate, samples)
            for pixels in PIXELS
        ]
        yield Finding("ok", f"{name}'s UNet at this {where}'s {rate / 1e12:.3g} TFLOP/s: {'; '.join(told)}")


def _cost(recipe: Recipe, unet: object, side: int) -> UNetCost:
    train = recipe.train
    return _unet_costs.cost(unet, side, bf16=train.precision == "bf16", checkpointing=train.gradient_checkpointing)


def _line(step: StepCost, pixels: int, rate: float, samples: int) -> str:
    train = step.recipe.train
    hours = step.run(train.steps, samples) / rate / 3600.0
    parts = []
    for processes in PROCESSES:
        fixed, kept = step.memory(processes)
        parts.append(f"{hours / processes:,.1f} h and {(fixed + kept) / 1e9:.0f} GB on {processes}")
    return f"{pixels} px {', '.join(parts)}"
