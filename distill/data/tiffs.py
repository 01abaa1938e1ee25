"""TIFF decoding by libtiff: raw values of maps, and photographs that Pillow cannot read, or not at full bit depth.

Shapes: H height, W width of the pixels as they are stored.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from distill.core.wording import first_line
from distill.data import packing
from distill.data.colour import UnusablePixelsError
from distill.data.limits import unpacks_to

_WORDS = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
_PAGES = 16
_MODES = {2: "LA", 3: "RGB", 4: "RGBA"}
_GDAL_METADATA, _NODATA = 42112, 42113
_PHOTOS = (0, 1, 2)
"""Photometric interpretations of plain grey or RGB samples: white is zero, black is zero, RGB."""


def numbers(data: bytes, page: int = 0) -> np.ndarray:
    """The samples of one page as they are stored, any dtype: (H,W), (H,W,C), or (C,H,W) where they are planar.

    Raises RuntimeError or ValueError where libtiff cannot decode them, or they are too many.
    """
    import imagecodecs  # slow: a hundred codecs, each a library

    size = 0
    with contextlib.suppress(ValueError, OSError, LookupError, TypeError, struct.error):  # libtiff describes damage
        tags = _tags(data, page)
        sides = math.prod(first_number(tags, tag, 1) for tag in (256, 257, 277))
        size = max(1, first_number(tags, 258, 1) // 8) * sides
    if reason := unpacks_to(size, len(data)):
        raise ValueError(reason)
    return np.asarray(imagecodecs.tiff_decode(data, index=page))


def page_sizes(image: Image.Image) -> tuple[dict[int, tuple[int, int]], dict[int, tuple[int, int]]]:
    """(width, height) by number of the first pages: of pictures, and of masks of other pages, as GDAL writes them."""
    sizes: dict[int, tuple[int, int]] = {}
    masks: dict[int, tuple[int, int]] = {}
    for number in range(min(_PAGES, getattr(image, "n_frames", 1))):
        image.seek(number)
        is_mask = int(image.tag_v2.get(254, 0)) & 4 and number  # type: ignore[attr-defined]
        (masks if is_mask else sizes)[number] = image.size
    return sizes, masks


def as_declared(values: np.ndarray, data: bytes, page: int = 0, mask: int | None = None) -> np.ndarray:
    """Samples with what their file says of them: NaN for GDAL's no-data value and where the page `mask` is zero, a mark
    (data.packing) for a scale."""
    if mask is not None and values.ndim == 2:  # several channels are refused later
        values = with_gaps(values, numbers(data, mask) == 0)
    try:
        tags = _tags(data, page)
    except (ValueError, OSError, LookupError, TypeError, struct.error):
        return values
    return packing.by_gdal(_without_nodata(values, str(tags.get(_NODATA, "nan"))), str(tags.get(_GDAL_METADATA, "")))


def _without_nodata(values: np.ndarray, text: str) -> np.ndarray:
    """Samples with NaN where they equal the no-data value; integers become floats then."""
    try:
        nodata = float(text.strip(" \0"))
    except ValueError:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        # The tag is text with more digits than a float32 sample: it is rounded to the samples' dtype before comparing.
        empty = values == (values.dtype.type(nodata) if values.dtype.kind == "f" else nodata)
    return with_gaps(values, empty)


def with_gaps(values: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """`packing.with_gaps` in the narrowest floats that hold every digit."""
    return packing.with_gaps(values, empty, floats=np.float32 if values.itemsize < 4 else np.float64)


def by_libtiff(data: bytes) -> Image.Image:
    """The first page of a TIFF: 8 or 16-bit grey or RGB, with or without alpha; ValueError describes any other."""
    tags = _tags(data)
    bits, sample_format = first_number(tags, 258, 1), first_number(tags, 339, 1)
    samples, meaning = first_number(tags, 277, 1), first_number(tags, 262, 1)
    packed = f", compression {first_number(tags, 259, 1)}"
    what = f"a TIFF of {_WORDS.get(sample_format, 'unknown')} {bits}-bit samples, {samples} per pixel{packed}"
    if sample_format != 1 or bits not in (8, 16) or meaning not in _PHOTOS:
        raise UnusablePixelsError(f"{what}: save it with 8 or 16 bits of grey or RGB")
    try:
        pixels = numbers(data)
    except (ValueError, RuntimeError, OSError, IndexError) as error:
        raise UnusablePixelsError(f"{what}: {first_line(error)}") from error
    if pixels.ndim == 3 and first_number(tags, 284, 1) == 2:
        pixels = np.moveaxis(pixels, 0, -1)
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    if pixels.dtype == np.uint16 and pixels.ndim == 3:  # grey is scaled to 8 bits later, with its profile
        pixels = ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if meaning == 0:
        inverted = np.iinfo(pixels.dtype).max - pixels
        pixels = np.stack([inverted[..., 0], pixels[..., 1]], axis=-1) if samples == 2 else inverted  # alpha stays
    if pixels.ndim == 3:
        pixels = pixels[..., :4] if samples == 4 else pixels[..., :3] if samples > 4 else pixels
    image = Image.fromarray(np.ascontiguousarray(pixels), None if pixels.ndim == 2 else _MODES[pixels.shape[-1]])
    if image.mode in ("LA", "RGBA") and first_number(tags, 338, 0) == 0:  # an unspecified last sample is not alpha
        image = image.convert(image.mode.removesuffix("A"))
    if isinstance(profile := tags.get(34675), bytes):
        image.info["icc_profile"] = profile
    image.getexif()[274] = first_number(tags, 274, 1)
    return image


def _tags(data: bytes, page: int = 0) -> ImageFileDirectory_v2:
    """The tags of one page; ValueError, OSError or struct.error where they cannot be read."""
    head = data[: 16 if 43 in data[2:4] else 8]
    if data[:2] == b"MM":  # Pillow looks for BigTIFF's 43 in the third byte, whatever the order of a file's bytes
        head = b"II" + head[3:1:-1] + head[4:]
    tags = ImageFileDirectory_v2(head, prefix=data[:2])
    stream = io.BytesIO(data)
    for _ in range(page + 1):
        stream.seek(tags.next or 0)
        tags.load(stream)
    return tags


def tags_of_map(data: bytes) -> Mapping[int, Any]:
    """The tags of the largest picture's page; those of the first where Pillow does not know the samples.

    Raises ValueError, OSError, LookupError, TypeError or struct.error where they cannot be read.
    """
    page = 0
    with contextlib.suppress(Image.UnidentifiedImageError), Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
        sizes, _ = page_sizes(image)
        page = max(sizes, key=lambda number: sizes[number][0] * sizes[number][1])
    return _tags(data, page)


def first_number(tags: Mapping[int, Any], tag: int, otherwise: int) -> int:
    """The number of a tag, the first of several."""
    value = tags.get(tag, otherwise)
    return int(value[0] if isinstance(value, tuple) else value)
