"""Marigold: a latent diffusion model that denoises a depth map beside the image; affine depth in [0,1], far is 1.

Reads the authors' diffusers folders (v1-0, v1-1, LCM); the scheduler is the folder's own. The prediction depends on the
noise. Without `keys` every image starts from the same seed, as in the authors' evaluation; with `keys` the noise is a
function of (seed, key), so a label does not depend on its place in a batch.

Surprise: the last step uses the first training noise level, not zero (set_alpha_to_one is false in the published
schedulers), and three steps of a trailing scheduler do not step to one another's timesteps. Both are kept.

Source: prs-eth/Marigold marigold/marigold_depth_pipeline.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.core.crops import generator
from distill.core.depth import DepthMap, Kind
from distill.teachers import (
    Card,
    WeightsMismatchError,
    WeightsMissingError,
    card_for,
    check_images,
    check_resize,
    read_config,
    revision_of,
)
from distill.teachers._ensemble import ensemble as combine
from distill.teachers._latent import (
    FILES,
    MULTIPLE,
    NATIVE,
    Parts,
    decode,
    default_size,
    encode,
    find_folder,
    load_parts,
    prepare,
    restore,
    run_unet,
)
from distill.teachers._trained import trained_card
from distill.teachers._where import described_by

MEMBERS_AT_ONCE = 4  # on an accelerator; one on a CPU, as the authors do, for a bitwise equal ensemble


def _card(weights: str, note: str) -> Card:
    return Card(
        name="marigold",
        weights=weights,
        kind=Kind.AFFINE_DEPTH,
        licence="OpenRAIL++-M",
        code_licence="Apache-2.0",
        commercial=True,
        multiple=MULTIPLE,
        native_size=NATIVE,
        source="prs-eth/Marigold",
        note=note,
        seeded=True,
    )


CARDS: tuple[Card, ...] = (
    _card("prs-eth/marigold-depth-v1-1", "4 steps by default; the licence restricts some uses"),
    _card("prs-eth/marigold-depth-v1-0", "10 steps by default; the paper's tables use 50, ensemble 10"),
    _card("prs-eth/marigold-depth-lcm-v1-0", "1 to 4 steps; deprecated by its authors"),
)


class Teacher:
    """Marigold on [0,1] images."""

    def __init__(
        self,
        parts: Parts,
        scheduler: Any,
        card: Card,
        *,
        resize: str = "native",
        native_size: int | None = None,
        steps: int | None = None,
        ensemble: int = 1,
        seed: int = 1234,
    ) -> None:
        check_resize(resize, native_size, zero_is_given=True)
        self.scheduler = scheduler
        self.steps = steps if steps is not None else parts.index.get("default_denoising_steps") or 4
        consistency = self._draws_between_steps
        if self.steps < 1 or (consistency and self.steps > 4):
            raise ValueError(f"steps must be {'1 to 4' if consistency else 'at least 1'}, not {self.steps}")
        if ensemble < 1:
            raise ValueError(f"ensemble must be at least 1, not {ensemble}")
        self.parts = parts
        self.card = card
        self.resize = resize
        self.native_size = default_size(native_size, parts)
        self.ensemble = ensemble
        self.seed = seed

    @classmethod
    def load(
        cls,
        weights: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resize: str = "native",
        native_size: int | None = None,
        steps: int | None = None,
        ensemble: int = 1,
        seed: int = 1234,
    ) -> Teacher:
        """A teacher from a diffusers folder or hub id.

        native_size: the long side (0: as given, without padding, as the authors evaluate NYUv2 and KITTI). steps: of
        the scheduler, the checkpoint's default unless given. ensemble: predictions per image, which are aligned and
        combined by their median. seed: of the noise, 1234 as in the authors' scripts.
        """
        folder = find_folder(weights, files=FILES)
        pipeline_class = str(read_config(folder / "model_index.json").get("_class_name", ""))
        if re.search(r"Normals|Intrinsics|IID", pipeline_class):  # their parts have the same sizes
            raise WeightsMismatchError(f"{folder} is a {pipeline_class} by its model_index.json, which gives no depth")
        scheduler = load_scheduler(folder / "scheduler")
        parts = load_parts(folder, device=device, dtype=dtype, what="Marigold", channels=8)
        size = default_size(native_size, parts)
        card = trained_card(card_for(CARDS, weights), folder)
        card = replace(card, revision=revision_of(folder), native_size=size, multiple=parts.factor)
        return cls(
            parts, scheduler, card, resize=resize, native_size=native_size, steps=steps, ensemble=ensemble, seed=seed
        )

    @torch.no_grad()
    def predict(self, images: Tensor, *, noise: Tensor | None = None, keys: Sequence[str] | None = None) -> DepthMap:
        """(B,3,H,W) in [0,1] -> (B,H,W) affine depth in [0,1].

        noise: (B x ensemble, 4, h, w) latents in place of drawn ones, an image's members next to one another.
        keys: one per image; the noise is then drawn from (seed, key).
        """
        images = check_images(images)
        if keys is not None and len(keys) != len(images):
            raise ValueError(f"{len(keys)} keys for {len(images)} images: give one each")
        sized = prepare(images, resize=self.resize, native_size=self.native_size, factor=self.parts.factor)
        context = encode(self.parts, sized)
        if noise is not None and noise.shape != (len(images) * self.ensemble, *context.shape[1:]):
            expected_shape = (len(images) * self.ensemble, *context.shape[1:])
            raise ValueError(f"noise must be (B x ensemble, 4, h, w) = {expected_shape}, not {tuple(noise.shape)}")
        generators = [self._generator(keys[i] if keys is not None else None) for i in range(len(images))]
        if self.ensemble == 1:
            values = self._denoise(context, self._draw(generators, context) if noise is None else noise, generators)
        else:
            given = [None] * len(images) if noise is None else noise.split(self.ensemble)
            values = torch.stack([self._members(*one) for one in zip(context, given, generators, strict=True)])
        return restore(values, images, sized, resize=self.resize, kind=self.card.kind)

    def _generator(self, key: str | None) -> torch.Generator:
        """A generator on the CPU, so that every device starts from the same noise."""
        seed = self.seed if key is None else int(generator("noise", self.seed, key).integers(2**62))
        return torch.Generator().manual_seed(seed)

    def _draw(self, generators: Sequence[torch.Generator], context: Tensor) -> Tensor:
        """(N,4,h,w), one by one from N generators: drawing N at once gives other numbers for some sizes."""
        shape = (1, *context.shape[-3:])
        return torch.cat([torch.randn(shape, generator=g) for g in generators])

    def _members(self, context: Tensor, noise: Tensor | None, generator: torch.Generator) -> Tensor:
        """One image's ensemble, computed alone: the alignment is chaotic, and its batch must not change the result.

        A consistency scheduler's members draw from the same generator in turn, so that each is finished before the
        next one starts, as at the authors' batch size of one.
        """
        at_once = 1 if context.device.type == "cpu" or self._draws_between_steps else MEMBERS_AT_ONCE
        members = []
        for start in range(0, self.ensemble, at_once):
            each = [generator] * min(at_once, self.ensemble - start)
            part = self._draw(each, context) if noise is None else noise[start : start + len(each)]
            members.append(self._denoise(context.expand(len(part), -1, -1, -1), part, each))
        return combine(torch.cat(members))

    @property
    def _draws_between_steps(self) -> bool:
        """Whether the scheduler is a consistency one, which draws noise at every step but the last."""
        return type(self.scheduler).__name__ == "LCMScheduler"

    def _denoise(self, context: Tensor, noise: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Latents (N,4,h,w) of images and noise -> maps (N,H,W) in [0,1]."""
        latents = noise.to(context)
        self.scheduler.set_timesteps(self.steps, device=context.device)
        options = {"generator": generators} if self._draws_between_steps else {}
        for timestep in self.scheduler.timesteps:
            out = run_unet(self.parts, torch.cat([context, latents], dim=1), timestep)
            latents = self.scheduler.step(out, timestep, latents, **options).prev_sample
        return decode(self.parts, latents)


def load_scheduler(folder: Path) -> Any:
    """The scheduler that scheduler_config.json names: DDIM, or LCM for the consistency checkpoint."""
    import diffusers

    file = folder / "scheduler_config.json"
    if not file.is_file():
        raise WeightsMissingError(f"{folder} has no scheduler_config.json: complete the folder, or it is no Marigold")
    table = read_config(file)
    name = table.get("_class_name")
    if name not in ("DDIMScheduler", "LCMScheduler"):
        raise WeightsMismatchError(f"{file}: Marigold is sampled with DDIMScheduler or LCMScheduler, not {name}")
    with described_by(file, "Marigold's scheduler"):
        return getattr(diffusers, name).from_config(table)
