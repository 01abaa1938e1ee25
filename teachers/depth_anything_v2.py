"""Depth Anything V2, and Distill-Any-Depth's checkpoints, which are the same function: affine disparity.

Reads the authors' own files (.pth, .safetensors) and transformers' `-hf` folders; the network is transformers'.

Three surprises. The authors interpolate the position table by a scale factor with an offset of 0.1, transformers by
size: outputs differ by about 1e-3 unless the input is 518 x 518, so the authors' rule is restored. The metric
checkpoints have the relative ones' names and shapes: only `max_depth` tells them apart. (So have V1's, which read
other blocks; they are rejected by name.) And Distill-Any-Depth's own code squashes every image to a square of 700,
where Depth Anything keeps the aspect.

Sources: DepthAnything/Depth-Anything-V2 depth_anything_v2/dpt.py, dinov2.py and util/transform.py (resizing);
Westlake-AGI-Lab/Distill-Any-Depth distillanydepth/modeling/archs/dam/dam.py (names), tools/testers/infer.py (resizing).
"""

from __future__ import annotations

import re
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
    card_for,
    check_claimed,
    check_images,
    check_resize,
    find_weights,
    finite,
    mentions,
    pad_to_multiple,
    read_config,
    resolve,
    revision_of,
    sizing_tensors,
)
from distill.teachers._described import build_described, described_config, is_described, read_either
from distill.teachers._dino import PATCH, TRANSFORMERS_NAMES, normalize, position_table, to_transformers
from distill.teachers._resize import resize_cubic

NATIVE = 518
FILES = ("*.pth", "*.safetensors", "config.json", "*.index.json")
"""Files read from a hub repository."""
SQUARE = 700  # of Distill-Any-Depth


def _card(weights: str, licence: str, *, note: str = "") -> Card:
    return Card(
        name="depth_anything_v2",
        weights=weights,
        kind=Kind.AFFINE_DISPARITY,
        licence=licence,
        code_licence="Apache-2.0",
        commercial=licence == "Apache-2.0",
        multiple=PATCH,
        native_size=NATIVE,
        source="DepthAnything/Depth-Anything-V2",
        note=note,
    )


def _distilled(weights: str, native_size: int, *, teachers: str = "several teachers") -> Card:
    card = _card(f"xingyang1/{weights}", "MIT", note=f"{_FROM}; taught by {teachers}")
    return replace(card, code_licence="MIT", native_size=native_size, source="Westlake-AGI-Lab/Distill-Any-Depth")


# MIT is what its repository states; the weights come from CC-BY-NC ones, hence not commercial (its issues 32 and 40).
_FROM = "MIT stated, but trained from Depth Anything V2-Large, which is CC-BY-NC-4.0"
CARDS: tuple[Card, ...] = (
    _card("depth-anything/Depth-Anything-V2-Large", "CC-BY-NC-4.0"),
    _card("depth-anything/Depth-Anything-V2-Base", "CC-BY-NC-4.0"),
    _card("depth-anything/Depth-Anything-V2-Small", "Apache-2.0"),
    _card("depth-anything/Depth-Anything-V2-Large-hf", "CC-BY-NC-4.0", note="transformers layout"),
    _card("depth-anything/Depth-Anything-V2-Base-hf", "CC-BY-NC-4.0", note="transformers layout"),
    _card("depth-anything/Depth-Anything-V2-Small-hf", "Apache-2.0", note="transformers layout"),
    _distilled("Distill-Any-Depth/large/model.safetensors", SQUARE),
    _distilled("Distill-Any-Depth/base/model.safetensors", SQUARE),
    _distilled("Distill-Any-Depth/small/model.safetensors", SQUARE),
    _distilled("Distill-Any-Depth-Large-hf", NATIVE),
    _distilled(
        "Distill-Any-Depth/Distill-Any-Depth-Dav2-Teacher-Large-2w-iter",
        SQUARE,
        teachers="Depth Anything V2-Large alone, as in the paper's Table 5",
    ),
)

# (width, blocks) -> blocks whose tokens the decoder reads, counted from 1 as transformers does.
_TAPS = {
    (384, 12): (3, 6, 9, 12),
    (768, 12): (3, 6, 9, 12),
    (1024, 24): (5, 12, 18, 24),
    (1536, 40): (10, 20, 30, 40),  # the giant: its code is published, its weights are not
}

_HEAD = [
    (r"projects\.(\d)\.(weight|bias)", r"neck.reassemble_stage.layers.\1.projection.\2"),
    (r"resize_layers\.([013])\.(weight|bias)", r"neck.reassemble_stage.layers.\1.resize.\2"),
    (r"scratch\.output_conv1\.(weight|bias)", r"head.conv1.\1"),
    (r"scratch\.output_conv2\.0\.(weight|bias)", r"head.conv2.\1"),
    (r"scratch\.output_conv2\.2\.(weight|bias)", r"head.conv3.\1"),
    *((rf"scratch\.layer{i}_rn\.weight", rf"neck.convs.{i - 1}.weight") for i in (1, 2, 3, 4)),
    *(
        (rf"scratch\.refinenet{i}\.out_conv\.(weight|bias)", rf"neck.fusion_stage.layers.{4 - i}.projection.\1")
        for i in (1, 2, 3, 4)
    ),
    *(
        (
            rf"scratch\.refinenet{i}\.resConfUnit([12])\.conv([12])\.(weight|bias)",
            rf"neck.fusion_stage.layers.{4 - i}.residual_layer\1.convolution\2.\3",
        )
        for i in (1, 2, 3, 4)
    ),
]
_RULES = [
    (re.compile(r"pretrained\.mask_token"), "backbone.embeddings.mask_token"),
    *(
        (
            re.compile(rf"pretrained\.blocks\.(\d+)\.mlp\.{old}\.(weight|bias)"),
            rf"backbone.encoder.layer.\1.mlp.{new}.\2",
        )
        for old, new in (("w12", "weights_in"), ("w3", "weights_out"))  # the giant's gated feed-forward
    ),
    *((re.compile(rf"pretrained\.{old}"), f"backbone.{new}") for old, new in TRANSFORMERS_NAMES),
    *((re.compile(rf"depth_head\.{old}"), new) for old, new in _HEAD),
]


def rename(state: dict[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """The authors' tensors under the names of transformers' hub files; raises WeightsMismatchError for a key no rule
    knows.

    Distill-Any-Depth's ViT-L chunks its blocks (`backbone.blocks.0.7.` is block 7); a `module.` in front is dropped.
    """
    plain = {}
    for key, tensor in state.items():
        name = re.sub(r"^(module\.)?(backbone\.|pretrained\.)", "pretrained.", key.removeprefix("module."))
        plain[re.sub(r"^pretrained\.blocks\.\d+\.(\d+\.)", r"pretrained.blocks.\1", name)] = tensor
    renamed, unknown = to_transformers(plain, _RULES)
    check_claimed((), unknown, where, what="Depth Anything V2")
    return renamed


def _config(state: dict[str, Tensor], where: str | Path, *, metric: bool) -> Any:
    from transformers import DepthAnythingConfig, Dinov2Config

    dimensions = {"backbone.embeddings.position_embeddings": 3, "head.conv2.weight": 4, "neck.convs.0.weight": 4}
    dimensions |= {f"neck.reassemble_stage.layers.{i}.projection.weight": 4 for i in range(4)}
    table, last, fused, *sizes = sizing_tensors(state, dimensions, where, what="Depth Anything V2")
    blocks = len({key.split(".")[3] for key in state if key.startswith("backbone.encoder.layer.")})
    width = table.shape[-1]
    if (width, blocks) not in _TAPS:
        raise WeightsMismatchError(
            f"{where}: {blocks} blocks of width {width} are no Depth Anything V2 (S, B, L, giant)"
        )
    backbone = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        image_size=round((table.shape[1] - 1) ** 0.5) * PATCH,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        out_indices=list(_TAPS[width, blocks]),
        reshape_hidden_states=False,
        apply_layernorm=True,
        use_mask_token="backbone.embeddings.mask_token" in state,
        use_swiglu_ffn="backbone.encoder.layer.0.mlp.weights_in.weight" in state,
    )
    return DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=width,
        patch_size=PATCH,
        neck_hidden_sizes=[s.shape[0] for s in sizes],
        fusion_hidden_size=fused.shape[0],
        head_hidden_size=last.shape[0],
        depth_estimation_type="metric" if metric else "relative",
    )


def native_shape(height: int, width: int, size: int, *, square: bool = False) -> tuple[int, int]:
    """The authors' lower-bound rule: both sides at least `size`, aspect kept, each a multiple of 14 (half to even).

    square: Distill-Any-Depth's rule, both sides `size` whatever the aspect, up to a multiple of 14.
    """
    scale = max(size / height, size / width)

    def to_multiple(side: float) -> int:
        nearest = int(np.round(side / PATCH) * PATCH)
        return nearest if nearest >= size else int(np.ceil(side / PATCH) * PATCH)

    return (to_multiple(size),) * 2 if square else (to_multiple(scale * height), to_multiple(scale * width))


class Teacher:
    """Depth Anything V2 on [0,1] images; square: under Distill-Any-Depth's resizing rule."""

    def __init__(
        self,
        model: Any,
        card: Card,
        *,
        resize: str = "native",
        native_size: int | None = None,
        square: bool = False,
    ) -> None:
        check_resize(resize, native_size)
        self.model = model
        self.card = card
        self.resize = resize
        self.square = square
        self.native_size = native_size or card.native_size or NATIVE

    @classmethod
    def load(
        cls,
        weights: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resize: str = "native",
        native_size: int | None = None,
        max_depth: float | None = None,
        position_rule: str = "official",
        weights_key: str | None = None,
    ) -> Teacher:
        """A teacher from the authors' file, a folder that holds it, an `-hf` folder, or a hub id of any of them.

        The size (S, B, L, giant) is read from the tensors. max_depth: metres, for the metric checkpoints (20 indoor, 80
        outdoor). A file of Distill-Any-Depth, recognised by its path or its tensors' names, is used with its
        own code's resizing rule, a square of 700. position_rule: "official", or "transformers" for the map of
        transformers' own pipeline. weights_key: the table to read in a trainer's file, such as "model_ema"
        (core.weights.read_state).
        """
        check_resize(resize, native_size)
        if max_depth is not None and not 0 < max_depth < float("inf"):
            raise ValueError(f"max_depth must be above 0 metres (20 indoor, 80 outdoor), not {max_depth}")
        if position_rule not in ("official", "transformers"):
            raise ValueError(f'position_rule must be "official" or "transformers", not {position_rule!r}')
        path = resolve(weights, files=FILES)
        names = ("*.safetensors", "*.pth", "*.pt", "*.ckpt", "*.bin")
        if not is_described(path):
            _check_name(find_weights(path, names), max_depth)
        file, state, folder = read_either(
            path, names, anchor=_ANCHOR, authors=("pretrained.cls_token", "backbone.cls_token"), weights_key=weights_key
        )
        square = folder is None and _is_distilled(str(weights), state)
        state = rename(state, file) if folder is None else state
        config = (
            _config(state, file, metric=max_depth is not None)
            if folder is None
            else _described_config(folder, max_depth)
        )
        model = _from_state(state, file, config)
        if max_depth is not None:
            model.head.max_depth = max_depth
        if position_rule == "official":
            _use_official_positions(model)
        model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        metric = model.config.depth_estimation_type == "metric"
        kind = Kind.METRIC_DEPTH if metric else Kind.AFFINE_DISPARITY
        size = native_size or (SQUARE if square else NATIVE)
        card = replace(_published(weights), kind=kind, revision=revision_of(file), native_size=size)
        return cls(model, card, resize=resize, native_size=native_size, square=square)

    @torch.no_grad()
    def predict(self, images: Tensor) -> DepthMap:
        """(B,3,H,W) in [0,1] -> (B,H,W) affine disparity >= 0, larger is nearer (metres of depth if metric)."""
        images = check_images(images)
        height, width = images.shape[-2:]
        if self.resize == "native":
            sized = resize_cubic(images, *native_shape(height, width, self.native_size, square=self.square))
        else:
            sized = pad_to_multiple(images, PATCH)
        parameter = next(self.model.parameters())
        inputs = normalize(sized).to(device=parameter.device, dtype=parameter.dtype)
        values = self.model(pixel_values=inputs).predicted_depth.float()
        if self.resize == "none":
            values = values[:, :height, :width]
        elif values.shape[-2:] != (height, width):
            values = F.interpolate(values[:, None], (height, width), mode="bilinear", align_corners=True)[:, 0]
        return finite(values.to(images.device), self.card.kind)


def _is_distilled(weights: str, state: dict[str, Tensor]) -> bool:
    """Whether it is Distill-Any-Depth: its ViT-L has names of its own, smaller ones are known only by their path."""
    return "distill-any-depth" in weights.lower() or any(
        key.removeprefix("module.").startswith("backbone.") for key in state
    )


_V1 = "is Depth Anything V1 by its name or config.json, which reads other blocks: use a V2 checkpoint"


def _check_name(file: Path, max_depth: float | None) -> None:
    """Reject other networks that have the same tensors, by the file's name or content."""
    if "metric" in file.name and max_depth is None:
        raise ValueError(f"{file} is a metric checkpoint by its name: give max_depth (20 indoor, 80 outdoor)")
    if max_depth is None and mentions(file, "previous_best", "silog"):
        raise ValueError(
            f"{file} is a metric checkpoint by the errors in metres that its trainer stored (previous_best): give "
            "max_depth, as in its training (20 indoor, 80 outdoor)"
        )
    # V1's repositories hold depth_anything_vitl14/pytorch_model.bin.
    if re.search(r"depth_anything_(metric_depth|vit[sbl]14)", "/".join(file.absolute().parts[-4:])):
        raise WeightsMismatchError(f"{file} {_V1}")


def _published(weights: str) -> Card:
    """The published card; also recognises the authors' file names (depth_anything_v2_vits.pth)."""
    size = re.fullmatch(r"depth_anything_v2_vit([sbl])", Path(weights).stem)
    if size is None:
        return card_for(CARDS, weights)
    return replace(CARDS["lbs".index(size[1])], weights=str(weights))


def _use_official_positions(model: Any) -> None:
    embeddings = model.backbone.embeddings

    def interpolate(tokens: Tensor, height: int, width: int) -> Tensor:
        return position_table(embeddings.position_embeddings, height // PATCH, width // PATCH)

    embeddings.interpolate_pos_encoding = interpolate


def _from_state(state: dict[str, Tensor], where: Path, config: Any) -> Any:
    from transformers import DepthAnythingForDepthEstimation

    return build_described(DepthAnythingForDepthEstimation, config, state, where, what="Depth Anything V2")


_ANCHOR = "backbone.embeddings.cls_token"  # of transformers' files


def _described_config(folder: Path, max_depth: float | None) -> Any:
    from transformers import DepthAnythingConfig

    table = read_config(folder / "config.json")
    model_type = table.get("model_type")
    if model_type is None and {"encoder", "features", "out_channels"} <= table.keys():
        raise WeightsMismatchError(f"{folder} {_V1}")
    if model_type != "depth_anything":
        raise WeightsMismatchError(f"{folder / 'config.json'} describes a {model_type} model, not depth_anything")
    config = described_config(DepthAnythingConfig, folder, what="Depth Anything V2")
    if max_depth is not None:
        config.depth_estimation_type = "metric"
    return config
