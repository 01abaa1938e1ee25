"""MiDaS v3.1 (DPT on BEiT), from the authors' files or Intel's hub folders: affine disparity, larger is nearer.

Source of the resizing: isl-org/MiDaS midas/transforms.py and run.py ("minimal": the side that changes least decides;
each side the nearest multiple of 32; cubic), output bicubic.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.depth import DepthMap, Kind
from distill.teachers import (
    Card,
    WeightsMismatchError,
    _midas_file,
    card_for,
    check_images,
    check_resize,
    finite,
    pad_to_multiple,
    read_config,
    resolve,
    revision_of,
)
from distill.teachers._described import build_described, described_config, read_either
from distill.teachers._resize import resize_cubic
from distill.teachers._where import inner_table

MULTIPLE = 32  # patches of 16, and a decoder level at half of them


def _card(weights: str, native_size: int) -> Card:
    return Card(
        name="midas",
        weights=weights,
        kind=Kind.AFFINE_DISPARITY,
        licence="MIT",
        code_licence="MIT",
        commercial=True,
        multiple=MULTIPLE,
        native_size=native_size,
        source="isl-org/MiDaS",
        note="v3.1",
    )


FILES = ("config.json", "model*.safetensors", "*.index.json")
"""Files read from a hub repository."""
CARDS: tuple[Card, ...] = (
    _card("Intel/dpt-beit-large-512", 512),
    _card("Intel/dpt-beit-large-384", 384),
    _card("Intel/dpt-beit-base-384", 384),
)


def native_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """The authors' rule: of the two scales that bring a side to `size`, the one nearer to 1; multiples of 32."""
    scale = min(size / height, size / width, key=lambda s: abs(1 - s))
    rows, columns = (max(1, int(np.round(side * scale / MULTIPLE))) * MULTIPLE for side in (height, width))
    return rows, columns


class Teacher:
    """MiDaS v3.1 on [0,1] images."""

    def __init__(self, model: Any, card: Card, *, resize: str = "native", native_size: int | None = None) -> None:
        check_resize(resize, native_size)
        self.model = model
        self.card = card
        self.resize = resize
        self.native_size = native_size or card.native_size or 512

    @classmethod
    def load(
        cls,
        weights: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resize: str = "native",
        native_size: int | None = None,
    ) -> Teacher:
        """A teacher from the authors' own file (dpt_beit_*.pt), or a transformers folder or hub id of DPT on BEiT.

        native_size: overrides the size that the backbone was trained at.
        """
        check_resize(resize, native_size)
        path = resolve(weights, files=FILES)
        names = ("*.pt", "*.pth", "*.safetensors", "*.ckpt", "*.bin")
        path, state, folder = read_either(path, names, anchor=_ANCHOR, authors=(_midas_file.ANCHOR,))
        config = _midas_file.config_of(state, path) if folder is None else _described_config(folder)
        state = _midas_file.to_transformers_names(state) if folder is None else state
        model = _network(config, state, path)
        size = native_size or _trained_at(model)
        card = replace(card_for(CARDS, weights), revision=revision_of(path), native_size=size)
        model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        return cls(model, card, resize=resize, native_size=native_size)

    @torch.no_grad()
    def predict(self, images: Tensor) -> DepthMap:
        """(B,3,H,W) in [0,1] -> (B,H,W) affine disparity, larger is nearer."""
        images = check_images(images)
        height, width = images.shape[-2:]
        native = self.resize == "native"
        if native:
            sized = resize_cubic(images, *native_shape(height, width, self.native_size))
        else:
            sized = pad_to_multiple(images, MULTIPLE)
        parameter = next(self.model.parameters())
        inputs = ((sized - 0.5) / 0.5).to(device=parameter.device, dtype=parameter.dtype)
        values = self.model(pixel_values=inputs).predicted_depth.float()
        if native and values.shape[-2:] != (height, width):
            values = F.interpolate(values[:, None], (height, width), mode="bicubic", align_corners=False)[:, 0]
        return finite(values[:, :height, :width].to(images.device), self.card.kind)


def _trained_at(model: Any) -> int:
    size = model.config.backbone_config.image_size
    return int(size if isinstance(size, int) else max(size))


_ANCHOR = "backbone.embeddings.cls_token"  # of transformers' files


def _network(config: Any, state: dict[str, Tensor], where: Path) -> Any:
    from transformers import DPTForDepthEstimation

    optional = ("relative_position_index",)  # a fixed table that older files carry
    return build_described(DPTForDepthEstimation, config, state, where, what="MiDaS v3.1", optional=optional)


def _described_config(folder: Path) -> Any:
    from transformers import DPTConfig

    described = read_config(folder / "config.json")
    backbone = inner_table(described, "backbone_config", folder / "config.json").get("model_type")
    if (described.get("model_type"), backbone) != ("dpt", "beit"):
        raise WeightsMismatchError(
            f"{folder / 'config.json'} describes a {described.get('model_type')} model on {backbone}: MiDaS v3.1 here "
            "is dpt on beit"
        )
    return described_config(DPTConfig, folder, what="MiDaS v3.1")
