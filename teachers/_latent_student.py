"""A latent-diffusion network in training, and the folder it is saved to, which the FiffDepth, GenPercept or Marigold
teacher reads.

The UNet is trained (and GenPercept's DPT head, if present); the VAE and the empty prompt's embedding are frozen and not
part of the state: copies of the network share them, and checkpoints do not contain them.

The folder has diffusers' layout: unet/; vae/, text_encoder/ and tokenizer/ copied from the base; model_index.json;
scheduler/ if the network denoises; distill.json, which describes the folder to our teachers (kind, licence, card,
hashes); README.md. It is written to a temporary folder and renamed.

Shapes: B images, H x W, latents h x w.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.core import files
from distill.core.depth import Kind
from distill.core.folders import LATENT
from distill.core.strictness import mismatches
from distill.core.tensors import save_file
from distill.students.modelcard import latent_card
from distill.teachers import (
    WeightsMismatchError,
    WeightsMissingError,
    find_weights,
    read_config,
    read_state,
    revision_of,
)
from distill.teachers import _latent as latent
from distill.teachers._dpt_head import DptHead
from distill.teachers._where import described_by

FILES = (*latent.FILES, f"{latent.HEAD}/*")
BASES = ("vae", "text_encoder", "tokenizer")
# GenPercept's hf_configs/dpt-sd2.1-unet-after-upsample-general has 256 and 32 for 320 channels; others in proportion.
HEAD_WIDTH, HEAD_HIDDEN = 256 / 320, 32 / 320
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
"""Stable Diffusion's noise schedule, for values that the base's scheduler config lacks."""
SAMPLING = {
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
"""Further settings of Marigold v1-1's sampler."""


class _Fixed:
    """The frozen parts and the base folder, which all copies of a student share."""

    def __init__(self, parts: latent.Parts, base: Path) -> None:
        self.parts, self.base = parts, base

    def __deepcopy__(self, memo: Any) -> _Fixed:
        return self


class LatentStudent(nn.Module):
    """UNet (and DPT head) in training. teacher: the plug-in that reads its folder. kind: what it predicts.

    alphas: (1000,), the cumulative products of its noise schedule. native_size: the side of the square training images.
    """

    def __init__(
        self,
        parts: latent.Parts,
        base: Path,
        *,
        teacher: str,
        kind: Kind,
        timestep: int = 0,
        head: DptHead | None = None,
        zero_snr: bool = False,
        native_size: int | None = None,
    ) -> None:
        super().__init__()
        self.unet = parts.unet.requires_grad_(True)
        self.head = head
        if head is not None:
            _freeze_output_layers(self.unet)
        self.fixed = _Fixed(replace(parts, unet=None), base)
        self.teacher, self.kind, self.timestep, self.native_size = teacher, kind, timestep, native_size
        self.zero_snr = zero_snr
        self.alphas = _alphas(base, zero_snr=zero_snr)

    @property
    def parts(self) -> latent.Parts:
        """This copy's UNet with the shared VAE and prompt."""
        return replace(self.fixed.parts, unet=self.unet)

    @property
    def factor(self) -> int:
        """Pixels per latent pixel."""
        return self.parts.factor

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # The frozen parts are not registered, but follow the network to its device and dtype.
        fixed = self.fixed.parts
        fixed.vae._apply(fn)
        self.fixed.parts = replace(fixed, prompt=fn(fixed.prompt))
        return super()._apply(fn, recurse)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches recomputation of the UNet's activations in the backward pass on or off."""
        if enable:
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.disable_gradient_checkpointing()

    def encode(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] -> latents (B,4,h,w), without a gradient; one image at a time, so that its latents do not
        depend on the batch.
        """
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return torch.cat([latent.encode(self.parts, image[None]) for image in images.float()])

    def encode_maps(self, maps: Tensor) -> Tensor:
        """(B,H,W) in [-1,1] -> latents (B,4,h,w), encoded as grey images."""
        return self.encode(((maps + 1.0) / 2.0)[:, None].expand(-1, 3, -1, -1))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B,4,h,w) -> maps (B,H,W), unclipped, about [-1,1]: the mean of three channels. With a gradient."""
        parts = self.parts
        with torch.autocast(latents.device.type, enabled=False):
            decoded = parts.vae.decode((latents.float() / latent.FACTOR).to(next(parts.vae.parameters()).dtype)).sample
        return decoded.float().mean(dim=1)

    def forward(self, inputs: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """With timesteps (B,): the UNet's raw output (B,4,h,w) on latents, or the head's raw map (B,H,W).

        Without: maps (B,H,W) in about [-1,1], of images (B,3,H,W) in [0,1]; a network that denoises starts from zeros
        at the last noise level.
        """
        if timesteps is not None:
            return self._run(inputs, timesteps)
        context = self.encode(inputs)
        if self.teacher == "marigold":
            last = torch.full((len(inputs),), len(self.alphas) - 1, device=inputs.device)
            return self.decode(-self._run(torch.cat([context, torch.zeros_like(context)], 1), last))
        out = self._run(context, torch.full((len(inputs),), self.timestep, device=inputs.device))
        return out if self.head is not None else self.decode(-out if self.teacher == "genpercept" else out)

    def _run(self, inputs: Tensor, timesteps: Tensor) -> Tensor:
        if self.head is None:
            return latent.run_unet(self.parts, inputs, timesteps)
        blocks = latent.up_blocks(self.parts, inputs, timesteps)
        return self.head(blocks)


def _alphas(base: Path, *, zero_snr: bool) -> Tensor:
    """(1000,): the base's own schedule; zero_snr: rescaled so that its last level has no signal (Marigold v1-1)."""
    return _scheduler("DDPMScheduler", base, zero_snr=zero_snr).alphas_cumprod


def _scheduler(name: str, base: Path, *, zero_snr: bool, **more: Any) -> Any:
    import diffusers

    base_config = read_config(base / "scheduler" / "scheduler_config.json")
    table = {key: base_config.get(key, value) for key, value in SCHEDULE.items()}
    with described_by(base / "scheduler" / "scheduler_config.json", "scheduler"):
        return getattr(diffusers, name)(**table, rescale_betas_zero_snr=zero_snr, **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentStudentSpec:
    """The configuration of a student; see LatentStudent. head: "vae" or "dpt"."""

    teacher: str
    kind: Kind
    timestep: int = 0
    head: str = "vae"
    zero_snr: bool = False
    native_size: int | None = None


def build_student(weights: str, asked: LatentStudentSpec) -> LatentStudent:
    """Builds a student from a diffusers folder or hub id: Stable Diffusion's, or that of an earlier latent student.

    For Marigold, which denoises a map beside the image, an input layer of 4 channels is widened to 8, with its weights
    repeated and halved. A DPT head is read from the folder, or initialised from torch's generator. Raises
    WeightsMissingError or WeightsMismatchError.
    """
    folder = latent.find_folder(weights, files=FILES)
    has_dpt_head = asked.head == "dpt"
    unet = latent.load_unet(folder / "unet", what="one-step", dtype=torch.float32, headless=has_dpt_head)
    channels = 8 if asked.teacher == "marigold" else 4
    if channels == 8 and unet.config.in_channels == 4:
        _widen(unet)
    parts = latent.load_parts(
        folder, device="cpu", dtype=torch.float32, what="one-step student", unet=unet, channels=channels
    )
    head = None
    if has_dpt_head:
        if len(unet.up_blocks) != 4:
            raise WeightsMismatchError(f"{folder}: a DPT head reads four up-blocks, its UNet has {len(unet.up_blocks)}")
        widths = list(unet.config.block_out_channels)
        width, hidden = (max(2, round(share * widths[0])) for share in (HEAD_WIDTH, HEAD_HIDDEN))
        head = DptHead(widths, width, hidden)
        if (folder / latent.HEAD).is_dir():
            file = find_weights(folder / latent.HEAD, ("*.safetensors", "*.bin"))
            state = read_state(file)
            if faults := mismatches(state, head.state_dict()):
                raise WeightsMismatchError(f"{file} is not this network's DPT head: it {'; it '.join(faults)}")
            head.load_state_dict(state)
    return LatentStudent(
        parts,
        folder,
        teacher=asked.teacher,
        kind=asked.kind,
        timestep=asked.timestep,
        head=head,
        zero_snr=asked.zero_snr,
        native_size=asked.native_size,
    )


def _widen(unet: Any) -> None:
    old = unet.conv_in
    new = nn.Conv2d(8, old.out_channels, old.kernel_size, old.stride, old.padding)
    new.weight = nn.Parameter(old.weight.detach().repeat(1, 2, 1, 1) * 0.5)
    new.bias = nn.Parameter(old.bias.detach().clone())
    unet.conv_in = new
    unet.register_to_config(in_channels=8)


def _freeze_output_layers(unet: Any) -> None:
    """Freezes the layers after the up-blocks: a DPT head reads the up-blocks, so they would never get a gradient."""
    for part in (unet.conv_norm_out, unet.conv_out):
        if part is not None:
            part.requires_grad_(False)


def save(student: LatentStudent, folder: str | Path, *, card: Mapping[str, Any] | None = None) -> Path:
    """Writes the folder that the student's teacher reads, replacing an older one; returns it.

    Raises FileExistsError if `folder` holds anything else, OSError if it cannot be written; the old content is then
    kept.
    """
    folder, card = Path(folder), dict(card or {})
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LATENT).is_file():
        raise FileExistsError(f"{folder}: holds something else; a student is only saved to a folder of its own")
    base = student.fixed.base
    with files.writing_folder(folder) as new:
        _write_unet(student.unet, new / "unet")
        for part in BASES:
            shutil.copytree(base / part, new / part)
        if student.head is not None:
            (new / latent.HEAD).mkdir()
            state = {key: value.detach().cpu().contiguous() for key, value in student.head.state_dict().items()}
            save_file(state, new / latent.HEAD / "model.safetensors")
        index: dict[str, Any] = {"_class_name": f"{student.teacher.capitalize()}Pipeline"}
        if student.native_size:
            index["default_processing_resolution"] = student.native_size
        if student.teacher == "marigold":
            index["default_denoising_steps"] = 4
            sampler = _scheduler("DDIMScheduler", base, zero_snr=student.zero_snr, **SAMPLING)
            sampler.save_pretrained(new / "scheduler")
        (new / "model_index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        description = {
            "version": 1,
            "teacher": student.teacher,
            "kind": str(student.kind),
            "timestep": student.timestep,
            "native_size": student.native_size,
            "base_revision": revision_of(base),
            "card": card,
        }
        (new / LATENT).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        page = latent_card(folder.name, card, teacher=student.teacher, kind=student.kind)
        (new / "README.md").write_text(page, encoding="utf-8")
    return folder


def _write_unet(unet: Any, folder: Path) -> None:
    """Writes the UNet in diffusers' format, but without diffusers' hub calls and with every tensor copied."""
    folder.mkdir(parents=True)
    unet.save_config(folder)
    state = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in unet.state_dict().items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def describe(folder: Path) -> dict[str, Any]:
    """The content of distill.json; raises WeightsMissingError if the folder is not a student trained here."""
    description = read_config(folder / LATENT)
    if not description:
        raise WeightsMissingError(f"{folder} has no {LATENT}: it was not trained here")
    return description
