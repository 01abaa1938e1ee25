"""TIFFs by libtiff: maps' numbers, and photographs that Pillow has no mode for or reads at less than their depth.

Shapes: H height, W width of the pixels as they are stored.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from distill.data.colour import UnusablePixelsError

_WORDS = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
_MODES = {2: "LA", 3: "RGB", 4: "RGBA"}
_NODATA = 42113
_PHOTOS = (0, 1, 2)
"""Photometric interpretations whose numbers are grey or RGB as they stand: white is zero, black is zero, RGB."""


def numbers(data: bytes, page: int = 0) -> np.ndarray:
    """One picture's samples as they are stored, any dtype: (H,W), (H,W,C), or (C,H,W) of one in planes.

    Raises RuntimeError or ValueError for what libtiff cannot decode.
    """
    import imagecodecs  # a hundred codecs, each a library: only where there is a TIFF

    return np.asarray(imagecodecs.tiff_decode(data, index=page))


def without_nodata(values: np.ndarray, data: bytes, page: int = 0) -> np.ndarray:
    """Samples with NaN where the file says that there is no data (GDAL's tag); integers become floats then."""
    try:
        said = float(str(_tags(data, page).get(_NODATA, "nan")).strip(" \0"))
    except (ValueError, OSError, LookupError, TypeError, struct.error):
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        # Of float32 the text has more digits than the sample: what is compared is what it would be stored as.
        empty = values == (values.dtype.type(said) if values.dtype.kind == "f" else said)
    if not empty.any():
        return values
    wide = values if values.dtype.kind == "f" else values.astype(np.float32 if values.itemsize < 4 else np.float64)
    return np.where(empty, wide.dtype.type(np.nan), wide)


def by_libtiff(data: bytes) -> Image.Image:
    """The first picture of a TIFF, 8 or 16 bits of grey or RGB with or without alpha; ValueError says what it is."""
    tags = _tags(data)
    bits, sort = int(_first(tags, 258, 1)), int(_first(tags, 339, 1))
    samples, meaning = int(_first(tags, 277, 1)), int(_first(tags, 262, 1))
    packed = f", compression {_first(tags, 259, 1)}"
    what = f"a TIFF of {_WORDS.get(sort, 'unknown')} {bits}-bit samples, {samples} a pixel{packed}"
    if sort != 1 or bits not in (8, 16) or meaning not in _PHOTOS:
        raise UnusablePixelsError(f"{what}: save it with 8 or 16 bits of grey or RGB")
    try:
        pixels = numbers(data)
    except (ValueError, RuntimeError, OSError, IndexError) as error:
        raise UnusablePixelsError(f"{what}: {str(error).splitlines()[0] if str(error) else 'damaged'}") from error
    if pixels.ndim == 3 and int(_first(tags, 284, 1)) == 2:
        pixels = np.moveaxis(pixels, 0, -1)
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    if pixels.dtype == np.uint16 and pixels.ndim == 3:  # grey is scaled with its profile later
        pixels = ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if meaning == 0:
        pixels = np.iinfo(pixels.dtype).max - pixels
    if pixels.ndim == 3:
        pixels = pixels[..., :4] if samples == 4 else pixels[..., :3] if samples > 4 else pixels
    image = Image.fromarray(np.ascontiguousarray(pixels), None if pixels.ndim == 2 else _MODES[pixels.shape[-1]])
    if samples == 4 and int(_first(tags, 338, 0)) == 0:  # a fourth sample of no meaning is not alpha
        image = image.convert("RGB") if image.mode == "RGBA" else image
    if isinstance(profile := tags.get(34675), bytes):
        image.info["icc_profile"] = profile
    image.getexif()[274] = int(_first(tags, 274, 1))
    return image


def _tags(data: bytes, page: int = 0) -> ImageFileDirectory_v2:
    """The tags of one picture; ValueError, OSError or struct.error where there are none."""
    head = data[:8] if data[2] != 43 and data[3] != 43 else data[:16]
    tags = ImageFileDirectory_v2(head)
    stream = io.BytesIO(data)
    for _ in range(page + 1):
        stream.seek(tags.next or 0)
        tags.load(stream)
    return tags


def _first(tags: ImageFileDirectory_v2, tag: int, otherwise: int) -> int:
    value = tags.get(tag, otherwise)
    return int(value[0] if isinstance(value, tuple) else value)
