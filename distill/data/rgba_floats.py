"""float32 maps in the four bytes of a PNG's RGBA pixels, as TartanAir V2 (castacks/tartanairpy) stores depth.

The authors view OpenCV's array as little-endian float32. OpenCV orders the channels B, G, R, A, so B is the lowest
byte and A holds sign and exponent; Pillow orders them R, G, B, A.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import numpy as np

_NAMED = re.compile(r"\d+_[lr]cam_[a-z]+_depth\.png")
_RANGE = 1e-3, 1e6
"""Metres that a depth may have where only its bytes tell. Their alpha is 58 to 73, which hardly any picture has."""
_RENAMED = (
    "looks like float32 in the four bytes of its pixels, TartanAir V2's depth, which is only read by its own name "
    "(000000_lcam_front_depth.png)"
)


def numbers(pixels: np.ndarray, name: str) -> np.ndarray | None:
    """The float32 map (H,W) of a picture (H,W,4) uint8, as Pillow reads it, with TartanAir V2's name; else None.

    No depth has its sign bit set. The alpha of a picture of a map has it set, wherever it is opaque.
    """
    if not _is_rgba(pixels) or not _is_named(name) or pixels[..., 3].max() > 127:
        return None
    return _viewed(pixels)


def fault(pixels: np.ndarray, name: str) -> str:
    """Why a picture (H,W,C) without `numbers` is no map: its bytes look like float32 all the same, or no longer do."""
    if _is_rgba(pixels):
        values = _viewed(pixels)
        if ((values > _RANGE[0]) & (values < _RANGE[1])).mean() > 0.9:
            return _RENAMED
    own = ", but not in four bytes the float32 of TartanAir V2's depth, whose name it has" if _is_named(name) else ""
    return f"has {pixels.shape[-1]} channels{own}: a picture, not a map"


def _is_named(name: str) -> bool:
    return _NAMED.fullmatch(PurePosixPath(name).name) is not None


def _is_rgba(pixels: np.ndarray) -> bool:
    return pixels.dtype == np.uint8 and pixels.shape[-1] == 4


def _viewed(rgba: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rgba[..., [2, 1, 0, 3]]).view("<f4")[..., 0].astype(np.float32, copy=False)
