"""How a latent network learns depth: FiffDepth's, GenPercept's and Marigold's training as one task.

Ground truth teaches the one pass at t = 0 (or as `[latent]` says), and the trajectory beside it: the network goes on
denoising latents that blend image and depth. A network's pseudo-labels teach what another pass, at t = -1, makes of the
one pass's map, so that their lack of detail costs none (FiffDepth Sec. 3.2-3.4). Which of the two an image gets is told
by its labels' supervision. "denoise" takes noise off the map's latents beside the image's (Marigold).

Whatever is drawn for an image follows from (seed, its place in the stream), on the CPU: the same on any number of
processes, on any device, and after a resume. -1 goes to the UNet alone; as an index of the noise schedule it would mean
999.

Shapes: B images of a micro-batch, S x S pixels, h x w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
from distill.training.step import Measured

PRIOR_LEVELS = tuple(range(100, 1000, 200))
"""Noise levels at which `latent.watch_prior` asks for the base's own task."""


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
    """A micro-batch in latents. image, target: (B,4,h,w). maps: (B,S,S) in [-1,1], valid pixels and latent pixels.

    truth, pseudo: which rows are taught as ground truth is, and which by the filter; bool (B,).
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
    """What [latent] asks of a network; a training.step.TrainingTask.

    network: the bare student, for what is frozen in it. seed: the run's. cache: None computes every latent anew.
    """

    network: LatentNetwork
    settings: LatentSettings
    seed: int
    cache: LatentCache | None = None
    steps: int = field(default=STEPS)

    def keep(self) -> None:
        """Brings the latents that were computed to the disk."""
        if self.cache is not None:
            self.cache.keep()

    def __call__(self, module: nn.Module, micro: MicroBatch, /, *, precision: str) -> Measured:
        """The losses (B,) of a micro-batch; parts by name have as many values as images that they speak of."""
        rows = self._rows(micro)
        bf16 = torch.autocast(micro.images.device.type, torch.bfloat16, enabled=precision == "bf16")
        with bf16:
            if self.settings.method == "denoise":
                return self._denoise(module, micro, rows)
            found = self._feed_forward(module, micro, rows)
            if self.settings.watch_prior and not module.training and self.network.head is None:
                found.parts["prior"] = self._prior(module, micro, rows)
            return found

    # --- what is learnt from ------------------------------------------------------------------------------------------

    def _rows(self, micro: MicroBatch) -> _Rows:
        device, count, s = micro.images.device, len(micro.keys), self.settings
        shape = micro.images.shape[-2:]
        maps = micro.images.new_full((count, *shape), -1.0)
        pixels = torch.zeros(count, *shape, dtype=torch.bool, device=device)
        truth = torch.zeros(count, dtype=torch.bool, device=device)
        teachers = [""] * count
        for one in micro.taught:
            mine = torch.arange(count, device=device) if one.rows is None else one.rows
            maps[mine], pixels[mine] = self._map_of(one)
            truth[mine] = one.labels.supervision.truth or s.pseudo == "direct"
            for row in mine.tolist():
                teachers[row] = one.teacher
        image = self._latents(micro, [""] * count, lambda at: self.network.encode(micro.images[at]))
        target = self._latents(micro, teachers, lambda at: self.network.encode_maps(maps[at]))
        pseudo = ~truth if s.pseudo == "filter" else torch.zeros_like(truth)
        valid = maths.pooled(pixels, self.network.factor)
        # Nothing is asked of an image without a valid pixel: its loss of 0 would be taken for a good one.
        usable = (valid if self.network.head is None else pixels).flatten(1).any(1)
        return _Rows(image, target, maps, pixels, valid, truth & usable, pseudo & usable)

    def _map_of(self, one: TaughtRows) -> tuple[Tensor, Tensor]:
        """A supervision's maps as the VAE takes them, of the quantity that is learnt; (b,S,S) each."""
        shared, s = one.labels.shared, self.settings
        values, valid = shared.values, shared.valid & torch.isfinite(shared.values)
        if shared.kind.quantity != self.network.kind.quantity:
            values, valid = self._other_quantity(shared)
        return maths.to_unit_range(values, valid, s.quantile)

    def _other_quantity(self, shared: DepthMap) -> tuple[Tensor, Tensor]:
        if shared.kind.unknown != "affine":
            known = shared.convert(self.network.kind)
            return known.values, known.valid
        s, valid = self.settings, shared.valid & torch.isfinite(shared.values)
        if s.pseudo_shape == "flipped":
            return -shared.values, valid
        return maths.inverted(shared.values, valid, quantile=s.quantile, reach=s.reach), valid

    def _latents(self, micro: MicroBatch, teachers: list[str], compute: Any) -> Tensor:
        """(B,4,h,w): found in the cache, or computed; of the images where a teacher is ""."""
        device = micro.images.device
        if self.cache is None:
            return compute(list(range(len(micro.keys))))
        names = [
            f"{key}|{int(turned)}|{teacher}"
            for key, turned, teacher in zip(micro.keys, micro.mirrored, teachers, strict=True)
        ]
        return stacked(self.cache.get(names, compute), device)

    # --- what is drawn ------------------------------------------------------------------------------------------------

    def _drawn(self, micro: MicroBatch, shape: torch.Size, *, lowest: int, shaped: bool) -> tuple[Tensor, Tensor]:
        """A noise level (B,), from `lowest` on, and noise (B,4,h,w) for each image; shaped: of several resolutions."""
        s, levels, noises = self.settings, [], []
        for position in micro.positions:
            held, place = int(position < 0), position if position >= 0 else -1 - position
            drawn = generator("latent", self.seed, held, place)
            level = lowest + int(drawn.integers(self.steps - lowest))
            torch_generator = torch.Generator().manual_seed(int(drawn.integers(2**62)))
            levels.append(level)
            if shaped and s.noise_strength:
                strength = torch.tensor(s.noise_strength) * (level / self.steps if s.noise_annealed else 1.0)
                noises.append(maths.multi_resolution_noise((1, *shape[1:]), strength, torch_generator))
            else:
                noises.append(torch.randn((1, *shape[1:]), generator=torch_generator))
        device = micro.images.device
        return torch.tensor(levels, device=device), torch.cat(noises).to(device)

    # --- the ways -----------------------------------------------------------------------------------------------------

    def _feed_forward(self, module: nn.Module, micro: MicroBatch, rows: _Rows) -> Measured:
        s, count = self.settings, len(micro.keys)
        levels, noise = self._drawn(micro, rows.image.shape, lowest=s.first_index, shaped=False)
        times = torch.full((count,), s.timestep, device=rows.image.device)
        if s.random_timestep:
            times = self._random_times(micro)
        keeping = rows.truth.nonzero()[:, 0] if s.trajectory and self.network.head is None else rows.truth[:0].long()
        alphas = self.network.alphas.to(rows.image.device)[levels][keeping]
        together = s.blend_depth == "truth" and len(keeping) > 0
        clean = s.blend * rows.image[keeping] + (1.0 - s.blend) * rows.target[keeping]
        if together:  # one pass for both: blended latents need not wait for the map
            noisy = maths.add_noise(clean, noise[keeping], alphas)
            out = module(torch.cat([rows.image, noisy]), torch.cat([times, levels[keeping]])).float()
            raw, kept = out[:count], out[count:]
        else:
            raw = module(rows.image, times).float()
        found = raw if self.network.head is not None else -raw if s.negated else raw
        if not together and len(keeping):
            clean = s.blend * rows.image[keeping] + (1.0 - s.blend) * found[keeping].detach()
            noisy = maths.add_noise(clean, noise[keeping], alphas)
            kept = module(noisy, levels[keeping]).float()
        with torch.autocast(micro.images.device.type, enabled=False):
            losses, parts = self._against_truth(rows, found)
            if len(keeping):
                wanted = maths.velocity(clean, noise[keeping], alphas)
                each = maths.latent_distance(kept, wanted, rows.valid[keeping], squared=True)
                losses = losses.index_add(0, keeping, s.trajectory * each)
                parts["trajectory"] = each
        if bool(rows.pseudo.any()) and self.network.head is None:
            losses = self._filtered(module, rows, found, losses, parts)
        return self._measured(rows, found, losses, parts)

    def _random_times(self, micro: MicroBatch) -> Tensor:
        drawn = [
            int(generator("timestep", self.seed, int(p < 0), max(p, -1 - p)).integers(self.steps))
            for p in micro.positions
        ]
        return torch.tensor(drawn, device=micro.images.device)

    def _prior(self, module: nn.Module, micro: MicroBatch, rows: _Rows) -> Tensor:
        """The loss (B,) of the base's own task, a mean over PRIOR_LEVELS; each image's noise is the same for ever."""
        total = rows.image.new_zeros(len(rows.image))
        for level in PRIOR_LEVELS:
            noises = [
                torch.randn(
                    (1, *rows.image.shape[1:]),
                    generator=torch.Generator().manual_seed(int(generator("prior", level, place).integers(2**62))),
                )
                for place in (max(p, -1 - p) for p in micro.positions)
            ]
            noise = torch.cat(noises).to(rows.image)
            levels = torch.full((len(noise),), level, device=noise.device)
            alphas = self.network.alphas.to(noise.device)[levels]
            out = module(maths.add_noise(rows.image, noise, alphas), levels).float()
            total = total + (out - maths.velocity(rows.image, noise, alphas)).square().mean((1, 2, 3))
        return total / len(PRIOR_LEVELS)

    def _against_truth(self, rows: _Rows, found: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses (B,) of what the one pass found, 0 where its image is not taught so, and their parts."""
        s, mine = self.settings, rows.truth.nonzero()[:, 0]
        losses = found.new_zeros(len(found)) + 0.0 * found.sum()  # every process has a gradient, whatever its images
        parts: dict[str, Tensor] = {}
        if not len(mine):
            return losses, parts
        total = found.new_zeros(len(mine))
        if self.network.head is None:
            total = total + self._in_latents(found[mine], rows.target[mine], rows.valid[mine], parts, "")
        if any(s.image_weights) or self.network.head is not None:
            maps = found[mine] if self.network.head is not None else self.network.decode(found[mine])
            total = total + self._in_images(maps, rows.maps[mine], rows.pixels[mine], parts)
        return losses.index_add(0, mine, total), parts

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
        """The losses with those of pseudo-labelled images: of what the filter's pass makes of the map."""
        s, mine = self.settings, rows.pseudo.nonzero()[:, 0]
        given = found[mine] if s.filter_gradient else found[mine].detach()
        times = torch.full((len(mine),), s.filter_timestep, device=found.device)
        out = module(given, times).float()
        with torch.autocast(found.device.type, enabled=False):
            pred = -out if s.negated else out
            total = self._in_latents(pred, rows.target[mine], rows.valid[mine], parts, "filter_")
        return losses.index_add(0, mine, total)

    def _denoise(self, module: nn.Module, micro: MicroBatch, rows: _Rows) -> Measured:
        levels, noise = self._drawn(micro, rows.image.shape, lowest=0, shaped=True)
        alphas = self.network.alphas.to(rows.image.device)[levels]
        noisy = maths.add_noise(rows.target, noise, alphas)
        out = module(torch.cat([rows.image, noisy], dim=1), levels).float()
        taught = rows.truth | (rows.pseudo if self.settings.pseudo == "filter" else rows.truth)
        with torch.autocast(micro.images.device.type, enabled=False):
            wanted = maths.velocity(rows.target, noise, alphas)
            each = maths.latent_distance(out, wanted, rows.valid & taught[:, None, None], squared=True)
            found = maths.denoised(noisy, out, alphas)
        return self._measured(rows, found, each, {"velocity": each})

    def _measured(self, rows: _Rows, found: Tensor, losses: Tensor, parts: dict[str, Tensor]) -> Measured:
        taught = rows.truth | rows.pseudo
        if found.ndim == 3:
            return Measured(losses, parts, found.detach(), rows.maps, rows.pixels, taught)
        return Measured(losses, parts, found.detach().mean(1), rows.target.mean(1), rows.valid, taught)
