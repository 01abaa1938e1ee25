"""Depth Pro: sharp metric depth with its own estimate of the camera, from Apple's file or a transformers folder.

The network takes squares of one size, 1536 x 1536 (patches of 384 at three scales), so every image is squashed to that
and there is no `resize`. It predicts canonical inverse depth C, for a camera whose focal length is the image's width,
and the horizontal field of view: depth = f / (W C). transformers' DepthProForDepthEstimation is the same network.

Source: apple/ml-depth-pro src/depth_pro/depth_pro.py (infer), network/encoder.py, network/fov.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    finite,
    read_config,
    resolve,
    revision_of,
    sizing_tensors,
)
from distill.teachers._described import build_described, described_config, read_either
from distill.teachers._dino import TRANSFORMERS_NAMES, to_transformers

SCALES = 4
"""The network's input side, in patch sides."""
NEAREST, FARTHEST = 1e-4, 1e4  # metres, the authors'
OUTPUTS = {"depth": Kind.METRIC_DEPTH, "canonical": Kind.SCALE_DISPARITY}


def _card(weights: str) -> Card:
    return Card(
        name="depth_pro",
        weights=weights,
        kind=Kind.METRIC_DEPTH,
        licence="apple-amlr",
        code_licence="Apple sample code",
        commercial=False,
        native_size=1536,
        source="apple/ml-depth-pro",
        note="estimates the field of view; a re-trained reference model, not the paper's own",
    )


FILES = ("config.json", "model*.safetensors", "*.index.json", "depth_pro.pt")
"""Files read from a hub repository."""
CARDS: tuple[Card, ...] = (_card("apple/DepthPro-hf"), _card("apple/DepthPro"))


class Teacher:
    """Depth Pro on [0,1] images."""

    def __init__(self, model: Any, card: Card, *, focal: float | None = None, output: str = "depth") -> None:
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, not {output!r}")
        if focal is not None and (output != "depth" or not 0 < focal < float("inf")):
            raise ValueError(f'focal is a length in pixels, of output = "depth" alone; got {focal} with {output!r}')
        self.model = model
        self.focal = focal
        self.output = output
        self.native_size = SCALES * int(model.config.patch_size)
        self.card = replace(card, kind=OUTPUTS[output], native_size=self.native_size)

    @classmethod
    def load(
        cls,
        weights: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        focal: float | None = None,
        output: str = "depth",
        weights_key: str | None = None,
    ) -> Teacher:
        """A teacher from Apple's depth_pro.pt, a folder that holds it, a transformers folder, or a hub id of either.

        focal: of the images, in pixels at their own size, in place of the network's estimate. output: "depth" in
        metres, or "canonical", the inverse depth before any camera, which is correct up to one factor per image.
        weights_key: the table to read in a trainer's file (core.weights.read_state).
        """
        path = resolve(weights, files=FILES)
        names = ("*.pt", "*.pth", "*.safetensors", "*.ckpt")
        file, state, folder = read_either(
            path, names, anchor=_ANCHOR, authors=("encoder.patch_encoder.pos_embed",), weights_key=weights_key
        )
        config = _config(state, file) if folder is None else _described_config(folder)
        state = rename(state, file) if folder is None else state
        model = _network(config, state, file)
        if not model.use_fov_model and output == "depth" and focal is None:
            raise ValueError(f'{file} has no field-of-view head: give focal, or take output = "canonical"')
        card = replace(card_for(CARDS, weights), revision=revision_of(file))
        model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        return cls(model, card, focal=focal, output=output)

    @property
    def takes_focal(self) -> bool:
        """Whether `predict` accepts each image's focal length."""
        return self.output == "depth" and self.focal is None

    @torch.no_grad()
    def field_of_view(self, images: Tensor) -> Tensor:
        """The horizontal field of view in degrees, (B,), of images (B,3,H,W) in [0,1]."""
        _, degrees = self._run(check_images(images))
        if degrees is None:
            raise ValueError("these weights have no field-of-view head")
        return degrees

    @torch.no_grad()
    def predict(self, images: Tensor, *, focal: float | None = None) -> DepthMap:
        """(B,3,H,W) in [0,1] -> (B,H,W): depth in metres, or canonical inverse depth by the option of `load`.

        focal: in pixels of the images, in place of the option of `load` and of the network's estimate.
        """
        images = check_images(images)
        height, width = images.shape[-2:]
        inverse, degrees = self._run(images)
        if self.output == "depth":
            focal = self.focal if focal is None else focal
            if focal is None:
                assert degrees is not None
                over_focal = 2.0 * torch.tan(0.5 * torch.deg2rad(degrees))[:, None, None]  # W / f
            else:
                over_focal = torch.full((1, 1, 1), width / focal, device=inverse.device)
            inverse = inverse * over_focal
        if inverse.shape[-2:] != (height, width):
            inverse = F.interpolate(inverse[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
        if self.output == "depth":
            inverse = 1.0 / inverse.clamp(1.0 / FARTHEST, 1.0 / NEAREST)
        return finite(inverse.to(images.device), self.card.kind)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Canonical inverse depth (B,h,w) at the network's size and degrees (B,), float32."""
        parameter = next(self.model.parameters())
        inputs = (images - 0.5) / 0.5
        if inputs.shape[-2:] != (self.native_size, self.native_size):
            inputs = F.interpolate(inputs, (self.native_size,) * 2, mode="bilinear", align_corners=False)
        out = self.model(pixel_values=inputs.to(device=parameter.device, dtype=parameter.dtype))
        degrees = None if out.field_of_view is None else out.field_of_view.float().to(images.device)
        return out.predicted_depth.float().to(images.device), degrees


# --- Apple's own file -------------------------------------------------------------------------------------------------

_VITS = {
    r"encoder\.patch_encoder": "depth_pro.encoder.patch_encoder.model",
    r"encoder\.image_encoder": "depth_pro.encoder.image_encoder.model",
    r"fov\.encoder\.0": "fov_model.fov_encoder.model",
}
_NECK = "depth_pro.neck.feature_upsample"
_LAYERS = [f"fusion_stage.{name}" for name in ("final", "intermediate.3", "intermediate.2", "intermediate.1")]
_LAYERS += ["fusion_stage.intermediate.0"]  # theirs count from the finest, transformers' from the coarsest
_OTHER_NAMES = [
    (r"encoder\.upsample_latent0\.(\d)\.weight", rf"{_NECK}.intermediate.1.layers.\1.weight"),
    (r"encoder\.upsample_latent1\.(\d)\.weight", rf"{_NECK}.intermediate.0.layers.\1.weight"),
    *((rf"encoder\.upsample{i}\.(\d)\.weight", rf"{_NECK}.scaled_images.{2 - i}.layers.\1.weight") for i in range(3)),
    (r"encoder\.upsample_lowres\.(weight|bias)", rf"{_NECK}.image_block.layers.0.\1"),
    (r"encoder\.fuse_lowres\.(weight|bias)", r"depth_pro.neck.fuse_image_with_low_res.\1"),
    *(
        (rf"decoder\.convs\.{i}\.weight", rf"depth_pro.neck.feature_projection.projections.{4 - i}.weight")
        for i in (1, 2, 3, 4)
    ),
    *(
        rule
        for i, layer in enumerate(_LAYERS)
        for rule in (
            *(
                (
                    rf"decoder\.fusions\.{i}\.resnet([12])\.residual\.{theirs}\.(weight|bias)",
                    rf"{layer}.residual_layer\1.convolution{ours}.\2",
                )
                for theirs, ours in ((1, 1), (3, 2))
            ),
            (rf"decoder\.fusions\.{i}\.deconv\.weight", rf"{layer}.deconv.weight"),
            (rf"decoder\.fusions\.{i}\.out_conv\.(weight|bias)", rf"{layer}.projection.\1"),
        )
    ),
    (r"head\.([0124])\.(weight|bias)", r"head.layers.\1.\2"),
    (r"fov\.encoder\.1\.(weight|bias)", r"fov_model.fov_encoder.neck.\1"),
    (r"fov\.downsample\.0\.(weight|bias)", r"fov_model.conv.\1"),
    (r"fov\.head\.([024])\.(weight|bias)", r"fov_model.head.layers.\1.\2"),
]
_RULES = [
    *(
        (re.compile(rf"{old}\.{key}"), f"{new}.{name}")
        for old, new in _VITS.items()
        for key, name in TRANSFORMERS_NAMES
    ),
    *((re.compile(old), new) for old, new in _OTHER_NAMES),
]


def rename(state: dict[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """Apple's tensors under transformers' names; raises WeightsMismatchError for a key that no rule knows."""
    renamed, unknown = to_transformers(state, _RULES)
    check_claimed((), unknown, where, what="Depth Pro")
    return renamed


def _config(state: dict[str, Tensor], where: Path) -> Any:
    """Sizes from the tensors; the blocks that are read from the number of blocks (6th and 12th of 24)."""
    from transformers import DepthProConfig

    vit_part = "encoder.patch_encoder"
    dimensions = {f"{vit_part}.pos_embed": 3, f"{vit_part}.patch_embed.proj.weight": 4}
    dimensions |= {f"{vit_part}.blocks.0.mlp.fc1.weight": 2}
    scales = ("upsample_latent0", "upsample_latent1", "upsample2", "upsample1", "upsample0")
    dimensions |= {f"encoder.{name}.0.weight": 4 for name in scales} | {"head.0.weight": 4}
    table, patches, hidden, first, second, *scaled, head = sizing_tensors(state, dimensions, where, what="Depth Pro")
    width, patch = table.shape[-1], patches.shape[-1]
    blocks = len({key.split(".")[3] for key in state if key.startswith("encoder.patch_encoder.blocks.")})
    side = round((table.shape[1] - 1) ** 0.5) * patch
    vit = {
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": max(1, width // 64),
        "mlp_ratio": hidden.shape[0] // width,
        "image_size": side,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
        "use_mask_token": False,
    }
    return DepthProConfig(
        patch_size=side,
        fusion_hidden_size=head.shape[1],
        intermediate_hook_ids=[blocks // 2 - 1, blocks // 4 - 1],
        intermediate_feature_dims=[second.shape[0], first.shape[0]],
        scaled_images_feature_dims=[tensor.shape[0] for tensor in scaled],
        use_fov_model="fov.head.0.weight" in state,
        **{f"{name}_model_config": dict(vit) for name in ("image", "patch", "fov")},
    )


_ANCHOR = "depth_pro.encoder.patch_encoder.model.embeddings.cls_token"  # of transformers' files


def _network(config: Any, state: dict[str, Tensor], where: Path) -> Any:
    from transformers import DepthProForDepthEstimation

    return build_described(DepthProForDepthEstimation, config, state, where, what="Depth Pro")


def _described_config(folder: Path) -> Any:
    from transformers import DepthProConfig

    model_type = read_config(folder / "config.json").get("model_type")
    if model_type != "depth_pro":
        raise WeightsMismatchError(f"{folder / 'config.json'} describes a {model_type} model, not depth_pro")
    return described_config(DepthProConfig, folder, what="Depth Pro")
