"""One photograph: encoded bytes in, 8-bit RGB out, or a reason why not; and the key that it goes by.

Every way in which a file of the world can be broken ends in one BadImageError whose message is the reason. Keys are
made safe for tar members here, once: letters, digits, `_`, `-`, `+`, `=` and `@`, no dots (webdataset ends a key at the
first dot).

Shapes: H height, W width of the photo as a viewer shows it, EXIF rotation applied.
"""

from __future__ import annotations

import hashlib
import io
import re
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from distill.core.depth import DepthMap

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
_COMPRESSION, _PHOTOMETRIC, _STRIPS, _STRIP_BYTES = 259, 262, 273, 279  # of a TIFF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(ValueError):
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


def safe_key(name: str) -> str:
    """`name` as a key for tar members: other characters become `_`, long names keep their end and a hash."""
    key = re.sub(r"[^A-Za-z0-9_\-+=@]", "_", name).strip("_") or "image"
    if len(key) <= 120:
        return key
    return with_hash(key[-100:].lstrip("_-"), name)


def with_hash(key: str, name: str) -> str:
    """`key` with a hash of the name that it stands for, which may hold lone surrogates (not UTF-8)."""
    return f"{key}-{hashlib.blake2b(name.encode(errors='surrogatepass'), digest_size=5).hexdigest()}"


def unique_keys(names: Sequence[str]) -> list[str]:
    """A safe key per name; names that would share one get a hash of their own, whatever their order."""
    keys = [safe_key(str(PurePosixPath(name).with_suffix(""))) for name in names]
    seen = Counter(keys)
    return [key if seen[key] == 1 else with_hash(key, name) for key, name in zip(keys, names, strict=True)]


def not_a_file(path: Path) -> str:
    """Why a path cannot be read as a file, or ""; to open a named pipe would be to wait for ever."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"{'a link to nothing' if path.is_symlink() else 'cannot be read'}: {error.strerror}"
    if stat.S_ISREG(mode):
        return ""
    return "a folder, not a file" if stat.S_ISDIR(mode) else "not a plain file (a named pipe, a socket or a device)"


def load_file(path: Path, key: str, origin: str) -> Photo:
    """The photo in a file; raises BadImageError."""
    if reason := not_a_file(path):
        raise BadImageError(reason)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadImageError(f"{path.stat().st_size} bytes is more than {MAX_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror}") from error
    return Photo(key, decode(data), None, origin)


def decode(data: bytes) -> Tensor:
    """(3,H,W) uint8 RGB from an encoded image; raises BadImageError with the reason.

    EXIF rotation is applied. 16-bit grey is scaled by 1/257; palette, grey and CMYK become RGB; transparent pixels are
    composited over white, as viewers show them (dropping alpha would bring up whatever colour hides there).
    """
    if not data:
        raise BadImageError("empty file")
    head = data[:512].lstrip()
    if head[:1] in (b"<", b"{"):
        raise BadImageError(f"not an image: it is text, beginning {head[:24].decode('latin-1')!r}")
    # libjpeg takes zeros for flat blocks: an unfinished download would be a good photo with a grey foot.
    zeros = len(data) - len(data.rstrip(b"\0"))
    if data[:2] == b"\xff\xd8" and zeros >= 512 and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise BadImageError(f"truncated: it ends in {zeros} zero bytes, as an unfinished download does")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImageError(
                    f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels: a decompression bomb?"
                )
            if isinstance(image, TiffImageFile) and _misread(image):
                return torch.from_numpy(_by_opencv(image, data)).permute(2, 0, 1)
            image.load()
            rgb = _rgb8(image)
            turn = _TURNS.get(_orientation(image))
            array = np.array(rgb.transpose(turn) if turn is not None else rgb)
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(f"decompression bomb: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise BadImageError("not an image in any known format") from error
    except DECODE_ERRORS as error:
        raise BadImageError(f"cannot be decoded: {str(error) or type(error).__name__}") from error
    return torch.from_numpy(array).permute(2, 0, 1)


def _misread(image: TiffImageFile) -> bool:
    """Whether its pixels are uncompressed YCbCr.

    Pillow before 13 takes its three bytes a pixel for four, and every version halved chroma for whole: noise, where
    other bytes follow in the file, and else "truncated".
    """
    return image.tag_v2.get(_PHOTOMETRIC) == 6 and image.tag_v2.get(_COMPRESSION, 1) == 1


def _by_opencv(image: TiffImageFile, data: bytes) -> np.ndarray:
    """(H,W,3) uint8 RGB of a TIFF, turned as it says."""
    strips = zip(image.tag_v2.get(_STRIPS, ()), image.tag_v2.get(_STRIP_BYTES, ()), strict=False)
    if any(start + count > len(data) for start, count in strips):
        raise BadImageError("truncated: its pixels go on behind its end")
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise BadImageError(f"cannot be decoded: {error.err}") from error
    if bgr is None:
        raise BadImageError("cannot be decoded: its YCbCr pixels are damaged")
    return np.ascontiguousarray(bgr[:, :, ::-1])


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
            raise BadImageError(f"integers from {values.min()} to {values.max()}: not an 8 or 16-bit image")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImageError("floating-point pixels: not a photograph")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or (image.mode == "P" and "transparency" in image.info):
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
