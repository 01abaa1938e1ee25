"""[student]: the network that learns."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from distill.core.plugins import name_fault
from distill.core.settings import above, below, raise_faults, unknown_words


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSettings:
    """The student: an encoder and a decoder, and their initial weights; or a latent-diffusion network."""

    network: Literal["encoder_decoder", "one_step_unet"] = "encoder_decoder"
    """"one_step_unet": a latent-diffusion UNet is trained for depth, as [latent] says. `weights` is then a diffusers
    folder or hub id (Stable Diffusion's, or a student of this kind to continue from)."""
    head: Literal["vae", "dpt"] = "vae"
    """Of "one_step_unet": how latents become a map, by the VAE's decoder or a DPT head on the UNet's up-blocks.
    GenPercept has both."""
    encoder: str = "vit_small_patch16_dinov3"
    """A timm name, or an alias (students/encoder.py)."""
    weights: str = ""
    """The encoder's weights: "" draws them at random, "pretrained" takes timm's, else a file, local or of a hub
    repository (OWNER/NAME/FILE)."""
    decoder: str = "sdt"
    """One of `distill list decoders`, or a Python file of yours ("./mine.py")."""
    encoder_options: dict[str, Any] = field(default_factory=dict)
    """Options of the encoder (students.encoder.Encoder)."""
    decoder_options: dict[str, Any] = field(default_factory=dict)
    """Options of the decoder's class."""
    init_from: str = ""
    """A whole student to start from: its folder, a hub id, or "pocket" (the embedded one). Leave `weights` out then,
    except for a student that was written without its frozen encoder."""
    decoder_init_from: str = ""
    """A student whose decoder to start from: a folder, a hub id or "pocket"."""
    encoder_init_from: str = ""
    """A student whose whole encoder to start from, in place of `weights`: a folder, a hub id or "pocket"."""
    decoder_weights: str = ""
    """A released file with the decoder's own weights (Depth Anything V2's, AnyDepth's), local or OWNER/NAME/FILE on the
    hub."""
    norm: Literal["", "batch", "sync", "frozen", "group"] = ""
    """The norm of the decoder's maps: "" is the decoder's own (batch); "sync" takes statistics over all
    processes (CUDA), "frozen" stored ones, "group" none: the last two do not depend on how a batch is divided."""
    native_size: int = 0
    """The short side in pixels that the student is used at; 0 is crops.size."""
    max_depth: float = 0.0
    """The largest depth of a metric student, in metres: it predicts sigmoid * max_depth, with train.kind =
    "metric_depth"; 0 = the student predicts affine disparity. Depth Anything V2: 20 indoors, 80 outdoors."""
    canonical_focal: float = 0.0
    """For a metric student, in pixels: it learns depth * canonical_focal / focal, with the focal length at its input
    size, and its metres are output * focal / canonical_focal; max_depth is then of the canonical camera. 0 = off:
    depth as it is. Depth Anything 3 metric: 300."""
    exclude_frozen_encoder: bool = False
    """Write students without their frozen encoder; loading them then needs its file (`weights`)."""

    def __post_init__(self) -> None:
        raise_faults(unknown_words(self) + self._foreign_settings())
        fault = name_fault("distill.students.decoders", self.decoder)
        if fault:
            raise ValueError(fault)
        if self.norm and "norm" in self.decoder_options:
            raise ValueError("norm and decoder_options.norm both say it: keep norm")
        if self.norm == "group" and self.init_from:
            raise ValueError(
                'norm = "group" cannot be given to the trained student of init_from: leave one of them out'
            )
        if self.decoder_weights and (self.init_from or self.decoder_init_from):
            raise ValueError(
                "decoder_weights beside init_from or decoder_init_from: the decoder can begin from one place only"
            )
        if self.init_from and (self.encoder_init_from or self.decoder_init_from):
            raise ValueError(
                "init_from takes a whole student: encoder_init_from and decoder_init_from would be passed over, leave "
                "them out"
            )
        if self.init_from and self.weights == "pretrained":
            raise ValueError(
                'init_from takes a whole student: weights = "pretrained" would be passed over, leave one of them out'
            )
        if self.encoder_init_from and self.weights:
            raise ValueError(
                "encoder_init_from and weights both say what the encoder begins with: leave one of them out"
            )
        raise_faults(below(self, native_size=0, max_depth=0, canonical_focal=0) + above(self, native_size=8192))

    @property
    def is_one_step(self) -> bool:
        """Whether the network is a one-step UNet on latents."""
        return self.network == "one_step_unet"

    def _foreign_settings(self) -> list[str]:
        """Faults of settings for parts that the network does not have."""
        if self.network == "encoder_decoder":
            return ['head is of network = "one_step_unet"'] if self.head != "vae" else []
        other_settings = {f.name for f in fields(self)} - {"network", "head", "weights", "native_size"}
        defaults = StudentSettings()
        changed = sorted(name for name in other_settings if getattr(self, name) != getattr(defaults, name))
        faults = [f'{", ".join(changed)}: no part of network = "one_step_unet", leave it out'] if changed else []
        if self.weights in ("", "pretrained"):
            faults.append('network = "one_step_unet" begins from a diffusers folder or hub id: give weights')
        return faults
