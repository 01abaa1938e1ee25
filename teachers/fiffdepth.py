"""FiffDepth: a diffusion UNet used as a feed-forward network; affine depth in [0,1], far is 1.

One pass at t = 0 under the empty prompt: the UNet's raw output on the image's latent is the depth latent (GenPercept's
has the other sign). No scheduler, no noise. The authors published no checkpoint; any folder of that layout is read, and
those that `distill train` writes (recipes/fiffdepth), which state whether they predict depth or disparity.

Source: yunpeng1998/FiffDepth fiffdepth/direct_pipeline.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distill.core.depth import DepthMap, Kind
from distill.teachers import Card, card_for, check_images, check_resize, revision_of
from distill.teachers._latent import (
    FILES,
    MULTIPLE,
    NATIVE,
    Parts,
    check_one_step,
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

CARDS: tuple[Card, ...] = (
    Card(
        name="fiffdepth",
        weights="checkpoints/fiffdepth",
        kind=Kind.AFFINE_DEPTH,
        licence="unknown",
        code_licence="none stated (Apache-2.0 headers)",
        commercial=False,
        multiple=MULTIPLE,
        native_size=NATIVE,
        source="yunpeng1998/FiffDepth",
        note="not published; give the folder that recipes/fiffdepth trains",
    ),
)


class Teacher:
    """FiffDepth on [0,1] images."""

    def __init__(self, parts: Parts, card: Card, *, resize: str = "native", native_size: int | None = None) -> None:
        check_resize(resize, native_size, zero_is_given=True)
        self.parts = parts
        self.card = card
        self.resize = resize
        self.native_size = default_size(native_size, parts)

    @classmethod
    def load(
        cls,
        weights: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resize: str = "native",
        native_size: int | None = None,
        steps: int = 1,
        ensemble: int = 1,
    ) -> Teacher:
        """A teacher from a diffusers folder without scheduler. native_size: the long side (0: as given, unpadded).

        steps, ensemble: must be 1, because nothing is denoised.
        """
        check_one_step("FiffDepth", steps, ensemble)
        folder = find_folder(weights, files=FILES)
        parts = load_parts(folder, device=device, dtype=dtype, what="FiffDepth", channels=4)
        size = default_size(native_size, parts)
        card = trained_card(card_for(CARDS, weights), folder)
        card = replace(card, revision=revision_of(folder), native_size=size, multiple=parts.factor)
        return cls(parts, card, resize=resize, native_size=native_size)

    @torch.no_grad()
    def predict(self, images: Tensor, *, noise: Tensor | None = None) -> DepthMap:
        """(B,3,H,W) in [0,1] -> (B,H,W) affine depth in [0,1].

        noise: ignored, because none is drawn; accepted for the diffusion teachers' common signature.
        """
        images = check_images(images)
        sized = prepare(images, resize=self.resize, native_size=self.native_size, factor=self.parts.factor)
        latents = run_unet(self.parts, encode(self.parts, sized), 0)
        return restore(decode(self.parts, latents), images, sized, resize=self.resize, kind=self.card.kind)
