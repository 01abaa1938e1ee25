"""One photograph: encoded bytes in, 8-bit RGB out, or a reason why not.

Every way in which a file of the world can be broken ends in one BadImage whose message is the reason.

Shapes: H height, W width of the photo as a viewer shows it, EXIF rotation applied.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.depth import DepthMap

# Parsers that a photo may reach. Pillow knows forty more; among them is one that starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_PIXELS = 89_478_485  # where Pillow itself begins to warn of a decompression bomb
MAX_BYTES = 512 * 2**20
# What Pillow raises on broken files, found by flipping and cutting bytes; it promises no common base class.
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, MemoryError),
    *(AttributeError, NotImplementedError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """One image that cannot be used; the message is the reason written to the quarantine list."""


@dataclass(frozen=True, slots=True)
class Photo:
    """One decoded image.

    key: tar-safe name, unique in its source. rgb: (3,H,W) uint8. truth: (1,H,W) ground truth where there is one.
    origin: where it came from, relative to the source (`sa_000000.tar:sa_1.jpg`), the same on every machine.
    """

    key: str
    rgb: Tensor
    truth: DepthMap | None
    origin: str


def decode(data: bytes) -> Tensor:
    """(3,H,W) uint8 RGB from an encoded image; raises BadImage with the reason.

    EXIF rotation is applied. 16-bit grey is scaled by 1/257; palette, grey and CMYK become RGB; transparent pixels are
    composited over white, as viewers show them (dropping alpha would bring up whatever colour hides there).
    """
    if not data:
        raise BadImage("empty file")
    head = data[:512].lstrip()
    if head[:1] in (b"<", b"{"):
        raise BadImage(f"not an image: it is text, beginning {head[:24].decode('latin-1')!r}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels: a decompression bomb?")
            image.load()
            rgb = _rgb8(image)
            turn = _TURNS.get(_orientation(image))
            array = np.array(rgb.transpose(turn) if turn is not None else rgb)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"decompression bomb: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage("not an image in any known format") from error
    except DECODE_ERRORS as error:
        raise BadImage(f"cannot be decoded: {str(error) or type(error).__name__}") from error
    return torch.from_numpy(array).permute(2, 0, 1)


def _orientation(image: Image.Image) -> int:
    # Broken EXIF is common in good photographs. After load(): Pillow turns TIFFs itself and then drops the tag.
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except DECODE_ERRORS:
        return 1


def _rgb8(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(f"integers from {values.min()} to {values.max()}: not an 8 or 16-bit image")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating-point pixels: not a photograph")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or (image.mode == "P" and "transparency" in image.info):
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
