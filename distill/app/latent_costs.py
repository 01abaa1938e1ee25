"""What training a latent network costs, for `distill doctor`: memory and hours, from one probed step and a FLOP count.

The probed step gives this device's FLOP/s on the recipe's own network; the count gives the FLOPs of a step at Stable
Diffusion's sizes, VAE included. The estimate is good to a factor: a small network leaves a large device idle. Memory
counts tensors only: the device's context and the allocator's overhead come on top.
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
    """What a step of a recipe consists of. unet, vae: the cost of one image's pass."""

    recipe: Recipe
    unet: UNetCost
    vae: VAECost

    @property
    def passes(self) -> float:
        """The UNet's forward passes per image: one for the map, and one for the trajectory or the filter.

        Half of the images are assumed to need the trajectory (ground truth), half the filter (pseudo-labels).
        """
        spec = self.recipe.latent
        extra = (bool(spec.trajectory), spec.pseudo == "filter") if spec.method == "feed_forward" else (False, False)
        return 1.0 + sum(extra) / 2.0

    @property
    def decoded_share(self) -> float:
        """The share of images whose map is decoded, to be compared as an image."""
        spec = self.recipe.latent
        compared = any(spec.image_weights) and self.recipe.student.head == "vae" and spec.method == "feed_forward"
        return float(compared) * (0.5 if spec.pseudo == "filter" else 1.0)

    @property
    def step_flops(self) -> float:
        """FLOPs of a step whose latents are already encoded. A backward pass costs two forward passes, and
        checkpointing adds one forward pass; the VAE is frozen, so its backward pass costs only one.
        """
        runs = 4.0 if self.recipe.train.gradient_checkpointing else 3.0
        per_image = self.unet.flops * self.passes * runs + self.vae.decode * self.decoded_share * 2.0
        return per_image * self.recipe.train.batch_size

    def encoding_flops(self, samples: int) -> float:
        """FLOPs of encoding the images and maps of `samples` samples."""
        return 2.0 * self.vae.encode * samples

    def run_flops(self, steps: int, samples: int) -> float:
        """FLOPs of a run; a cache encodes each of the `samples` once, and once more mirrored."""
        train = self.recipe.train
        num_drawn = steps * train.batch_size
        num_distinct = samples * (2 if train.hflip else 1)
        return steps * self.step_flops + self.encoding_flops(
            min(num_drawn, num_distinct) if self.recipe.latent.cache else num_drawn
        )

    def memory(self, processes: int) -> tuple[float, float]:
        """Bytes that are always held, and bytes that a micro-batch's passes keep until their gradients are computed.

        Always held: weights, gradients, Adam's two moments, EMA, the buckets in which several processes exchange
        gradients, all float32; the weights' bfloat16 copies, which live as long as the passes; the VAE, float32.
        """
        train = self.recipe.train
        copies = 4.0 + bool(train.ema) + (processes > 1) + (0.5 if train.precision == "bf16" else 0.0)
        fixed = 4.0 * (self.unet.parameters * copies + self.vae.parameters)
        images = max(1, train.batch_size // (train.accumulate * processes))
        per_image = self.unet.saved * self.passes + self.vae.saved * self.decoded_share
        return fixed, images * (per_image + self.unet.inside)


def cost_findings(
    recipe: Recipe, student: LatentStudent, seconds: float, where: str, samples: int
) -> Iterator[Finding]:
    """The findings for the recipe's own network, and for Stable Diffusion's two at two sizes.

    seconds: of one step, encoding included. samples: how many there are to learn from.
    """
    side, vae = recipe.crops.size, _unet_costs.on_meta(student.parts.vae)
    step = StepCost(
        recipe,
        _cost(recipe, _unet_costs.on_meta(student.unet), side // student.factor),
        _unet_costs.vae_cost(vae, side),
    )
    fixed, activations = step.memory(1)
    ema = " and EMA" if recipe.train.ema else ""
    yield Finding(
        "ok",
        f"memory of the network, its gradients, Adam's moments{ema}: {fixed / 1e9:.2f} GB, and about "
        f"{activations / 1e9:.2f} GB for a micro-batch of {recipe.train.batch_size // recipe.train.accumulate}",
    )
    rate = (step.step_flops + step.encoding_flops(recipe.train.batch_size)) / seconds
    vae = _unet_costs.stable_diffusion_vae()
    decoders = {pixels: _unet_costs.vae_cost(vae, pixels) for pixels in PIXELS}
    for name in _unet_costs.SIZES:
        unet = _unet_costs.stable_diffusion(name)
        estimates = [
            _line(StepCost(recipe, _cost(recipe, unet, pixels // 8), decoders[pixels]), pixels, rate, samples)
            for pixels in PIXELS
        ]
        yield Finding("ok", f"{name}'s UNet at this {where}'s {rate / 1e12:.3g} TFLOP/s: {'; '.join(estimates)}")


def _cost(recipe: Recipe, unet: object, side: int) -> UNetCost:
    train = recipe.train
    return _unet_costs.cost(unet, side, bf16=train.precision == "bf16", checkpointing=train.gradient_checkpointing)


def _line(step: StepCost, pixels: int, rate: float, samples: int) -> str:
    train = step.recipe.train
    hours = step.run_flops(train.steps, samples) / rate / 3600.0
    parts = []
    for processes in PROCESSES:
        fixed, activations = step.memory(processes)
        parts.append(f"{hours / processes:,.1f} h and {(fixed + activations) / 1e9:.0f} GB on {processes}")
    return f"{pixels} px {', '.join(parts)}"
