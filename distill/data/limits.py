"""How much a file may unpack to: of a photograph's pixels, of a map's bytes. Few bytes can claim any number of both."""

from __future__ import annotations

import io
import os

from PIL import Image

MAX_PIXELS = 2**28  # 200-megapixel phones, and stitched panoramas
LIMIT = "DISTILL_MAX_PIXELS"
_BYTES = 16
"""Bytes per pixel that all arrays of a map's file may have together: the map, its mask, normals, a colour picture."""
_UNSUSPECTED, _MOST_PACKED = 1 << 29, 200
"""A map's file may unpack to so many bytes, or else to so many times its own; only constants become smaller."""


def max_pixels() -> int:
    """The most pixels that a photo may have: the environment variable DISTILL_MAX_PIXELS, else MAX_PIXELS."""
    text = os.environ.get(LIMIT, "")
    if not text:
        return MAX_PIXELS
    if not text.isdecimal() or not int(text):
        raise ValueError(f"{LIMIT} must be a number of pixels such as {MAX_PIXELS}, not {text!r}")
    return int(text)


def unpacks_to(size: int, packed: int) -> str:
    """Return why `packed` bytes of a map's file must not unpack to `size` bytes, or ""."""
    pixels = -(-size // _BYTES)
    if pixels > max_pixels():
        return f"unpacks to {size} bytes: too large for one map; if it is one, set {LIMIT}={pixels}"
    if size > _UNSUSPECTED and size > _MOST_PACKED * packed and LIMIT not in os.environ:
        return f"{packed} bytes unpack to {size}: a decompression bomb? If not, set {LIMIT}={MAX_PIXELS}"
    return ""


def most_unpacked(packed: int) -> int:
    """The most bytes to which `unpacks_to` lets so many unpack."""
    most = _BYTES * max_pixels()
    return most if LIMIT in os.environ else min(most, max(_UNSUSPECTED, _MOST_PACKED * packed))


def opened(data: bytes, kind: str) -> Image.Image:
    """The opened, not decoded picture of a map; ValueError for more pixels than a photo may have.

    kind: of Pillow's formats. Raises what Pillow raises.
    """
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit is below that of photographs
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels())
    image = Image.open(io.BytesIO(data), formats=(kind,))
    if reason := unpacks_to(_BYTES * image.width * image.height, _BYTES * max_pixels()):
        raise ValueError(reason)
    return image
