"""Depth Anything 3 on single images: mono and main series (depth up to scale) and metric (metres).

Reads the authors' model.safetensors and config.json. Depth, larger is farther, unlike Depth Anything V2.

Surprises: mono and metric have the same configuration, only the name tells them apart. The authors replace the sky by
a quantile over the whole batch, from a random sample above 100,000 pixels; here it is per image and over every pixel,
so that a batch of N equals N batches of one. The metric model's output becomes metres only with the focal length.

Sources: ByteDance-Seed/Depth-Anything-3 src/depth_anything_3/model/da3.py (sky), utils/io/input_processor.py
(resizing), README (metres = focal * output / 300).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from distill.core import crops
from distill.core.depth import DepthMap, Kind
from distill.core.weights import ANY
from distill.teachers import (
    Card,
    WeightsMismatchError,
    below_prefix,
    card_for,
    check_images,
    check_resize,
    find_weights,
    finite,
    load_strictly,
    pad_to_multiple,
    read_config,
    read_state,
    resolve,
    revision_of,
    sizing_tensors,
)
from distill.teachers._da3_network import Network, NetworkLayout
from distill.teachers._dino import PATCH, normalize
from distill.teachers._sky import QUANTILE, far_in_the_sky
from distill.teachers._where import inner_table

NATIVE = 504
CANONICAL = 300.0  # pixels: the focal length for which the metric model's output is metres
SKY = 0.3  # the sky map's threshold; 0.3 itself is sky
SKIES = ("keep", "far", "invalid")


def _card(weights: str, *, kind: Kind = Kind.SCALE_DEPTH, licence: str = "Apache-2.0", note: str = "") -> Card:
    return Card(
        name="depth_anything_3",
        weights=weights,
        kind=kind,
        licence=licence,
        code_licence="Apache-2.0",
        commercial=licence == "Apache-2.0",
        multiple=PATCH,
        native_size=NATIVE,
        source="ByteDance-Seed/Depth-Anything-3",
        note=note,
    )


FILES = ("config.json", "model*.safetensors", "*.index.json")
"""Files read from a hub repository."""
CARDS: tuple[Card, ...] = (
    _card("depth-anything/DA3MONO-LARGE", note="knows sky"),
    _card("depth-anything/DA3METRIC-LARGE", kind=Kind.METRIC_DEPTH, note="knows sky; needs the focal length"),
    _card("depth-anything/DA3-SMALL"),
    _card("depth-anything/DA3-BASE"),
    _card("depth-anything/DA3-LARGE-1.1", licence="CC-BY-NC-4.0"),
    _card("depth-anything/DA3-GIANT-1.1", licence="CC-BY-NC-4.0"),
)

# Blocks that the head reads where no config.json says so: by (is main series, number of blocks).
_TAPS = {
    (False, 12): (2, 5, 8, 11),
    (False, 24): (4, 11, 17, 23),
    (True, 12): (5, 7, 9, 11),
    (True, 24): (11, 15, 19, 23),
    (True, 40): (19, 27, 33, 39),
}
# Parts of the main series that one view's depth does not need: poses, rays, gaussians. The rays' shared layer norm
# appears under one name or four.
_UNUSED = re.compile(r"(cam_enc|cam_dec|gs_head|gs_adapter)\.|head\.scratch\.(refinenet\d|output_conv\d)_aux\.")


def native_shapes(height: int, width: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The authors' upper-bound rule, both steps: the long side at `size`, then each side the nearest 14 (ties up)."""
    scale = size / max(height, width)
    first = (height, width) if max(height, width) == size else (round(height * scale), round(width * scale))
    rows, columns = (max(1, (2 * side + PATCH) // (2 * PATCH)) * PATCH for side in first)
    return (max(1, first[0]), max(1, first[1])), (rows, columns)


def resize_native(images: Tensor, size: int) -> Tensor:
    """(B,3,H,W) resized by the authors' rule: OpenCV on 8-bit values, area when shrinking and cubic when growing.

    An image with values outside [0,1] has no 8-bit form: it is resized in float32, unclamped.
    """
    steps = native_shapes(images.shape[-2], images.shape[-1], size)
    if all(step == tuple(images.shape[-2:]) for step in steps):
        return images
    arrays = images.detach().permute(0, 2, 3, 1).cpu().numpy()
    out = torch.from_numpy(np.stack([_resized(array, steps) for array in arrays]))
    return out.permute(0, 3, 1, 2).to(images.device)


def _resized(array: np.ndarray, steps: tuple[tuple[int, int], tuple[int, int]]) -> np.ndarray:
    is_8bit = bool(array.min() >= 0 and array.max() <= 1)
    image: np.ndarray = np.round(array * 255).astype(np.uint8) if is_8bit else array
    for rows, columns in steps:
        height, width = image.shape[:2]
        if (rows, columns) != (height, width):
            interpolation = cv2.INTER_CUBIC if rows > height or columns > width else cv2.INTER_AREA
            image = cv2.resize(image, (columns, rows), interpolation=interpolation)
    return image.astype(np.float32) / 255 if is_8bit else image


def sky_to_far(depth: Tensor, sky: Tensor) -> Tensor:
    """(H,W) depth with the sky at the 99 % quantile of the rest; unchanged if either has 10 pixels or fewer.

    Every pixel counts, however many (torch.quantile itself stops at 16 million).
    """
    is_sky = sky >= SKY
    return far_in_the_sky(depth, is_sky, ~is_sky, QUANTILE)[0]


class Teacher:
    """Depth Anything 3 on [0,1] images, one view each."""

    def __init__(
        self,
        network: Network,
        card: Card,
        *,
        resize: str = "native",
        native_size: int | None = None,
        sky: str = "far",
        focal: float | None = None,
    ) -> None:
        check_resize(resize, native_size)
        if sky not in SKIES:
            raise ValueError(f"sky must be one of {', '.join(SKIES)}, not {sky!r}")
        if focal is not None and card.kind != Kind.METRIC_DEPTH:
            raise ValueError(f"focal is for the metric checkpoint; {card.weights} gives {card.kind}")
        self.network = network
        self.card = card
        self.resize = resize
        self.native_size = native_size or card.native_size or NATIVE
        self.sky = sky
        self.focal = focal

    @property
    def sees_sky(self) -> bool:
        """Whether the checkpoint has a sky head (mono and metric)."""
        return hasattr(self.network.head.scratch, "sky_output_conv2")

    @classmethod
    def load(
        cls,
        weights: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resize: str = "native",
        native_size: int | None = None,
        sky: str = "far",
        focal: float | None = None,
        weights_key: str | None = None,
    ) -> Teacher:
        """A teacher from the authors' folder (model.safetensors, config.json), a bare weights file, or a hub id.

        dtype: the backbone's; the head is float32, as the authors'. sky: "far" is the authors' (99 % quantile of the
        rest), "keep" leaves the network's values, "invalid" marks it; ignored without a sky head. focal: of the metric
        checkpoint's images, in pixels at their own size; by default 300 px at the network's size is assumed.
        weights_key: the table to read in a trainer's file, such as "model_ema" (core.weights.read_state).
        """
        path = resolve(weights, files=FILES)
        file = find_weights(path, ANY)
        config_file = file.parent / "config.json"
        config = read_config(config_file)
        net = inner_table(inner_table(config, "config", config_file) or config, "net", config_file)
        state = read_state(file, weights_key=weights_key)
        if not any("da3_metric." in key for key in state):  # nested: two networks, which _layout rejects
            state = below_prefix(state, ("backbone.pretrained.pos_embed",), file)
        state = {key.removeprefix("model."): tensor for key, tensor in state.items()}
        state = {key: tensor for key, tensor in state.items() if not _UNUSED.match(key)}
        with torch.device("meta"):  # drawing random weights takes longer than reading the file
            network = Network(_layout(state, net, file))
        load_strictly(network, state, file, what="Depth Anything 3")
        network = network.eval().to(device)
        network.backbone.to(dtype)
        network.head.float()
        card = replace(card_for(CARDS, weights), revision=revision_of(file), native_size=native_size or NATIVE)
        name = str(config.get("model_name") or "/".join(file.parts[-2:]))
        if "metric" in name.lower() or card.kind == Kind.METRIC_DEPTH:
            note = card.note if focal else "no focal length given: metres for 300 px at the network's size"
            card = replace(card, kind=Kind.METRIC_DEPTH, note=note)
        return cls(network, card, resize=resize, native_size=native_size, sky=sky, focal=focal)

    @property
    def takes_focal(self) -> bool:
        """Whether `predict` accepts each image's focal length."""
        return self.card.kind == Kind.METRIC_DEPTH and self.focal is None

    def assumed_focal(self, height: int, width: int) -> float | None:
        """The focal length in pixels of an image of this size for which the metric checkpoint's metres hold."""
        if self.card.kind != Kind.METRIC_DEPTH or self.focal is not None:
            return self.focal
        if self.resize != "native":
            return CANONICAL
        return CANONICAL * width / native_shapes(height, width, self.native_size)[-1][1]

    @torch.no_grad()
    def predict(self, images: Tensor, *, focal: float | None = None) -> DepthMap:
        """(B,3,H,W) in [0,1] -> (B,H,W) depth > 0, larger is farther; sky as set in `load`.

        focal: of the metric checkpoint's images, in pixels, in place of the option of `load`.
        """
        images = check_images(images)
        height, width = images.shape[-2:]
        native = self.resize == "native"
        sized = resize_native(images, self.native_size) if native else pad_to_multiple(images, PATCH)
        device = next(self.network.parameters()).device
        depth, sky = self.network(normalize(sized.to(device)))
        if not native:
            depth, sky = depth[:, :height, :width], None if sky is None else sky[:, :height, :width]
        focal = self.focal if focal is None else focal
        if focal is not None:
            depth = depth * (focal * (sized.shape[-1] / width if native else 1.0) / CANONICAL)
        valid = torch.ones(len(images), height, width, dtype=torch.bool, device=device)
        if sky is not None and self.sky == "far":
            depth = torch.stack([sky_to_far(*pair) for pair in zip(depth, sky, strict=True)])
        if sky is not None and self.sky == "invalid":
            # Pixels that interpolation mixed with sky are not valid depth.
            valid = crops.resize((sky >= SKY).float()[:, None], height, width)[:, 0] < 1e-6
        depth = crops.resize(depth[:, None], height, width)[:, 0]
        out = finite(depth, self.card.kind)
        return DepthMap(out.values, out.valid & valid, out.kind).to(images.device)


def _layout(state: dict[str, Tensor], net: dict[str, Any], where: Path) -> NetworkLayout:
    """Sizes from the tensors; the blocks that the head reads from config.json, else those of the published layouts.

    net: config.json's table of the network.
    """
    if any(key.startswith(("da3.", "da3_metric.")) for key in state):
        raise WeightsMismatchError(f"{where} holds two networks (nested): use DA3METRIC-LARGE or DA3-GIANT-1.1")
    first = "backbone.pretrained.blocks.0"
    swiglu = f"{first}.mlp.w3.weight" in state
    dimensions = {"backbone.pretrained.pos_embed": 3, "head.scratch.output_conv1.weight": 4}
    dimensions |= {f"{first}.mlp.{'w3' if swiglu else 'fc2'}.weight": 2}
    dimensions |= {f"head.projects.{i}.weight": 4 for i in range(4)}
    table, fused, last, *projects = sizing_tensors(state, dimensions, where, what="Depth Anything 3")
    width = table.shape[-1]
    numbers = [int(key.split(".")[3]) for key in state if key.startswith("backbone.pretrained.blocks.")]
    blocks = 1 + max(numbers, default=-1)
    normalized = [int(key.split(".")[3]) for key in state if key.endswith("attn.q_norm.weight")]
    main_from = min(normalized) if normalized else None
    stated = net.get("out_layers") or _TAPS.get((main_from is not None, blocks), ())
    taps = tuple(stated) if isinstance(stated, list | tuple) else ()
    are_blocks = len(taps) == 4 and all(type(tap) is int and 0 <= tap < blocks for tap in taps)
    starts = [net.get(key) for key in ("alt_start", "qknorm_start", "rope_start")]
    if not are_blocks or len(set(taps)) < 4 or any(start not in (None, -1, main_from) for start in starts):
        raise WeightsMismatchError(
            f"{where}: {blocks} blocks of width {width} do not fit a published layout or config.json"
        )
    norms = {f"backbone.pretrained.blocks.{main_from}.attn.q_norm.weight": 1} if normalized else {}
    size = next((t.shape[0] for t in sizing_tensors(state, norms, where, what="Depth Anything 3")), 64)
    return NetworkLayout(
        width=width,
        blocks=blocks,
        heads=max(1, width // size),
        hidden=last.shape[-1],
        swiglu=swiglu,
        positions=table.shape[1],
        taps=taps,
        main_from=main_from,
        features=fused.shape[1],
        channels=tuple(p.shape[0] for p in projects),
        sky="head.scratch.sky_output_conv2.0.weight" in state,
    )
