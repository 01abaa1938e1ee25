"""The training of latent depth networks: FiffDepth's, GenPercept's and Marigold's as one task.

Ground truth supervises the single pass at t = 0 (or as `[latent]` says) and, besides it, the trajectory: the network
keeps denoising latents that blend image and depth. Pseudo-labels supervise the output of another pass, the filter's at
t = -1, on the single pass's map, so that their lack of detail does not blur it (FiffDepth Sec. 3.2-3.4). An image's
label supervision decides between the two. "denoise" denoises the map's latents given the image's (Marigold).

Random draws for an image follow from (seed, its stream position), on the CPU: the same on any number of processes, on
any device, and after a resume. t = -1 is only passed to the UNet; as an index of the noise schedule it would mean 999.

Shapes: B images of a micro-batch, S x S pixels, h x w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.core.crops import generator
from distill.core.depth import DepthMap, Kind
from distill.losses import latent as maths
from distill.losses.latent_settings import STEPS, LatentSettings
from distill.losses.losses import gradient_loss
from distill.training.batches import MicroBatch, TaughtRows
from distill.training.latent_cache import LatentCache, stacked
from distill.training.state import Measured

PRIOR_LEVELS = tuple(range(100, 1000, 200))
"""Noise levels at which `latent.watch_prior` evaluates the base model's own task."""


class LatentNetwork(Protocol):
    """teachers._latent_student.LatentStudent: `module(inputs, timesteps)` is the UNet's output, or the head's map."""

    alphas: Tensor
    head: Any
    kind: Kind

    @property
    def factor(self) -> int:
        """Pixels per latent pixel."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """(B,3,S,S) in [0,1] -> (B,4,h,w)."""
        ...

    def encode_maps(self, maps: Tensor) -> Tensor:
        """(B,S,S) in [-1,1] -> (B,4,h,w)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(B,4,h,w) -> (B,S,S) in about [-1,1]."""
        ...


@dataclass(slots=True)
class _Rows:
    """A micro-batch in latents. image, target: (B,4,h,w). maps: (B,S,S) in [-1,1]. pixels, valid: its valid pixels and
    valid latent pixels.

    truth, pseudo: the rows supervised as ground truth, and those supervised through the filter; bool (B,).
    """

    image: Tensor
    target: Tensor
    maps: Tensor
    pixels: Tensor
    valid: Tensor
    truth: Tensor
    pseudo: Tensor


@dataclass(frozen=True)
class LatentTask:
    """The task that [latent] describes; a training.step.TrainingTask.

    network: the unwrapped student, for its frozen parts. seed: the run's. cache: None recomputes every latent.
    """

    network: LatentNetwork
    settings: LatentSettings
    seed: int
    cache: LatentCache | None = None

    def keep(self) -> None:
        """Writes the computed latents to disk."""
        if self.cache is not None:
            self.cache.keep()

    def __call__(self, module: nn.Module, micro: MicroBatch, /, *, precision: str) -> Measured:
        """The losses (B,) of a micro-batch; parts by name have one value per image that they cover."""
        rows = self._rows(micro)
        bf16 = torch.autocast(micro.images.device.type, torch.bfloat16, enabled=precision == "bf16")
        with bf16:
            if self.settings.method == "denoise":
                return self._denoise(module, micro, rows)
            result = self._feed_forward(module, micro, rows)
            if self.settings.watch_prior and not module.training and self.network.head is None:
                result.parts["prior"] = self._prior(module, micro, rows)
            return result

    # --- targets ------------------------------------------------------------------------------------------------------

    def _rows(self, micro: MicroBatch) -> _Rows:
        device, count, s = micro.images.device, len(micro.keys), self.settings
        shape = micro.images.shape[-2:]
        maps = micro.images.new_full((count, *shape), -1.0)
        pixels = torch.zeros(count, *shape, dtype=torch.bool, device=device)
        truth = torch.zeros(count, dtype=torch.bool, device=device)
        teachers = [""] * count
        for taught in micro.taught:
            taught_rows = torch.arange(count, device=device) if taught.rows is None else taught.rows
            maps[taught_rows], pixels[taught_rows] = self._map_of(taught)
            truth[taught_rows] = taught.labels.supervision.truth or s.pseudo == "direct"
            for row in taught_rows.tolist():
                teachers[row] = taught.teacher
        image = self._latents(micro, [""] * count, lambda at: self.network.encode(micro.images[at]))
        target = self._latents(micro, teachers, lambda at: self.network.encode_maps(maps[at]))
        pseudo = ~truth if s.pseudo == "filter" else torch.zeros_like(truth)
        valid = maths.pooled(pixels, self.network.factor)
        # An image without a valid pixel is left out: its loss of 0 would be mistaken for a good one.
        usable = (valid if self.network.head is None else pixels).flatten(1).any(1)
        return _Rows(image, target, maps, pixels, valid, truth & usable, pseudo & usable)

    def _map_of(self, one: TaughtRows) -> tuple[Tensor, Tensor]:
        """A supervision's maps and valid pixels, in the VAE's range and the network's quantity; (b,S,S) each."""
        s, shared = self.settings, one.labels.shared
        if shared.kind.quantity != self.network.kind.quantity:
            shared = self._other_quantity(shared)
        return maths.to_unit_range(shared.values, shared.valid, s.quantile)

    def _other_quantity(self, shared: DepthMap) -> DepthMap:
        s, kind, valid = self.settings, self.network.kind, shared.valid & torch.isfinite(shared.values)
        if shared.kind.unknown != "affine":
            return shared.convert(kind)
        if s.pseudo_shape == "flipped":
            return DepthMap(-shared.values, valid, kind)
        return DepthMap(maths.inverted(shared.values, valid, quantile=s.quantile, reach=s.reach), valid, kind)

    def _latents(self, micro: MicroBatch, teachers: list[str], compute: Any) -> Tensor:
        """(B,4,h,w) latents, cached or computed; of the images where the teacher is ""."""
        device = micro.images.device
        if self.cache is None:
            return compute(list(range(len(micro.keys))))
        names = [
            f"{key}|{int(turned)}|{teacher}"
            for key, turned, teacher in zip(micro.keys, micro.mirrored, teachers, strict=True)
        ]
        return stacked(self.cache.get(names, compute), device)

    # --- random draws -------------------------------------------------------------------------------------------------

    def _drawn(self, micro: MicroBatch, shape: torch.Size, *, lowest: int, shaped: bool) -> tuple[Tensor, Tensor]:
        """Noise levels (B,), at least `lowest`, and noise (B,4,h,w); shaped: multi-resolution noise."""
        s, levels, noises = self.settings, [], []
        for position in micro.positions:
            rng = generator("latent", self.seed, *_place(position))
            level = lowest + int(rng.integers(STEPS - lowest))
            torch_generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            levels.append(level)
            if shaped and s.noise_strength:
                strength = torch.tensor(s.noise_strength) * (level / STEPS if s.noise_annealed else 1.0)
                noises.append(maths.multi_resolution_noise((1, *shape[1:]), strength, torch_generator))
            else:
                noises.append(torch.randn((1, *shape[1:]), generator=torch_generator))
        device = micro.images.device
        return torch.tensor(levels, device=device), torch.cat(noises).to(device)

    # --- methods ------------------------------------------------------------------------------------------------------

    def _feed_forward(self, module: nn.Module, micro: MicroBatch, rows: _Rows) -> Measured:
        s, count = self.settings, len(micro.keys)
        levels, noise = self._drawn(micro, rows.image.shape, lowest=s.first_index, shaped=False)
        times = torch.full((count,), s.timestep, device=rows.image.device)
        if s.random_timestep:
            times = self._random_times(micro)
        in_latents = self.network.head is None
        kept = rows.truth.nonzero()[:, 0] if s.trajectory and in_latents else rows.truth[:0].long()  # their trajectory
        levels, noise = levels[kept], noise[kept]
        alphas = self.network.alphas.to(rows.image.device)[levels]

        def blended(depth: Tensor) -> Tensor:
            return s.blend * rows.image[kept] + (1.0 - s.blend) * depth[kept]

        one_pass = s.blend_depth == "truth" and len(kept) > 0
        if one_pass:  # the blended latents do not depend on the map
            clean = blended(rows.target)
            noisy = maths.add_noise(clean, noise, alphas)
            out = module(torch.cat([rows.image, noisy]), torch.cat([times, levels])).float()
            raw, velocity = out[:count], out[count:]
        else:
            raw = module(rows.image, times).float()
        prediction = -raw if s.negated and in_latents else raw
        if not one_pass and len(kept):
            clean = blended(prediction.detach())
            velocity = module(maths.add_noise(clean, noise, alphas), levels).float()
        with torch.autocast(micro.images.device.type, enabled=False):
            losses, parts = self._against_truth(rows, prediction)
            if len(kept):
                target_velocity = maths.velocity(clean, noise, alphas)
                each = maths.latent_distance(velocity, target_velocity, rows.valid[kept], squared=True)
                losses = losses.index_add(0, kept, s.trajectory * each)
                parts["trajectory"] = each
        if bool(rows.pseudo.any()) and in_latents:
            losses = self._filtered(module, rows, prediction, losses, parts)
        return self._measured(rows, prediction, losses, parts)

    def _random_times(self, micro: MicroBatch) -> Tensor:
        timesteps = [
            int(generator("timestep", self.seed, *_place(position)).integers(STEPS)) for position in micro.positions
        ]
        return torch.tensor(timesteps, device=micro.images.device)

    def _prior(self, module: nn.Module, micro: MicroBatch, rows: _Rows) -> Tensor:
        """The loss (B,) of the base's own task, a mean over PRIOR_LEVELS; each image's noise is fixed."""
        total = rows.image.new_zeros(len(rows.image))
        for level in PRIOR_LEVELS:
            noises = [
                torch.randn(
                    (1, *rows.image.shape[1:]),
                    generator=torch.Generator().manual_seed(int(generator("prior", level, index).integers(2**62))),
                )
                for _, index in map(_place, micro.positions)
            ]
            noise = torch.cat(noises).to(rows.image)
            levels = torch.full((len(noise),), level, device=noise.device)
            alphas = self.network.alphas.to(noise.device)[levels]
            out = module(maths.add_noise(rows.image, noise, alphas), levels).float()
            total = total + (out - maths.velocity(rows.image, noise, alphas)).square().mean((1, 2, 3))
        return total / len(PRIOR_LEVELS)

    def _against_truth(self, rows: _Rows, found: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses (B,) of the single pass's output, 0 for images without truth, and their parts."""
        s, truth_rows = self.settings, rows.truth.nonzero()[:, 0]
        losses = found.new_zeros(len(found)) + 0.0 * found.sum()  # gives every process a gradient, whatever its images
        parts: dict[str, Tensor] = {}
        if not len(truth_rows):
            return losses, parts
        total = found.new_zeros(len(truth_rows))
        if self.network.head is None:
            total = total + self._in_latents(
                found[truth_rows], rows.target[truth_rows], rows.valid[truth_rows], parts, ""
            )
        if any(s.image_weights) or self.network.head is not None:
            maps = found[truth_rows] if self.network.head is not None else self.network.decode(found[truth_rows])
            total = total + self._in_images(maps, rows.maps[truth_rows], rows.pixels[truth_rows], parts)
        return losses.index_add(0, truth_rows, total), parts

    def _in_latents(self, pred: Tensor, target: Tensor, valid: Tensor, parts: dict[str, Tensor], name: str) -> Tensor:
        s = self.settings
        total = pred.new_zeros(len(pred))
        if s.distance_weight:
            parts[f"{name}{s.distance}"] = maths.latent_distance(pred, target, valid, squared=s.distance == "mse")
            total = total + s.distance_weight * parts[f"{name}{s.distance}"]
        if s.gradient:
            parts[f"{name}gradient"] = maths.latent_gradient(pred, target, valid, scales=s.gradient_scales)
            total = total + s.gradient * parts[f"{name}gradient"]
        return total

    def _in_images(self, maps: Tensor, target: Tensor, valid: Tensor, parts: dict[str, Tensor]) -> Tensor:
        if maps.shape != target.shape:
            maps = nn.functional.interpolate(maps[:, None], target.shape[-2:], mode="bilinear", antialias=True)[:, 0]
        total = maps.new_zeros(len(maps))
        for name, weight in zip(("image_mse", "image_ssi", "image_gradient"), self.settings.image_weights, strict=True):
            if not weight:
                continue
            if name == "image_mse":
                parts[name] = maths.latent_distance(maps[:, None], target[:, None], valid, squared=True)
            elif name == "image_ssi":
                parts[name] = maths.aligned_l1(maps, target, valid)
            else:
                parts[name] = gradient_loss(maps, target, valid, scales=1, normalize=False)
            total = total + weight * parts[name]
        return total

    def _filtered(
        self, module: nn.Module, rows: _Rows, found: Tensor, losses: Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        """The losses plus those of pseudo-labelled images, computed on the output of the filter's pass on the map."""
        s, pseudo_rows = self.settings, rows.pseudo.nonzero()[:, 0]
        filter_input = found[pseudo_rows] if s.filter_gradient else found[pseudo_rows].detach()
        times = torch.full((len(pseudo_rows),), s.filter_timestep, device=found.device)
        out = module(filter_input, times).float()
        with torch.autocast(found.device.type, enabled=False):
            pred = -out if s.negated else out
            total = self._in_latents(pred, rows.target[pseudo_rows], rows.valid[pseudo_rows], parts, "filter_")
        return losses.index_add(0, pseudo_rows, total)

    def _denoise(self, module: nn.Module, micro: MicroBatch, rows: _Rows) -> Measured:
        levels, noise = self._drawn(micro, rows.image.shape, lowest=0, shaped=True)
        alphas = self.network.alphas.to(rows.image.device)[levels]
        noisy = maths.add_noise(rows.target, noise, alphas)
        out = module(torch.cat([rows.image, noisy], dim=1), levels).float()
        with torch.autocast(micro.images.device.type, enabled=False):
            target_velocity = maths.velocity(rows.target, noise, alphas)
            valid = rows.valid & (rows.truth | rows.pseudo)[:, None, None]
            each = maths.latent_distance(out, target_velocity, valid, squared=True)
            prediction = maths.denoised(noisy, out, alphas)
        return self._measured(rows, prediction, each, {"velocity": each})

    def _measured(self, rows: _Rows, found: Tensor, losses: Tensor, parts: dict[str, Tensor]) -> Measured:
        taught = rows.truth | rows.pseudo
        if found.ndim == 3:
            return Measured(losses, parts, found.detach(), rows.maps, rows.pixels, taught)
        return Measured(losses, parts, found.detach().mean(1), rows.target.mean(1), rows.valid, taught)


def _place(position: int) -> tuple[int, int]:
    """(1 for a held-out image, else 0; its index, or its position in the training stream): the seed of its draws."""
    return int(position < 0), max(position, -1 - position)
