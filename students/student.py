"""A student: an encoder and a decoder as one network, and how it is built from plain names."""

from __future__ import annotations

import importlib
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.depth import Kind
from distill.core.plugins import find, option_faults
from distill.core.resample import resize_bilinear
from distill.core.wording import first_line
from distill.students.encoder import Encoder, Feature


class Student(nn.Module):
    """Encoder + decoder: images (B,3,H,W) in [0,1], any size, to raw affine disparity (B,H,W), larger is nearer.

    native_size: the side of the squares it was trained on, in pixels; None if unknown. decoder_name: the decoder's
    plug-in name (`find`); its module's name by default. max_depth: the largest depth, in metres; the output is then
    metric depth, sigmoid(raw) * max_depth, as in Depth Anything V2's metric models. None: affine disparity.
    canonical_focal: metric depth is for a camera of this focal length in pixels (core.focal); None: the image's own.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Any,
        *,
        native_size: int | None = None,
        decoder_name: str = "",
        max_depth: float | None = None,
        canonical_focal: float | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.native_size = native_size
        self.max_depth = max_depth
        self.canonical_focal = canonical_focal
        self.decoder_name = decoder_name or type(decoder).__module__.rpartition(".")[2]

    @property
    def kind(self) -> Kind:
        """The kind of its maps."""
        return Kind.METRIC_DEPTH if self.max_depth else Kind.AFFINE_DISPARITY

    @property
    def spec(self) -> dict[str, Any]:
        """Plain values from which `build(**spec)` makes the same student (with other weights).

        Raises ValueError if another decoder than `decoder_name` was put in its place, and is none of this package's.
        """
        return {
            "encoder": self.encoder.name,
            "encoder_options": dict(self.encoder.options),
            "decoder": _plugin_name(self.decoder, self.decoder_name),
            "decoder_options": dict(self.decoder.options),
            "native_size": self.native_size,
            **({"max_depth": self.max_depth} if self.max_depth else {}),
            **({"canonical_focal": self.canonical_focal} if self.canonical_focal else {}),
        }

    def push_to_hub(
        self, repository: str, *, card: Mapping[str, Any] | None = None, private: bool = False, message: str = ""
    ) -> str:
        """Upload it as OWNER/NAME on the hub, where `distill.load("OWNER/NAME")` finds it; the commit's URL.

        card: plain values for README.md and student.json, licence and teachers among them. Raises OSError in one line.
        """
        # Imported by name, because checkpoint imports this module.
        checkpoint = importlib.import_module("distill.students.checkpoint")
        return str(checkpoint.push_to_hub(self, repository, card=card, private=private, message=message))

    def forward(self, images: Tensor, with_features: bool = False, features: Sequence[Feature] | None = None) -> Any:
        """(B,H,W) float32 of images (B,3,H,W); with_features: also the encoder's last patch map (B,C,h,w).

        features: the encoder's output for these images, if already known (a frozen one's, stored); only the size of the
        images is then used.

        The image is padded to the encoder's patch, and the output is cropped. Request features through this call, not
        separately, if a wrapper (DistributedDataParallel) must see the forward pass.
        """
        height, width = images.shape[-2:]
        features = self.encoder(images) if features is None else features
        raw = self.decoder(features)
        left, right, top, bottom = self.encoder.padding(height, width)
        padded = (top + height + bottom, left + width + right)
        raw = raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw
        if raw.shape[-2:] != padded:
            raw = resize_bilinear(raw, (padded[0], padded[1]), align_corners=False)
        values = in_metres(raw[:, 0, top : top + height, left : left + width], self.max_depth)
        return (values, features[-1][0]) if with_features else values


def unwrapped(model: nn.Module) -> Student:
    """The student itself, inside the wrappers of torch.compile and of data parallelism; TypeError if there is none."""
    inner: Any = model
    while not isinstance(inner, Student):
        inside = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(inside, nn.Module):
            raise TypeError(f"a student is a distill.students.Student, not {type(model).__name__}")
        inner = inside
    return inner


def plain_state(student: Student) -> dict[str, Tensor]:
    """Its state_dict, by the names that it has where neither encoder nor decoder is compiled."""
    return {
        ".".join(part for part in key.split(".") if part != "_orig_mod"): value
        for key, value in student.state_dict().items()
    }


def _plugin_name(decoder: Any, name: str) -> str:
    """`name`, or that of the decoder that a user has put in the place of the one called `name`."""
    package = "distill.students.decoders"
    made = type(getattr(decoder, "_orig_mod", decoder))
    try:
        named = find(package, name).Decoder
    except LookupError:
        return name
    # By name too, because a notebook may have reloaded the file.
    if issubclass(made, named) or (made.__module__, made.__qualname__) == (named.__module__, named.__qualname__):
        return name
    folder, _, own = made.__module__.rpartition(".")
    if folder != package:
        raise ValueError(
            f"the student's decoder is {made.__module__}.{made.__qualname__}, not {name}: set its decoder_name to the "
            "plug-in that makes it, a name or a file"
        )
    return own


def in_metres(raw: Tensor, max_depth: float | None) -> Tensor:
    """The decoder's output as metric depth in (0, max_depth); as it is where max_depth is None."""
    return torch.sigmoid(raw) * max_depth if max_depth else raw


def build(
    *,
    encoder: str,
    decoder: str,
    encoder_options: Mapping[str, Any] | None = None,
    decoder_options: Mapping[str, Any] | None = None,
    native_size: int | None = None,
    max_depth: float | None = None,
    canonical_focal: float | None = None,
) -> Student:
    """A student from plain names and options; `in_channels` and `patch_size` are the encoder's unless given.

    Raises LookupError for an unknown encoder or decoder, ValueError for an option that the part does not take.
    """
    if native_size is not None and (not isinstance(native_size, int) or native_size < 1):
        raise ValueError(f"native_size must be a positive number of pixels, not {native_size!r}")
    if max_depth is not None and not (isinstance(max_depth, int | float) and 0 < max_depth < math.inf):
        raise ValueError(f"max_depth must be a positive number of metres, not {max_depth!r}")
    if canonical_focal is not None and not (max_depth and 0 < canonical_focal < math.inf):
        raise ValueError(
            f"canonical_focal must be a positive number of pixels, with max_depth, not {canonical_focal!r}"
        )
    decoder = os.fspath(decoder)
    plugin = find("distill.students.decoders", decoder).Decoder
    encoder_part = _construct(partial(Encoder, encoder), "encoder_options", dict(encoder_options or {}))
    decoder_defaults = {"in_channels": [encoder_part.channels] * 4, "patch_size": encoder_part.patch_size}
    accepted = inspect.signature(plugin).parameters
    options = {key: value for key, value in decoder_defaults.items() if key in accepted} | dict(decoder_options or {})
    decoder_part = _construct(plugin, "decoder_options", options)
    return Student(
        encoder_part,
        decoder_part,
        native_size=native_size,
        decoder_name=decoder,
        max_depth=max_depth,
        canonical_focal=canonical_focal,
    )


def _construct(plugin: Callable[..., Any], what: str, options: dict[str, Any]) -> Any:
    faults = [f"{what} may not hold the name"] if "name" in options else []
    faults += option_faults(plugin, options, what)
    if faults:
        raise ValueError("; ".join(faults))
    try:
        return plugin(**options)
    except (TypeError, RuntimeError, ZeroDivisionError) as error:  # PyTorch's errors for a negative or a missing number
        raise ValueError(f"{what} {options}: {first_line(error)}") from error
