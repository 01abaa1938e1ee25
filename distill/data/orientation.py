"""The orientation tag of pictures and maps: how a viewer turns what is stored.

Shapes: H height, W width.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.data import tiffs

TAG = 0x0112
"""Of EXIF and TIFF."""
_PNG_MARKS = (b"eXIf", b"Raw profile type ", b"XML:com.adobe.xmp")
"""Chunk names and keywords, one of which every PNG with an orientation has, before or behind its pixels."""
_BACK = (1, 1, 2, 3, 4, 5, 8, 7, 6)
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, MemoryError),
    *(AttributeError, NotImplementedError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""Raised by Pillow and others for files that are damaged."""


def orientation_of(image: Image.Image) -> int:
    """The tag of a loaded picture, 1 to 8; 1 without a valid one. Pillow turns TIFFs itself and then drops it."""
    try:  # broken EXIF is common in good photographs
        return _valid(image.getexif().get(TAG, 1))
    except DECODE_ERRORS:
        return 1


def png_may_be_turned(data: bytes) -> bool:
    """Whether a PNG can hold the tag: to look for it behind the pixels, Pillow decodes the whole picture."""
    return any(word in data for word in _PNG_MARKS)


def of_map(data: bytes) -> int:
    """The tag of a map's file, 1 to 8: of a PNG, or of a TIFF's largest page; 1 for every other format."""
    try:
        if data.startswith(b"\x89PNG") and png_may_be_turned(data):
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                return _valid(image.getexif().get(TAG, 1))
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _valid(tiffs.first_number(tiffs.tags_of_map(data), TAG, 1))
    except DECODE_ERRORS:
        pass
    return 1


def upright(values: Any, data: bytes) -> Any:
    """A map (H,W) that was read from `data`, turned as the file's tag says; what a subclass declares is kept."""
    tag = of_map(data)
    return values if tag == 1 else _kept(turn(np.asarray(values), tag), values)


def of_size(values: np.ndarray, path: Path, size: tuple[int, ...]) -> np.ndarray:
    """A map that was read from `path`, without its own tag's quarter turn if only so it is (H,W) = `size`.

    Its tag was copied from a photograph then, to a map that was upright already.
    """
    if values.shape == size or values.shape[::-1] != size or (tag := of_map(path.read_bytes())) < 5:
        return values
    return _kept(turn_back(np.asarray(values), tag), values)


def _kept(turned: np.ndarray, values: Any) -> np.ndarray:
    """The turned numbers of `values`, with what its class declares."""
    marked = np.ascontiguousarray(turned).view(type(values))
    for name, value in getattr(values, "__dict__", {}).items():
        setattr(marked, name, value)
    return marked


def _valid(tag: object) -> int:
    number = int(tag) if isinstance(tag, int | float | str) else 1
    return number if 1 <= number <= 8 else 1


def turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the orientation 1 to 8 to an array (H,W,...) as stored; returns a view."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return array[::down, ::across]


def turn_back(array: np.ndarray, orientation: int) -> np.ndarray:
    """The inverse of `turn`."""
    return turn(array, _BACK[orientation])
