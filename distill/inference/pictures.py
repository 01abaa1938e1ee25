"""Conversion of pictures (files, PIL images, arrays, tensors) to a network's input, or one line of advice.

The worst error is silent: a float image of 0 to 255, or one that is already normalised, gives a map that looks like
depth but is wrong. So shapes and ranges are checked, and the advice names the call that fixes them.

Shapes: H height, W width, C channels (1 grey, 3 RGB, 4 RGBA, which is composited over white).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.core.home import home_expanded
from distill.data.filetypes import is_film
from distill.data.photos import BadImageError, decode, decode_opened, not_a_file

CHANNELS = (1, 3, 4)
SLACK = 0.25
"""How far beyond [0,1] a float image may go: enough for bicubic resizing and light jitter, far below 0..255."""

Picture = str | Path | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray | Tensor


JPEG_SIDE = 65500
"""The longest side, in pixels, that libjpeg writes."""


def within_jpeg(rgb: np.ndarray) -> np.ndarray:
    """Return (H,W,3) unchanged, or for a panorama every n-th pixel, so that it fits into a JPEG."""
    step = -(-max(rgb.shape[:2]) // JPEG_SIDE)
    return rgb[::step, ::step]


def is_batch(image: Any) -> bool:
    """True for an array or a tensor with a batch dimension in front."""
    return isinstance(image, np.ndarray | Tensor) and image.ndim == 4


def is_file(image: Any) -> bool:
    """True for an open file: a file object, BytesIO, an upload of a web framework."""
    return callable(getattr(image, "read", None))


def _contents(file: Any) -> bytes:
    """Return the whole content of an open file, from its start; raises TypeError for one opened as text."""
    if callable(getattr(file, "seek", None)):
        with contextlib.suppress(OSError):  # a pipe cannot seek
            file.seek(0)
    try:
        data = file.read()
    except UnicodeDecodeError:
        data = ""
    if not isinstance(data, bytes):
        raise TypeError('a picture\'s file is to be open in binary: open(path, "rb")')
    return data


def picture(image: Picture) -> Tensor:
    """Convert one picture to (3,H,W) RGB, uint8 or float32 in [0,1].

    image: a path, the bytes of an image file or an open one (EXIF rotation applied), a PIL image, a numpy array (H,W)
    or (H,W,C), a tensor (C,H,W); arrays are uint8, or float in [0,1]. Raises TypeError or ValueError with advice,
    BadImageError for a file that cannot be decoded, OSError for a missing one.
    """
    if isinstance(image, str | Path):
        path = home_expanded(image)
        if path.is_dir():
            raise ValueError(f"{path}: is a folder; give its files one by one, or run distill predict {path}")
        if fault := not_a_file(path) if path.exists() else "":
            raise ValueError(f"{path}: {fault}")
        if "://" in str(image) and not path.exists():
            raise FileNotFoundError(f"{image}: a URL, but only local files are read: download it")
        try:
            return decode(path.read_bytes())
        except BadImageError as error:
            if not is_film(path.name):
                raise
            line = f"{path}: a video: run distill predict {path}, or give its frames, such as a generator of arrays"
            raise ValueError(line) from error
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(bytes(image))
    if is_file(image):
        return decode(_contents(image))
    if isinstance(image, Image.Image):
        return _pil(image)
    if isinstance(image, np.ndarray):
        return checked(_numpy(image))
    if isinstance(image, Tensor):
        return checked(image)
    raise TypeError(f"a picture is a path, a PIL image, a numpy array or a tensor, not {type(image).__name__}")


def _pil(image: Image.Image) -> Tensor:
    if image.mode == "F":
        raise ValueError("a PIL image of mode F has no known range: scale it to 0..255 and convert it to mode L")
    return decode_opened(image)


def _numpy(image: np.ndarray) -> Tensor:
    """Convert (H,W) or (H,W,C) to (C,H,W)."""
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3:
        raise ValueError(f"a numpy picture is H x W x C or H x W, not {_shape(image)}")
    if image.shape[-1] not in CHANNELS:
        hint = ": it is C x H x W; use image.transpose(1, 2, 0)" if image.shape[0] in CHANNELS else ""
        raise ValueError(f"a numpy picture is H x W x 3, not {_shape(image)}{hint}")
    if image.dtype == np.uint16:
        raise ValueError("a picture of uint16 has no range that everybody agrees on: use image / 65535")
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def checked(image: Tensor) -> Tensor:
    """Convert a picture or batch tensor to (...,3,H,W) uint8 or float32; raises ValueError with advice."""
    if image.ndim not in (3, 4):
        hint = ": add the channel dimension, image[None]" if image.ndim == 2 else ""
        raise ValueError(f"a tensor picture is C x H x W, or B x C x H x W, not {_shape(image)}{hint}")
    if image.shape[-3] not in CHANNELS:
        channels_last = image.shape[-1] in CHANNELS
        order = "2, 0, 1" if image.ndim == 3 else "0, 3, 1, 2"
        hint = f": its channels are last; use image.permute({order})" if channels_last else ""
        raise ValueError(f"a tensor picture has 3 channels in front of H x W, not {_shape(image)}{hint}")
    if 0 in image.shape:
        raise ValueError(f"a picture of {_shape(image)} has no pixels")
    if image.dtype != torch.uint8:
        image = _floats(image)
    channels = image.shape[-3]
    if channels == 4:
        return _over_white(image)
    return image.expand(*image.shape[:-3], 3, -1, -1) if channels == 1 else image


def _floats(image: Tensor) -> Tensor:
    if not image.is_floating_point():
        raise ValueError(f"a picture is uint8, or float in [0,1], not {_dtype(image)}: convert 0..255 to uint8")
    low, high = (float(x) for x in image.aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("the picture has values that are not finite (NaN or infinity)")
    if low < -SLACK:
        raise ValueError(
            f"a float picture is in [0,1], not {low:.3g} to {high:.3g}: give it before normalisation, the model does "
            "that itself"
        )
    if high > 1 + SLACK:
        raise ValueError(f"a float picture is in [0,1], not {low:.3g} to {high:.3g}: divide by 255, or give uint8")
    return image.float()


def _over_white(image: Tensor) -> Tensor:
    white = 255.0 if image.dtype == torch.uint8 else 1.0
    colours, alpha = image[..., :3, :, :].float(), image[..., 3:, :, :].float() / white
    composited = colours * alpha + white * (1.0 - alpha)
    return composited.round().to(torch.uint8) if image.dtype == torch.uint8 else composited


def _shape(image: np.ndarray | Tensor) -> str:
    return " x ".join(map(str, image.shape)) or "one number"


def _dtype(image: Tensor) -> str:
    return str(image.dtype).removeprefix("torch.")
