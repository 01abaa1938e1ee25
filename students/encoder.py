"""From an image to four feature maps: a timm ViT with its weights, its normalisation and its padding.

DINOv3's final norm is not applied (AnyDepth's default); blocks after the last one read, and an unused final
norm, are removed; timm resizes a learned position table with antialiasing, facebookresearch's code without.

Shapes: B batch, C channels of the ViT, H W image, h w token grid.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import is_model_in_modules
from torch import Tensor, nn
from torch.nn import functional as F

from distill.core.files import decoded, file_sha256
from distill.core.strictness import mismatches
from distill.core.weights import ANY, below_prefix, find_weights, read_state
from distill.core.wording import first_line, shortened
from distill.students import vggt
from distill.students.beit import MIDAS_HEAD, make_flexible, pooling
from distill.students.positions import remember_positions
from distill.students.vit_keys import ANCHORS, facebook_keys, timm_keys

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# facebookresearch's names. Its DINOv3 networks carry q and v biases, zero in the released S, B and L: timm's "qkvb".
ALIASES = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vitb14": "vit_base_patch14_dinov2",
    "dinov2_vitl14": "vit_large_patch14_dinov2",
    "dinov2_vitg14": "vit_giant_patch14_dinov2",
    "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2",
    "dinov2_vitb14_reg": "vit_base_patch14_reg4_dinov2",
    "dinov2_vitl14_reg": "vit_large_patch14_reg4_dinov2",
    "dinov2_vitg14_reg": "vit_giant_patch14_reg4_dinov2",
    "dinov3_vits16": "vit_small_patch16_dinov3_qkvb",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3_qkvb",
    "dinov3_vitb16": "vit_base_patch16_dinov3_qkvb",
    "dinov3_vitl16": "vit_large_patch16_dinov3_qkvb",
    "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3_qkvb",
    vggt.NAME: "vit_large_patch14_reg4_dinov2",  # the part of it that is a plain ViT (students/vggt.py)
}

_log = logging.getLogger(__name__)
Feature = tuple[Tensor, Tensor]


class Encoder(nn.Module):
    """A plain ViT that reads four of its blocks.

    name: a timm ViT, or an alias such as "dinov3_vits16" or "dinov2_vits14"; "vggt" is VGGT on one view.
    weights: None (random), "pretrained" (timm's hub download), or a local .safetensors / .pth file in
        facebookresearch's, transformers' or timm's parameter names, float16 or float32. Loading is strict: an error
        names keys that do not match.
    indices: the four blocks read, counted after `blocks` is applied; None gives the paper's (`default_indices`).
    blocks: keep only these blocks of the named ViT, in this order (weights are still loaded from the whole one).
    final_norm: apply the ViT's last norm to all four (DINOv3's own hub heads do; AnyDepth's default does not).
    pos_grid: side, or (rows, columns), of the learned position table; a smaller one saves megabytes.
    frozen: no gradients, evaluation mode whatever `train()` says, forward under no_grad.
    mean, std: of the images that the weights were trained on; None takes the weights' own (`statistics`).
    weights_key: the table to read in a trainer's file, such as "model_ema" (core.weights.read_state).
    timm_options: further arguments of the timm model, e.g. {"depth": 3, "embed_dim": 96}.

    Raises LookupError for an unknown name, ValueError for weights or options that do not fit, OSError for a file.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        *,
        weights: str | Path | None = None,
        indices: Sequence[int] | None = None,
        blocks: Sequence[int] | None = None,
        final_norm: bool = False,
        pos_grid: int | Sequence[int] | None = None,
        frozen: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        timm_options: Mapping[str, Any] | None = None,
        weights_key: str | None = None,
    ) -> None:
        super().__init__()
        grid = (pos_grid, pos_grid) if isinstance(pos_grid, int) else tuple(pos_grid or ()) or None
        timm_name = _timm_name(name)
        backbone = _create(timm_name, grid, dict(timm_options or {}))
        if name == vggt.NAME:
            backbone = vggt.Backbone(backbone, final_norm=final_norm, weights=str(weights))
        self.weights_sha256: str | None = None
        self.weights_name: str | None = None
        if weights == "pretrained":
            _load(backbone, _download(timm_name), f"timm's {timm_name}")
        elif weights is not None:
            weights = find_weights(Path(weights), ANY) if Path(weights).is_dir() else Path(weights)
            _load(backbone, read_state(weights, weights_key=weights_key), str(weights))
            self.weights_sha256 = file_sha256(weights)
            self.weights_name = weights.name

        selected = _checked_blocks(name, len(backbone.blocks), blocks)
        taps = _checked_indices(len(selected), indices)
        backbone.blocks = nn.ModuleList([backbone.blocks[i] for i in selected[: max(taps) + 1]])
        if not final_norm:
            backbone.norm = nn.Identity()
        self.backbone = backbone
        self.indices, self.final_norm = taps, final_norm
        self.channels: int = backbone.embed_dim
        self.patch_size: int = backbone.patch_embed.patch_size[0]
        if mean is None or std is None:
            published = statistics(name, None if weights in (None, "pretrained") else Path(weights))
            mean, std = mean if mean is not None else published[0], std if std is not None else published[1]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.name, self.timm_name = name, timm_name
        self.options: dict[str, Any] = {
            "indices": list(taps),
            "blocks": None if blocks is None else selected,
            "final_norm": final_norm,
            "pos_grid": None if grid is None else list(grid),
            "frozen": frozen,
            "mean": list(mean),
            "std": list(std),
            "timm_options": dict(timm_options or {}),
        }
        self.freeze(frozen)
        self._digest_as_read = None if self.weights_name is None else self.digest()

    @property
    def frozen(self) -> bool:
        """True if the encoder takes no gradient and stays in evaluation mode."""
        return bool(self.options["frozen"])

    def digest(self) -> str:
        """SHA-256 of all weights."""
        result = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            result.update(key.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return result.hexdigest()

    def is_as_read(self) -> bool:
        """True if the weights came from a local file and have not changed since."""
        return self._digest_as_read is not None and self._digest_as_read == self.digest()

    def freeze(self, frozen: bool = True) -> None:
        """Freeze or thaw all parameters."""
        self.options["frozen"] = frozen
        self.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Encoder:
        """As nn.Module.train, but a frozen encoder stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> list[Feature]:
        """Four (patch map (B,C,h,w), cls (B,C)) pairs of images (B,3,H,W) in [0,1], any size.

        h = ceil(H / patch), w = ceil(W / patch): the normalised image is padded about its centre with zeros.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be (B,3,H,W) float in [0,1], not {tuple(images.shape)} {images.dtype}")
        normal = (images - self.mean.to(images.dtype)) / self.std.to(images.dtype)
        normal = F.pad(normal, self.padding(images.shape[-2], images.shape[-1]))
        return self.features(normal.to(self.backbone.patch_embed.proj.weight.dtype))

    def padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(left, right, top, bottom) pixels added to an image; left and top get the smaller half.

        AnyDepth's CENTER_PADDING (model/encoder.py).
        """
        down, across = -height % self.patch_size, -width % self.patch_size
        return across // 2, across - across // 2, down // 2, down - down // 2

    def features(self, normal: Tensor) -> list[Feature]:
        """As `forward`, of images already normalised whose sides are multiples of the patch."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            result = self.backbone.forward_intermediates(
                normal,
                indices=sorted(set(self.indices)),
                # timm fails if there are none to return.
                return_prefix_tokens=self.backbone.num_prefix_tokens > 0,
                norm=self.final_norm,
                intermediates_only=True,
            )
        pairs = dict(zip(sorted(set(self.indices)), result, strict=True))
        return [self._with_cls(pairs[i]) for i in self.indices]

    def _with_cls(self, pair: Feature | Tensor) -> Feature:
        """The pair with the mean of the patches in place of a class token, for a ViT that has none."""
        if isinstance(pair, Tensor):
            return pair, pair.mean(dim=(2, 3))
        patches, prefix = pair
        return patches, prefix[:, 0] if self.backbone.cls_token is not None else patches.mean(dim=(2, 3))


def default_indices(depth: int) -> list[int]:
    """The four blocks that are read from a ViT of `depth` blocks: evenly spaced, the last one always among them.

    12 gives [2, 5, 8, 11] and 40 [9, 19, 29, 39]; 24 is [4, 11, 17, 23], which is not even, in every paper since
    DINOv2. Fewer than four blocks repeat.
    """
    return [4, 11, 17, 23] if depth == 24 else [math.ceil((k + 1) * depth / 4) - 1 for k in range(4)]


def statistics(name: str, weights: Path | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the images that a ViT's weights were trained on.

    From preprocessor_config.json or timm's config.json beside a weights file, from the file's name where it says which
    of timm's weights of this name they are (SAT-493M, MAE, DINO), or from timm's configuration of this name or alias;
    else ImageNet's.
    """
    beside = {} if weights is None else _stated_beside(weights)
    if beside:
        return tuple(beside["mean"]), tuple(beside["std"])
    timm_name = _timm_name(name)
    stated = timm.get_pretrained_cfg(timm_name, allow_unregistered=True)
    if weights is not None and "sat493m" in str(weights).lower().replace("-", "").replace("_", ""):
        stated = timm.get_pretrained_cfg("vit_large_patch16_dinov3.sat493m", allow_unregistered=True) or stated
    elif weights is not None and "." not in timm_name:
        stated = _by_file_name(timm_name, weights) or stated
    if stated is None or not stated.mean or not stated.std:
        return IMAGENET_MEAN, IMAGENET_STD
    return tuple(stated.mean), tuple(stated.std)


def _by_file_name(name: str, weights: Path) -> Any:
    """timm's configuration of the published weights that a file's name mentions; None, with a warning, if none."""
    published = {tag.partition(".")[2]: timm.get_pretrained_cfg(tag) for tag in timm.list_pretrained(f"{name}.*")}
    if len({tuple(config.mean) for config in published.values()}) < 2:
        return None
    words = re.split(r"[^a-z0-9]+", "/".join(weights.absolute().parts[-2:]).lower())
    if meant := [config for tag, config in published.items() if tag.partition("_")[0] in words]:
        return meant[0]
    default = timm.get_pretrained_cfg(name)
    others = [tag for tag, config in published.items() if config.mean != default.mean]
    _log.warning(
        "%s: took the mean %s of timm's %s, but its %s were trained with another: if these weights were too, name "
        "the encoder %s.%s or alike",
        *(weights, list(default.mean), default.tag, ", ".join(others[:3]), name, others[0]),
    )
    return None


def _stated_beside(weights: Path) -> dict[str, Any]:
    """mean and std of transformers' preprocessor_config.json or timm's config.json beside the weights; else empty."""
    for file, part, keys in (
        ("preprocessor_config.json", "", ("image_mean", "image_std")),
        ("config.json", "pretrained_cfg", ("mean", "std")),
    ):
        path = weights.parent / file
        try:
            table = json.loads(decoded(path.read_bytes())) if path.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{path}: not readable JSON ({error}): download it again") from error
        table = table.get(part) if part and isinstance(table, dict) else table
        if isinstance(table, dict) and all(isinstance(table.get(k), list) and len(table[k]) == 3 for k in keys):
            return {"mean": table[keys[0]], "std": table[keys[1]]}
    return {}


def licence_of(name: str) -> str:
    """The licence that timm states for its pretrained weights of this name or alias, in lower case, or "unknown"."""
    if name == vggt.NAME:
        return "unknown"
    result = timm.get_pretrained_cfg(ALIASES.get(name, name), allow_unregistered=True)
    return (result and result.license) or "unknown"


def _checked_blocks(name: str, depth: int, blocks: Sequence[int] | None) -> list[int]:
    selected = list(range(depth)) if blocks is None else list(blocks)
    if not selected or not all(0 <= i < depth for i in selected) or len(set(selected)) != len(selected):
        raise ValueError(f"blocks must name different blocks of {name}, which has 0..{depth - 1}, not {selected}")
    return selected


def _checked_indices(depth: int, indices: Sequence[int] | None) -> list[int]:
    taps = default_indices(depth) if indices is None else list(indices)
    if len(taps) != 4 or not all(0 <= i < depth for i in taps) or taps != sorted(taps):
        raise ValueError(
            f"indices must be four rising numbers in 0..{depth - 1} (the blocks that are kept), not {taps}"
        )
    return taps


def _timm_name(name: str) -> str:
    known = ALIASES.get(name, name)
    if timm.is_model(known):
        if not is_model_in_modules(known.partition(".")[0], ("vision_transformer", "eva", "deit", "beit")):
            raise LookupError(f"encoder {name} is not a plain ViT; take one such as dinov3_vits16 or dinov2_vits14")
        return known
    # A hub id such as facebook/dinov3-vits16-pretrain-lvd1689m.
    plain = name.rpartition("/")[2].lower().replace("-", "_")
    if meant := max((alias for alias in ALIASES if plain.startswith(alias)), key=len, default=""):
        raise LookupError(f"no encoder {name!r}; did you mean {meant}, with its file as weights?")
    vits = [*ALIASES, *timm.list_models(["vit_*", "deit*", "beit*"])]
    close = difflib.get_close_matches(name, vits, n=3, cutoff=0.5) or list(ALIASES)
    raise LookupError(f"no encoder {name!r}; did you mean {', '.join(close)}? Any plain ViT of timm will do")


def _create(name: str, grid: tuple[int, ...] | None, options: dict[str, Any]) -> Any:
    foreign = [key for key in options if key in inspect.signature(timm.create_model).parameters]
    if foreign:  # options may come from a checkpoint's description, which must not open files or fetch weights
        raise ValueError(f"timm_options may not hold {', '.join(foreign)}: they are for the ViT's own shape")
    try:
        size = {} if name.startswith("beit") else {"dynamic_img_size": True}
        model = timm.create_model(name, num_classes=0, **size, **pooling(name), **options)
        make_flexible(model)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"encoder {name} does not take these options: {error}") from error
    if grid is not None:
        if getattr(model, "pos_embed", None) is None:
            raise ValueError(f"encoder {name} has no position table, so pos_grid means nothing; leave it out")
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"pos_grid must be a side or (rows, columns), not {list(grid)}")
        rows, columns = (n * p for n, p in zip(grid, model.patch_embed.patch_size, strict=True))
        model.set_input_size(img_size=(rows, columns))
    return remember_positions(model)


def _download(name: str) -> dict[str, Tensor]:
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, **pooling(name))
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(
            f"timm could not fetch weights for {name} (offline, gated, or none published): "
            f"{first_line(error).rstrip('.')}. "
            'Download them yourself and give their path as weights="file.safetensors"'
        ) from error
    return model.state_dict()


# Prefixes of the tensors of a whole depth model that are not the encoder's; they are ignored.
_WHOLE_MODELS = (*"depth_head. head. neck. decoder. 0.decoder. model.head. model.cam_ cam_ gs_".split(), *MIDAS_HEAD)

# Present in released files and not used: masked-image token, rotary table (recomputed), masks of the keys' bias, the
# 7B model's norm for local crops, classifiers, a BEiT's index (recomputed), MAE's decoder.
_UNUSED = re.compile(
    r"mask_token|masked_embed|rope_embed\.periods|.*\.(bias_mask|relative_position_index)|(local_cls|fc)_norm\..*|"
    r"head\.(weight|bias)|head_dist\..*|decoder_(embed|blocks|norm|pred)\..*|decoder_pos_embed"
)


def _load(backbone: Any, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into `backbone`; ValueError names the keys that are missing, unknown or of another shape."""
    if isinstance(backbone, vggt.Backbone):
        return _load(backbone.vit, backbone.load_own(state, source), source)
    state = below_prefix(state, ANCHORS, source, beside=_WHOLE_MODELS, is_part=True)
    state = {key: value for key, value in facebook_keys(state, source).items() if not _UNUSED.fullmatch(key)}
    original, target = state, backbone.state_dict()
    state = timm_keys(state, target, source)
    if "pos_embed" in target and "pos_embed" in state:
        state["pos_embed"] = _resized_table(state["pos_embed"], backbone)

    if faults := mismatches(state, target):
        suggestion = _encoder_of(original, source)
        raise ValueError(f"{source}: not the weights of this encoder: it {'; it '.join(faults)}{suggestion}")
    if infinite := [key for key in target if not torch.isfinite(state[key].float()).all()]:
        raise ValueError(f"{source}: {shortened(infinite)} has numbers that are not finite: its training has diverged")
    backbone.load_state_dict(state)


_WIDTHS = {384: "vits", 768: "vitb", 1024: "vitl", 1280: "vith", 1536: "vitg"}


def _encoder_of(state: dict[str, Tensor], source: str) -> str:
    """`; they are of dinov2_vits14_reg`: the alias whose network has these tensors, or ""."""
    patches = state.get("patch_embed.proj.weight", torch.empty(0, 0, 0, 0))
    if patches.ndim != 4:
        return ""
    size = f"{_WIDTHS.get(patches.shape[0], '?')}{patches.shape[3]}"
    for alias in (alias for alias in ALIASES if size in alias):
        with torch.device("meta"):
            target = _create(ALIASES[alias], None, {}).state_dict()
        with contextlib.suppress(ValueError):
            candidate = timm_keys(state, target, source)
            if candidate.keys() == target.keys() and all(
                candidate[key].shape == target[key].shape for key in target if key != "pos_embed"
            ):
                return f"; they are of {alias}"
    return ""


def _resized_table(table: Tensor, backbone: Any) -> Tensor:
    """A square position table (1,prefix+n*n,C) on the backbone's own grid."""
    if table.ndim != 3:
        return table  # as below
    prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    side = math.isqrt(max(table.shape[1] - prefix, 0))
    if side * side != table.shape[1] - prefix or side == 0:
        return table  # the caller's shape check reports it
    rows, columns = backbone.patch_embed.grid_size
    return resample_abs_pos_embed(table, new_size=[rows, columns], old_size=[side, side], num_prefix_tokens=prefix)
