"""Shared by the latent-diffusion teachers: loading Stable Diffusion parts, encoding images, decoding latents to maps.

A folder of parts is what diffusers writes: unet/, vae/, text_encoder/, tokenizer/ and perhaps scheduler/. Old files are
read too: text encoders with or without the `text_model.` prefix (transformers drops it when saving; if ignored,
the encoder silently stays random), position ids as a buffer, and VAE attention under its old names.

Surprises, measured in the authors' pipelines: the latent factor is 0.18215 whatever the VAE's configuration says; the
empty prompt is two tokens, not 77; images are resized as 8-bit values, so they are rounded again; the long side is
also enlarged to the native size, and the short side is floored (1226 wide at 768 gives 767: floats).

Sources: prs-eth/Marigold marigold/marigold_depth_pipeline.py and marigold/util/image_util.py; aim-uofa/GenPercept
genpercept/genpercept_pipeline.py; yunpeng1998/FiffDepth fiffdepth/direct_pipeline.py.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.depth import DepthMap, Kind
from distill.teachers import (
    WeightsMismatchError,
    WeightsMissingError,
    find_weights,
    finite,
    load_strictly,
    pad_to_multiple,
    read_config,
    read_state,
    resolve,
)
from distill.teachers._described import described_config, read_described
from distill.teachers._where import described_by, whole_number

_log = logging.getLogger(__name__)

FACTOR = 0.18215
NATIVE = 768
MULTIPLE = 8
HEAD = "dpt_head_identity"
_UNET = "diffusion_pytorch_model"

# Files downloaded from a hub repository: one weights file per part, no half-precision copies, no safety checker.
FILES = (
    "model_index.json",
    "scheduler/*.json",
    "tokenizer/*",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "*/*.safetensors.index.json",
    "*/*-of-*.safetensors",
    "unet/config.json",
    f"unet/{_UNET}.safetensors",
    "vae/config.json",
    f"vae/{_UNET}.safetensors",
)


@dataclass(frozen=True, slots=True)
class Parts:
    """A loaded model. prompt: (1,2,C) the empty prompt's embedding. index: model_index.json."""

    unet: Any
    vae: Any
    prompt: Tensor
    index: dict[str, Any]

    @property
    def factor(self) -> int:
        """Pixels per latent: 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def find_folder(weights: str, *, files: Sequence[str] = FILES, part: str = "unet") -> Path:
    """The folder of parts that `weights` names; raises WeightsMissingError if it is not such a folder."""
    folder = resolve(weights, files=files)
    if not (folder / part / "config.json").is_file():
        raise WeightsMissingError(f"{folder} is not a diffusers folder: it has no {part}/config.json")
    if absent := [name for name in ("vae", "text_encoder", "tokenizer") if not (folder / name).is_dir()]:
        raise WeightsMissingError(
            f"{folder} lacks {', '.join(absent)}: copy them from the checkpoint that its training began with (trainers "
            "store the UNet alone), and scheduler and model_index.json"
        )
    return folder


def load_parts(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype, what: str, unet: Any = None, channels: int
) -> Parts:
    """Loads everything in `folder` but the scheduler, strictly, in evaluation mode.

    unet: one that is already loaded, instead of the folder's. channels: the input channels that the UNet must have (4:
    the image; 8: image and map), so that a model of another family is rejected.
    """
    import diffusers

    unet = unet if unet is not None else load_unet(folder / "unet", what=what, dtype=dtype)
    if unet.config.in_channels != channels:
        raise WeightsMismatchError(
            f"{folder}: its UNet takes {unet.config.in_channels} channels, {what} takes {channels}"
        )
    if unet.config.class_embed_type or unet.config.num_class_embeds:
        raise WeightsMismatchError(f"{folder}: its UNet wants a task beside the image, as Lotus's: it is no {what}")
    vae = _load_part(diffusers.AutoencoderKL, folder / "vae", "encoder.conv_in.weight", what, dtype)
    if torch.device(device).type == "cpu":
        # One image of the batch at a time: a third of the memory at the same speed (tests/speed/teachers.py).
        vae.enable_slicing()
    prompt = _empty_prompt(folder, what)
    return Parts(
        unet=unet.eval().requires_grad_(False).to(device),
        vae=vae.eval().requires_grad_(False).to(device),
        prompt=prompt.to(device=device, dtype=dtype),
        index=_read_index(folder / "model_index.json"),
    )


def _read_index(file: Path) -> dict[str, Any]:
    """model_index.json, with its defaults as whole numbers."""
    index = read_config(file)
    steps, size = "default_denoising_steps", "default_processing_resolution"
    return index | {steps: whole_number(index, steps, file, least=0), size: whole_number(index, size, file, least=0)}


def load_unet(
    folder: Path, *, what: str, dtype: torch.dtype, config: Path | None = None, headless: bool = False
) -> Any:
    """Loads the UNet in `folder`, with config.json from `config` if the folder has none.

    headless: the last norm and convolution may be missing, because only the up-blocks are used.
    """
    import diffusers

    optional = ("conv_norm_out.", "conv_out.") if headless else ()
    config = folder if (folder / "config.json").is_file() or config is None else config
    return _load_part(
        diffusers.UNet2DConditionModel, folder, "conv_in.weight", what, dtype, config=config, optional=optional
    )


_WEIGHTS = (
    *(f"{_UNET}.safetensors", f"{_UNET}.fp16.safetensors", f"{_UNET}.bin"),
    *(f"{_UNET}.*.safetensors", f"{_UNET}.*.bin"),  # other variants: bf16, non_ema
)
_OLD_ATTENTION = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))")
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _load_part(
    part: Any,
    folder: Path,
    anchor: str,
    what: str,
    dtype: torch.dtype,
    *,
    config: Path | None = None,
    optional: tuple[str, ...] = (),
) -> Any:
    """A UNet or VAE; config: the folder of its config.json, if another. optional: what may be missing, by prefix."""
    config = config or folder
    if not (config / "config.json").is_file():
        raise WeightsMissingError(f"{config} has no config.json: complete the folder")
    file = find_weights(folder, _WEIGHTS)
    state = read_described(file, anchors=(anchor,))
    state = {_OLD_ATTENTION.sub(lambda m: m[1] + _ATTENTION[m[2]] + m[3], key): v for key, v in state.items()}
    # Drawing random weights takes longer than reading the file; those that it may lack are drawn.
    with contextlib.nullcontext() if optional else torch.device("meta"):
        table = read_config(config / "config.json")
        with described_by(config / "config.json", f"{what} {config.name}"):
            network = part.from_config(table)
    drawn = {key: tensor for key, tensor in network.state_dict().items() if key.startswith(optional or "\0")}
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in (drawn | state).items()}
    load_strictly(network, state, file, what=what)
    return network.requires_grad_(True).eval()


def _empty_prompt(folder: Path, what: str) -> Tensor:
    """(1,2,C): the last hidden state of the empty prompt's two tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    file = find_weights(folder / "text_encoder", ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"))
    if not (folder / "tokenizer").is_dir():
        raise WeightsMissingError(f"{folder} has no tokenizer/: complete the folder")
    part = f"{what} text encoder"
    config = described_config(CLIPTextConfig, folder / "text_encoder", what=part)
    with described_by(folder / "text_encoder" / "config.json", part):
        encoder = CLIPTextModel(config)
    prefixed = all(key.startswith("text_model.") for key in encoder.state_dict())
    plain = {key.removeprefix("text_model."): tensor.float() for key, tensor in read_state(file).items()}
    plain.pop("embeddings.position_ids", None)
    state = {f"text_model.{key}" if prefixed else key: tensor for key, tensor in plain.items()}
    load_strictly(encoder, state, file, what=part)
    for table in sorted((folder / "tokenizer").glob("*.json")):
        read_config(table)  # whose error has a class and the file's name: the tokenizer's own is a bare Exception
    with described_by(folder / "tokenizer", "tokenizer of CLIP"):
        tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")("", padding="do_not_pad").input_ids
        with torch.no_grad():  # refuses a token that the encoder does not know
            return encoder.eval()(torch.tensor([tokens])).last_hidden_state


def resize_long_side(images: Tensor, size: int, *, least: int = 1) -> Tensor:
    """(B,3,H,W) in [0,1] with its long side at `size` (0: as given), rounded to 8-bit steps, unclamped.

    least: the minimum side of a very narrow image, because a VAE fails on less than one latent. Ours.
    """
    height, width = images.shape[-2:]
    scale = min(size / width, size / height) if size else 1.0
    shape = (max(least, int(height * scale)), max(least, int(width * scale)))
    if shape == (height, width):
        return images
    steps = (images * 255).round()
    steps = F.interpolate(steps, shape, mode="bilinear", antialias=True, align_corners=False)
    return steps.round() / 255


def prepare(images: Tensor, *, resize: str, native_size: int, factor: int) -> Tensor:
    """The VAE's input images, in [0,1]: resized by the authors' rule, or padded to a multiple of `factor`."""
    if resize == "native":
        return resize_long_side(images, native_size, least=factor)
    return pad_to_multiple(images, factor)


def encode(parts: Parts, images: Tensor) -> Tensor:
    """(B,3,H,W) in [0,1] -> latents (B,4,h,w): the posterior's mean, scaled."""
    parameter = next(parts.vae.parameters())
    inputs = (images * 2 - 1).to(device=parameter.device, dtype=parameter.dtype)
    mean: Tensor = within_memory(parts.vae, lambda: parts.vae.encode(inputs).latent_dist.mean)
    return mean * FACTOR


def decode(parts: Parts, latents: Tensor) -> Tensor:
    """Latents (B,4,h,w) -> maps (B,H,W) in [0,1]: the mean of the three decoded channels, clipped."""
    latents = (latents / FACTOR).to(next(parts.vae.parameters()).dtype)
    decoded = within_memory(parts.vae, lambda: parts.vae.decode(latents).sample)
    return (decoded.float().mean(dim=1).clip(-1, 1) + 1) / 2


def within_memory(vae: Any, work: Callable[[], Tensor]) -> Tensor:
    """Runs the VAE's `work` on the whole batch; on out-of-memory retries image by image, then in tiles.

    The VAE keeps the reduced mode, so that only one batch is computed twice. Tiles are blended at their seams and
    change the map a little, which is logged as a warning. Raises torch.OutOfMemoryError if even tiles do not fit.
    """
    for reduce_memory in (vae.enable_slicing, vae.enable_tiling):
        try:
            return work()
        except torch.OutOfMemoryError:
            if reduce_memory == vae.enable_tiling:
                _log.warning("the VAE works in tiles, for an image is too large for the memory: maps differ at seams")
            reduce_memory()
    return work()


def run_unet(parts: Parts, inputs: Tensor, timestep: Tensor | int) -> Tensor:
    """The UNet's raw output at `timestep`, under the empty prompt."""
    if not isinstance(timestep, Tensor):  # not torch.as_tensor, which would wait for the GPU's queued work
        timestep = torch.full((), timestep, device=inputs.device)
    steps = timestep.to(inputs.device).expand(len(inputs))
    prompt = parts.prompt.expand(len(inputs), -1, -1)
    return parts.unet(inputs, steps, encoder_hidden_states=prompt).sample


def up_blocks(parts: Parts, inputs: Tensor, timestep: Tensor | int) -> list[Tensor]:
    """Outputs of the UNet's up-blocks, from coarse to fine; the later layers run, but their output is ignored."""
    blocks: list[Tensor] = []

    def keep(block: Any, inputs: Any, output: Tensor) -> None:
        blocks.append(output)

    handles = [block.register_forward_hook(keep) for block in parts.unet.up_blocks]
    try:
        run_unet(parts, inputs, timestep)
    finally:
        for handle in handles:
            handle.remove()
    return blocks


def restore(values: Tensor, images: Tensor, sized: Tensor, *, resize: str, kind: Kind) -> DepthMap:
    """Brings maps (B,h,w) in [0,1] to the size of `images`: resizes with antialias, or cuts the padding off; clips.

    sized: the images as the network saw them; a DPT head's map has another size where latents are odd.
    """
    height, width = images.shape[-2:]
    size = (height, width) if resize == "native" else sized.shape[-2:]
    if values.shape[-2:] != size:
        values = F.interpolate(values[:, None], size, mode="bilinear", antialias=True, align_corners=False)[:, 0]
    return finite(values[:, :height, :width].clip(0, 1).to(images.device), kind)


def check_one_step(what: str, steps: int, ensemble: int) -> None:
    """Raises ValueError unless both are 1: the network runs once and is deterministic."""
    if steps != 1 or ensemble != 1:
        raise ValueError(f"{what} takes one step and has nothing to average: steps and ensemble must be 1")


def default_size(native_size: int | None, parts: Parts) -> int:
    """The native size: `native_size` if set (0: no resizing), else the checkpoint's own default, else 768."""
    checkpoint_size: int | None = parts.index.get("default_processing_resolution")
    return native_size if native_size is not None else NATIVE if checkpoint_size is None else checkpoint_size
