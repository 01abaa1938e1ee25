"""One photograph: encoded bytes in, 8-bit sRGB out, or a reason why not; and the key that it goes by.

Every way in which a file of the world can be broken ends in one BadImageError whose message is the reason. Keys are
made safe for tar members here, once: letters, digits, `_`, `-`, `+`, `=` and `@`, no dots (webdataset ends a key at the
first dot).

Shapes: H height, W width of the photo as a viewer shows it, EXIF rotation applied.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torch.nn import functional as F

from distill.core import signatures
from distill.core.crops import resize
from distill.core.depth import DepthMap
from distill.core.printable import printable
from distill.data import cicp, colour, damage, filetypes, hdr, tiffs

# Broken notes in good photographs are common, and Pillow would tell the terminal of each. Once and for all, because a
# filter around each photograph is not safe where several threads read.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# Parsers that a photo may reach. Pillow knows forty more; among them is one that starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF")
MAX_PIXELS = 2**28  # 200-megapixel phones, and stitched panoramas
LIMIT = "DISTILL_MAX_PIXELS"
_SUSPECT = 89_478_485  # where Pillow itself begins to warn of a decompression bomb
_PAGES = 16
MAX_BYTES = 512 * 2**20
# What Pillow raises on broken files, found by flipping and cutting bytes; it promises no common base class.
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, MemoryError),
    *(AttributeError, NotImplementedError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)
_ORIENTATION = 0x0112
_PNG_TURNS = (b"eXIf", b"Raw profile type ", b"XML:com.adobe.xmp")
"""What a PNG that says its orientation has in it, be it in front of the pixels or behind."""
_COMPRESSION, _PHOTOMETRIC, _STRIPS, _STRIP_BYTES = 259, 262, 273, 279  # of a TIFF


class BadImageError(ValueError):
    """One image that cannot be used; the message is the reason written to the quarantine list."""


@dataclass(frozen=True, slots=True)
class Photo:
    """One decoded image.

    key: tar-safe name, unique in its source. rgb: (3,H,W) uint8. truth: (1,H,W) ground truth where there is one.
    origin: where it came from, relative to the source (`sa_000000.tar:sa_1.jpg`), the same on every machine.
    focal: of its camera, in its own pixels; 0 where the source does not say it.
    """

    key: str
    rgb: Tensor
    truth: DepthMap | None
    origin: str
    focal: float = 0.0


def squashed(photo: Photo) -> Photo:
    """The whole photo as a square of its short side; ground truth by the nearest pixel."""
    side, truth = min(photo.rgb.shape[1:]), photo.truth
    if truth is not None:
        values = F.interpolate(truth.values[None], size=(side, side), mode="nearest-exact")[0]
        valid = F.interpolate(truth.valid[None].float(), size=(side, side), mode="nearest-exact")[0] > 0.5
        truth = DepthMap(values, valid, truth.kind)
    return replace(photo, rgb=resize(photo.rgb, side, side), truth=truth)


def safe_key(name: str) -> str:
    """`name` as a key for tar members: other characters become `_`, long names keep their end and a hash."""
    key = re.sub(r"[^A-Za-z0-9_\-+=@]", "_", name).strip("_") or "image"
    if len(key) <= 120:
        return key
    return with_hash(key[-100:].lstrip("_-"), name)


def with_hash(key: str, name: str) -> str:
    """`key` with a hash of the name that it stands for, which may hold lone surrogates (not UTF-8)."""
    return f"{key}-{hashlib.blake2b(name.encode(errors='surrogatepass'), digest_size=5).hexdigest()}"


def named(given: Sequence[tuple[Path, str, Path]]) -> dict[str, Path]:
    """Files (folder, name in it, file) by folder and name, after as many of the folders above as tell them apart.

    a/images/1.jpg and b/images/1.jpg are two photographs; one that two patterns name is one.
    """
    for above in range(max((len(folder.parts) for folder, _, _ in given), default=0) or 1):
        files: dict[str, Path] = {}
        for folder, inside, file in given:
            name = printable("/".join([*folder.parts[-1 - above : -1], folder.name, inside]))
            if files.setdefault(name, file).absolute() != file.absolute():
                break
        else:
            return files
    return {printable(str(file)): file for _, _, file in given}


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


def max_pixels() -> int:
    """The most pixels that a photo may have: MAX_PIXELS, or what the environment's DISTILL_MAX_PIXELS says."""
    text = os.environ.get(LIMIT, "")
    if not text:
        return MAX_PIXELS
    if not text.isdecimal() or not int(text):
        raise ValueError(f"{LIMIT} must be a number of pixels such as {MAX_PIXELS}, not {text!r}")
    return int(text)


def decode(data: bytes) -> Tensor:
    """(3,H,W) uint8 sRGB from an encoded image; raises BadImageError with the reason.

    EXIF rotation and an embedded colour profile are applied. Grey of up to 16 bits is scaled to 8; palette, grey and
    CMYK become RGB; transparent pixels are composited over white, as viewers show them (dropping alpha would bring up
    whatever colour hides there). Of a file with several pictures it is the first whole one, not a thumbnail. Memory: 4
    bytes a pixel of the decoder's and 3 of the result's, twice where it is turned.
    """
    with _opened(data) as (image, profile, deep):
        if isinstance(image, TiffImageFile) and _misread(image):
            return torch.from_numpy(_by_opencv(image, data)).permute(2, 0, 1)
        shown = cicp.bright(data, str(image.format)) if image.format in ("PNG", "AVIF") else None
        if shown is not None and shown.shape[:2] == (image.height, image.width):
            return torch.from_numpy(np.ascontiguousarray(turn(shown, _orientation(image)))).permute(2, 0, 1)
        image.load()
        if image.format == "JPEG" and damage.ends_early(data, image):
            raise BadImageError("truncated: its pixels end before its last row or scan: download or copy it again")
        try:
            array = colour.srgb(image, **deep, icc=profile)
        except colour.UnusablePixelsError as error:
            raise BadImageError(str(error)) from error
        turned = turn(array, _orientation(image))
    return torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1)


def upright(data: bytes) -> tuple[int, int, int]:
    """(H, W, EXIF orientation 1 to 8) of the photo that `decode` gives, from the header where that says it."""
    with _opened(data) as (image, _, _):
        if image.format == "TIFF":
            before = int(image.tag_v2.get(_ORIENTATION, 1))  # type: ignore[attr-defined]
            image.load()  # Pillow turns it then
            return image.height, image.width, before if 1 <= before <= 8 else 1
        # Where the header says nothing, Pillow decodes a PNG to see what stands behind the pixels.
        silent = image.format == "PNG" and not any(word in data for word in _PNG_TURNS)
        orientation = 1 if silent else _orientation(image)
        sides = (image.width, image.height) if orientation >= 5 else (image.height, image.width)
        return *sides, orientation


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[tuple[Image.Image, bytes | None, dict[str, Any]]]:
    """The picture of a file before its pixels are decoded, a profile that Pillow would not read, and how deep it is.

    Whatever Pillow raises inside becomes a BadImageError.
    """
    kind = _kind(data)
    data, profile = damage.without_bulk(data) if kind == "PNG" else (data, None)
    limit = max_pixels()
    if Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS < limit:
        Image.MAX_IMAGE_PIXELS = limit  # its own warning would come on the terminal before our word
    try:
        data = damage.with_end(data) if kind == "JPEG" else damage.without_cr(data)
        with _heic(data) if kind == "HEIC" else _plain(data, kind) as image:
            deep = _page(image, data) if image.format == "TIFF" else {}
            _check_size(image, len(data), limit)
            if (kind == "BMP" and damage.bmp_is_cut(data)) or (
                image.format == "PPM" and damage.ppm_is_cut(data, image.width, image.height)
            ):
                raise BadImageError(_ZEROS.format(damage.trailing_zeros(data)))
            yield image, profile, deep
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(f"decompression bomb: {error}") from error
    except DECODE_ERRORS as error:
        raise BadImageError(_undecodable(data, kind, error)) from error


def _undecodable(data: bytes, kind: str, error: Exception) -> str:
    """Why a decoder refuses a file, in words of the file's."""
    if missing := damage.bytes_missing(data, kind):
        return f"truncated: {missing} bytes are missing at its end: download or copy it again"
    if isinstance(error, Image.UnidentifiedImageError):
        what = f"it begins as {kind}" if kind in _READ else kind or "not an image in any known format"
        what = (damage.odd_jpeg(data) if kind == "JPEG" else "") or what
        return f"cannot be decoded: {what}" if kind else what
    again = ": download or copy it again" if "truncated" in str(error) else ""
    if kind == "TIFF" and "decoder error" in str(error):
        again = ": its compressed pixels are damaged, or of a kind that is not read: copy it again, or save it as PNG"
    return f"cannot be decoded: {str(error) or type(error).__name__}{again}"


_ZEROS = "truncated: its last {} bytes are zero, as in an unfinished download (if its foot is black: save it as PNG)"
_PICTURES = ("JPEG", "PNG", "WebP", "AVIF", "HEIC")
_READ = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WebP", "AVIF", "HEIC")


def _kind(data: bytes) -> str:
    """What the bytes are; BadImageError where that is known to be no photo, or an unfinished one."""
    if not data:
        raise BadImageError("empty file")
    kind = signatures.sniff(data)
    inside = (
        next((at for at in range(1, 32) if signatures.sniff(data[at : at + 64]) in _PICTURES), 0) if not kind else 0
    )
    if inside:
        what = f"{signatures.sniff(data[inside:])} begins {inside} bytes in"
        raise BadImageError(
            f"damaged: a {what}, behind {bytes(data[:inside])!r}, which is none of it: download it again"
        )
    if not kind and (words := signatures.text(data)):
        raise BadImageError(f"not an image: it is {words}")
    if kind == "camera raw" or (kind == "TIFF" and data[8:10] == b"CR"):
        raise BadImageError(filetypes.RAW)
    if kind and kind not in _READ:
        raise BadImageError(f"not a photo that is read here: it is {kind}{filetypes.way_out(kind)}")
    if reason := damage.unfinished(data, kind) or (damage.png_damage(data) if kind == "PNG" else ""):
        raise BadImageError(reason)
    return kind


def _plain(data: bytes, kind: str) -> Image.Image:
    """What Pillow opens; a TIFF that it has no mode for is decoded by libtiff."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        if kind != "TIFF":
            raise
        return tiffs.by_libtiff(data)
    # Pillow reads samples of 16 bits in planes of their own as eight.
    deep = image.format == "TIFF" and int(image.tag_v2.get(284, 1)) == 2 and max(image.tag_v2.get(258, (8,))) > 8  # type: ignore[attr-defined]
    return tiffs.by_libtiff(data) if deep else image


def _heic(data: bytes) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        raise BadImageError(
            'a HEIC photo (an iPhone\'s): pip install "depth-distill[heif]", or convert it to JPEG'
        ) from error
    file = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
    width, height = file.size
    if width * height > max_pixels():
        raise BadImageError(_too_large(width, height))
    image: Image.Image = file.to_pillow()
    said = file.info.get("nclx_profile") or {}
    if said.get("transfer_characteristics") not in (hdr.PQ, hdr.HLG) or "icc_profile" in image.info:
        return image
    deep = np.asarray(pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False))
    if deep.dtype != np.uint16 or deep.shape[:2] != (image.height, image.width):
        return image
    shown = hdr.to_srgb(deep[..., :3], said["transfer_characteristics"], primaries=said["color_primaries"])
    bright = Image.fromarray(shown)
    bright.info = image.info
    return bright


def _check_size(image: Image.Image, size: int, limit: int) -> None:
    """Refuse more pixels than the limit, and so many that come of next to no bytes, before any is decoded."""
    pixels = image.width * image.height
    if pixels > limit:
        raise BadImageError(_too_large(image.width, image.height))
    # A photograph of this size is megabytes; JPEG and its kin cannot pack a plain one tighter than 1:200.
    if pixels > _SUSPECT and pixels > 400 * size and LIMIT not in os.environ:
        raise BadImageError(
            f"{image.width}x{image.height} pixels in {size} bytes: a decompression bomb? {LIMIT}={pixels} reads it"
        )


def _too_large(width: int, height: int) -> str:
    pixels = width * height
    return (
        f"{width}x{height} is more than {max_pixels()} pixels: a decompression bomb? {LIMIT}={pixels} reads it, in "
        f"{7 * pixels / 1e9:.1f} GB of memory"
    )


def _page(image: Any, data: bytes) -> dict[str, Any]:
    """Go to a TIFF's first whole picture, and say what Pillow does not about its numbers; BadImageError for a raw."""
    pages = []
    with contextlib.suppress(EOFError):
        for number in range(_PAGES):
            image.seek(number)
            tags = image.tag_v2
            if 50706 in tags or tags.get(262) in (32803, 34892):  # DNGVersion, colour filter array, linear raw
                raise BadImageError(filetypes.RAW)
            whole = not int(tags.get(254, 0)) & 5 and tags.get(255) != 2  # reduced, or a mask of another
            pages.append((whole, image.width, image.height, 254 in tags))
    chosen = next((i for i, page in enumerate(pages) if page[0]), None)
    if chosen is None:
        raise BadImageError("its only picture is a thumbnail, as in a camera raw: save it as JPEG, PNG or TIFF")
    _, width, height, flagged = pages[chosen]
    for i, (whole, w, h, _) in enumerate(pages):  # thumbnails that do not say so
        if whole and not flagged and w * h >= 4 * width * height and abs(w / h * height / width - 1) < 0.03:
            chosen, width, height = i, w, h
    image.seek(chosen)
    tags = image.tag_v2
    if damage.tiff_goes_on(data, tags):
        raise BadImageError("truncated: its pixels go on behind its end: download or copy it again")
    if damage.tiff_is_cut(data, tags):
        raise BadImageError(_ZEROS.format(damage.trailing_zeros(data)))
    depth = tags.get(258, 16)
    bits = int(depth[0] if isinstance(depth, tuple) else depth)
    return {"white_is_zero": tags.get(262) == 0, "bits": bits if bits > 8 else 16}


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
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    except DECODE_ERRORS:
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """(H,W,...) as it is stored -> as a viewer shows it under EXIF's orientation 1 to 8; a view."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return array[::down, ::across]
