"""A student as transformers opens it with `trust_remote_code=True`; needs only torch, timm and transformers.

`distill export STUDENT OUT --transformers` writes this file, and the decoder's, beside the weights. Nothing in
this package imports it. The network is `distill.students.Student`: the same parts under the same names, so that
model.safetensors is a student's own. Shapes: B batch, H height, W width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.modeling_outputs import DepthEstimatorOutput

from distill.students.decoders.sdt import Decoder


class StudentConfig(PretrainedConfig):
    """encoder: the ViT (timm_name, patch_size, and Encoder's options). decoder: its options. kind: of the map."""

    model_type = "depth_distill_student"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        decoder: dict[str, Any] | None = None,
        max_depth: float | None = None,
        kind: str = "affine_disparity",
        larger_is: str = "nearer",
        **kwargs: Any,
    ) -> None:
        self.encoder, self.decoder = encoder or {}, decoder or {}
        self.max_depth, self.kind, self.larger_is = max_depth, kind, larger_is
        super().__init__(**kwargs)


def build_vit(config: StudentConfig) -> Any:
    """The ViT that the student's encoder is, without weights."""
    encoder = config.encoder
    pool = {} if "distilled" in encoder["timm_name"] else {"global_pool": ""}
    vit = timm.create_model(
        encoder["timm_name"], num_classes=0, dynamic_img_size=True, **pool, **encoder["timm_options"]
    )
    if encoder["pos_grid"]:
        rows, columns = encoder["pos_grid"]
        vit.set_input_size(img_size=(rows * encoder["patch_size"], columns * encoder["patch_size"]))
    blocks = encoder["blocks"] or range(len(vit.blocks))
    vit.blocks = nn.ModuleList([vit.blocks[i] for i in list(blocks)[: max(encoder["indices"]) + 1]])
    if not encoder["final_norm"]:
        vit.norm = nn.Identity()
    return vit


class StudentForDepthEstimation(PreTrainedModel):
    """pixel_values (B,3,H,W), normalised, any size, to predicted_depth (B,H,W): what config.kind says."""

    config_class = StudentConfig
    main_input_name = "pixel_values"

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        self.encoder: Any = nn.Module()
        self.encoder.backbone = build_vit(config)
        self.decoder = Decoder(**config.decoder)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Buffers that no file holds (rotary periods) are uninitialised if the model was made on "meta".
        names = [name for name, part in self.encoder.backbone.named_modules() if part is module]
        if not names or not any(True for _ in module.buffers(recurse=False)):
            return
        with torch.device("cpu"):
            source = build_vit(self.config).get_submodule(names[0])
        for name, value in module.named_buffers(recurse=False):
            value.copy_(source.get_buffer(name))

    def forward(self, pixel_values: Tensor, labels: Any = None, **kwargs: Any) -> Any:
        """DepthEstimatorOutput; raises NotImplementedError for `labels`, because no loss is implemented."""
        if labels is not None:
            raise NotImplementedError("train with depth-distill, or write a loss around predicted_depth")
        encoder = self.config.encoder
        (height, width), patch = pixel_values.shape[-2:], encoder["patch_size"]
        down, across = -height % patch, -width % patch
        top, left = down // 2, across // 2
        padded = F.pad(pixel_values, (left, across - left, top, down - top))
        raw = self.decoder(self._features(padded.to(self.dtype))).float()
        if raw.shape[-2:] != padded.shape[-2:]:
            raw = F.interpolate(raw, size=padded.shape[-2:], mode="bilinear", align_corners=False)
        depth = raw[:, 0, top : top + height, left : left + width]
        if self.config.max_depth:
            depth = torch.sigmoid(depth) * self.config.max_depth
        return DepthEstimatorOutput(predicted_depth=depth)

    def _features(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Four (patch map (B,C,h,w), cls (B,C)) pairs."""
        vit, encoder = self.encoder.backbone, self.config.encoder
        indices = sorted(set(encoder["indices"]))
        intermediates = vit.forward_intermediates(
            images,
            indices=indices,
            return_prefix_tokens=vit.num_prefix_tokens > 0,
            norm=encoder["final_norm"],
            intermediates_only=True,
        )
        pairs = dict(zip(indices, intermediates, strict=True))
        return [self._with_cls(pairs[i]) for i in encoder["indices"]]

    def _with_cls(self, pair: Any) -> tuple[Tensor, Tensor]:
        if isinstance(pair, Tensor):
            return pair, pair.mean(dim=(2, 3))
        patches, prefix = pair
        has_cls = self.encoder.backbone.cls_token is not None
        return patches, prefix[:, 0] if has_cls else patches.mean(dim=(2, 3))


class StudentImageProcessor(BaseImageProcessor):
    """The student's size rule: short side to native_size, each side the nearest multiple; bilinear with antialias.

    The long side is at most 8 native sizes. native_size None: images keep their size.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        native_size: int | None = None,
        multiple: int = 14,
        image_mean: Any = (0.485, 0.456, 0.406),
        image_std: Any = (0.229, 0.224, 0.225),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.native_size, self.multiple = native_size, multiple
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def __call__(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """See `preprocess`."""
        return self.preprocess(images, return_tensors=return_tensors)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """pixel_values of a PIL image, an array (H,W,3) or a tensor (3,H,W), uint8 or float in [0,1], or a list."""
        batch = images if isinstance(images, list | tuple) else [images]
        return BatchFeature(
            {"pixel_values": [self._prepared(image).numpy() for image in batch]}, tensor_type=return_tensors
        )

    def _prepared(self, image: Any) -> Tensor:
        if isinstance(image, Tensor):
            pixels = image
        else:
            if getattr(image, "mode", "")[:1] in ("I", "F") and np.max(image) > 255:  # convert cuts off there
                raise ValueError(f"a PIL image of mode {image.mode} goes beyond 255: scale it to 0..255, mode L")
            array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
            if array.ndim != 3 or array.shape[-1] != 3:
                raise ValueError(f"an array is H x W x 3, RGB, not {' x '.join(map(str, array.shape))}")
            pixels = torch.from_numpy(np.array(array)).permute(2, 0, 1)
        if pixels.ndim != 3 or len(pixels) != 3:
            raise ValueError(f"a tensor is 3 x H x W, RGB, not {' x '.join(map(str, pixels.shape))}")
        unit = pixels.float() / 255.0 if pixels.dtype == torch.uint8 else pixels.float()
        if not -0.25 <= float(unit.min()) <= float(unit.max()) <= 1.25:  # bicubic resizing goes a little beyond
            raise ValueError("an image is uint8, or float in [0,1]: divide by its largest possible value")
        if self.native_size:
            scale = self.native_size / min(unit.shape[-2:])
            size = [
                max(1, round(min(side * scale, 8 * self.native_size) / self.multiple)) * self.multiple
                for side in unit.shape[-2:]
            ]
            if size != list(unit.shape[-2:]):
                unit = F.interpolate(unit[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return (unit - mean) / std

    def post_process_depth_estimation(self, outputs: Any, target_sizes: Any = None) -> list[dict[str, Tensor]]:
        """A dict with predicted_depth (H,W) for each image, at (H,W) of `target_sizes` where they are given."""
        maps = list(outputs.predicted_depth)
        sizes = [None] * len(maps) if target_sizes is None else target_sizes
        resized = [
            depth
            if size is None or tuple(depth.shape) == tuple(size)
            else F.interpolate(
                depth[None, None], size=tuple(size), mode="bilinear", antialias=True, align_corners=False
            )[0, 0]
            for depth, size in zip(maps, sizes, strict=True)
        ]
        return [{"predicted_depth": depth} for depth in resized]
