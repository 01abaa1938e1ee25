"""Decoding of one photograph to 8-bit sRGB, or the reason why it cannot be used; and its key.

Whatever is wrong with a file, the error is a BadImageError whose message is the reason. Keys are made safe for tar
members here and only here: letters, digits, `_`, `-`, `+`, `=` and `@`, no dots (webdataset ends a key at the first
dot).

Shapes: H height, W width of the photo as a viewer shows it, EXIF rotation applied.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
from distill.data.excess import jpeg_excess
from distill.data.limits import LIMIT as LIMIT
from distill.data.limits import MAX_PIXELS as MAX_PIXELS
from distill.data.limits import max_pixels as max_pixels
from distill.data.orientation import DECODE_ERRORS as DECODE_ERRORS
from distill.data.orientation import TAG, orientation_of, png_may_be_turned, turn

# Broken metadata in good photographs is common, and Pillow would warn of each. The filter is set globally, because a
# filter around each photograph is not thread-safe.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# The parsers that Pillow may use. It has forty more, one of which starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF")
_PILLOW_LIMIT = 89_478_485  # Pillow's own limit for decompression bombs
_PAGES = 16
MAX_BYTES = 512 * 2**20
_COMPRESSION, _PHOTOMETRIC, _STRIPS, _STRIP_BYTES = 259, 262, 273, 279  # of a TIFF


class BadImageError(ValueError):
    """One image that cannot be used; the message is the reason written to the quarantine list."""


@dataclass(frozen=True, slots=True)
class Photo:
    """One decoded image.

    key: tar-safe name, unique in its source. rgb: (3,H,W) uint8. truth: (1,H,W) ground truth where there is one.
    origin: where it came from, relative to the source (`sa_000000.tar:sa_1.jpg`), the same on every machine.
    focal: focal length in pixels of this photo; 0 where the source does not give it.
    """

    key: str
    rgb: Tensor
    truth: DepthMap | None
    origin: str
    focal: float = 0.0


def squashed(photo: Photo) -> Photo:
    """The whole photo resized to a square of its short side; ground truth by nearest neighbour."""
    side, truth = min(photo.rgb.shape[1:]), photo.truth
    if truth is not None:
        values = F.interpolate(truth.values[None], size=(side, side), mode="nearest-exact")[0]
        valid = F.interpolate(truth.valid[None].float(), size=(side, side), mode="nearest-exact")[0] > 0.5
        truth = DepthMap(values, valid, truth.kind)
    return replace(photo, rgb=resize(photo.rgb, side, side), truth=truth)


def safe_key(name: str) -> str:
    """`name` as a key for tar members: unsafe characters become `_`, long names are cut to their end and a hash."""
    key = re.sub(r"[^A-Za-z0-9_\-+=@]", "_", name).strip("_") or "image"
    if len(key) <= 120:
        return key
    return with_hash(key[-100:].lstrip("_-"), name)


def with_hash(key: str, name: str) -> str:
    """`key` with a hash of its name, which may contain lone surrogates (not UTF-8)."""
    return f"{key}-{hashlib.blake2b(name.encode(errors='surrogatepass'), digest_size=5).hexdigest()}"


def unique_names(given: Sequence[tuple[Path, str, Path]]) -> dict[str, Path]:
    """Unique names for files (folder, name in it, file): folder/name, preceded by as many parent folders as needed.

    a/images/1.jpg and b/images/1.jpg are two photographs; a file that two patterns match is one.
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
    """A safe key per name; names that would share a key each get a hash, independent of their order."""
    keys = [safe_key(str(PurePosixPath(name).with_suffix(""))) for name in names]
    seen = Counter(keys)
    return [key if seen[key] == 1 else with_hash(key, name) for key, name in zip(keys, names, strict=True)]


def not_a_file(path: Path) -> str:
    """Why a path cannot be read as a file, or ""; opening a named pipe would block forever."""
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
    """(3,H,W) uint8 sRGB from an encoded image; raises BadImageError with the reason.

    EXIF rotation and an embedded colour profile are applied. Grey of up to 16 bits is scaled to 8; palette, grey and
    CMYK become RGB; transparent pixels are composited over white, as viewers do (dropping alpha would reveal their
    hidden colours). Of a file with several pictures the first whole one is read, not a thumbnail. Memory per pixel: 4
    bytes in the decoder and 3 for the result, doubled where it is rotated.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"an encoded image is bytes, not {type(data).__name__}: of a file, Path(...).read_bytes()")
    with _opened(data) as (image, profile, deep):
        if isinstance(image, TiffImageFile) and _misread(image):
            return torch.from_numpy(_by_opencv(image, data)).permute(2, 0, 1)
        tone_mapped = cicp.decode_hdr(data, str(image.format)) if image.format in ("PNG", "AVIF") else None
        if tone_mapped is not None and tone_mapped.shape[:2] == (image.height, image.width):
            return torch.from_numpy(np.ascontiguousarray(turn(tone_mapped, orientation_of(image)))).permute(2, 0, 1)
        image.load()
        if image.format == "JPEG" and damage.ends_early(data, image):
            raise BadImageError("truncated: its pixels end before its last row or scan: download or copy it again")
        try:
            array = colour.srgb(image, **deep, icc=profile)
        except colour.UnusablePixelsError as error:
            raise BadImageError(str(error)) from error
        turned = turn(array, orientation_of(image))
    return torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1)


def decode_opened(image: Image.Image) -> Tensor:
    """`decode` for an image that Pillow has opened or made: what its object still knows of its file is applied."""
    made_of_bytes = image.mode == "I" and image.format is None  # by convert("I"), perhaps: its range is looked at
    deep = _of_deep_grey(image.tag_v2 if isinstance(image, TiffImageFile) else {}, bits=32 if made_of_bytes else 16)
    try:
        image.load()
        array = colour.srgb(image, **deep)
    except colour.UnusablePixelsError as error:
        raise BadImageError(str(error)) from error
    except DECODE_ERRORS as error:
        raise BadImageError(f"cannot be decoded: {str(error) or type(error).__name__}") from error
    return torch.from_numpy(np.ascontiguousarray(turn(array, orientation_of(image)))).permute(2, 0, 1)


def upright_size(data: bytes) -> tuple[int, int, int]:
    """(H, W, EXIF orientation 1 to 8) of the photo that `decode` returns, from the header where possible."""
    with _opened(data) as (image, _, _):
        if image.format == "TIFF":
            orientation_tag = int(image.tag_v2.get(TAG, 1))  # type: ignore[attr-defined]
            image.load()  # Pillow rotates TIFFs here
            return image.height, image.width, orientation_tag if 1 <= orientation_tag <= 8 else 1
        # Pillow decodes a whole PNG to look for EXIF behind the pixels: skipped where the file cannot contain any.
        orientation = 1 if image.format == "PNG" and not png_may_be_turned(data) else orientation_of(image)
        sides = (image.width, image.height) if orientation >= 5 else (image.height, image.width)
        return *sides, orientation


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[tuple[Image.Image, bytes | None, dict[str, Any]]]:
    """The opened but not decoded picture, a profile that Pillow would not read, and a TIFF's arguments of colour.srgb.

    Whatever Pillow raises inside the context becomes a BadImageError.
    """
    kind = _photo_kind(data)
    data, profile = damage.without_oversized_metadata(data) if kind == "PNG" else (data, None)
    limit = max_pixels()
    if Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS < limit:
        Image.MAX_IMAGE_PIXELS = limit  # else Pillow would warn before our check
    try:
        data = damage.with_end(data) if kind == "JPEG" else damage.without_cr(data)
        with _heic(data) if kind == "HEIC" else _plain(data, kind) as image:
            deep = _seek_first_picture(image, data) if image.format == "TIFF" else {}
            _check_size(image, len(data), limit)
            if (kind == "BMP" and damage.bmp_is_cut(data)) or (
                image.format == "PPM" and damage.ppm_is_cut(data, image.width, image.height)
            ):
                raise BadImageError(_ZERO_FILLED.format(damage.trailing_zeros(data)))
            yield image, profile, deep
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(f"decompression bomb: {error}") from error
    except DECODE_ERRORS as error:
        raise BadImageError(_undecodable(data, kind, error)) from error


def _undecodable(data: bytes, kind: str, error: Exception) -> str:
    """Why a decoder refused a file, described in terms of the file."""
    if missing := damage.bytes_missing(data, kind):
        return f"truncated: {missing} bytes are missing at its end: download or copy it again"
    if isinstance(error, Image.UnidentifiedImageError):
        description = f"it begins as {kind}" if kind in _SUPPORTED else kind or "not an image in any known format"
        description = (damage.odd_jpeg(data) if kind == "JPEG" else "") or description
        return f"cannot be decoded: {description}" if kind else description
    advice = ": download or copy it again" if "truncated" in str(error) else ""
    if kind == "TIFF" and "decoder error" in str(error):
        advice = ": its compressed pixels are damaged, or of an unsupported kind: copy it again, or save it as PNG"
    return f"cannot be decoded: {str(error) or type(error).__name__}{advice}"


_ZERO_FILLED = (
    "truncated: its last {} bytes are zero, as in an unfinished download (if its bottom is truly black, save it as PNG)"
)
_EMBEDDABLE = ("JPEG", "PNG", "WebP", "AVIF", "HEIC")
_SUPPORTED = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WebP", "AVIF", "HEIC")


def _photo_kind(data: bytes) -> str:
    """The file type of the bytes; BadImageError where it is known not to be a photo, or to be incomplete."""
    if not data:
        raise BadImageError("empty file")
    kind = signatures.sniff(data)
    ahead = () if kind else range(1, 32)
    if offset := next((at for at in ahead if signatures.sniff(data[at : at + 64]) in _EMBEDDABLE), 0):
        embedded = f"{signatures.sniff(data[offset:])} begins {offset} bytes in"
        raise BadImageError(
            f"damaged: a {embedded}, after {bytes(data[:offset])!r}, which does not belong to it: download it again"
        )
    if not kind and (words := signatures.text(data)):
        raise BadImageError(f"not an image: it is {words}")
    if kind == "camera raw" or (kind == "TIFF" and data[8:10] == b"CR"):
        raise BadImageError(filetypes.RAW)
    if kind and kind not in _SUPPORTED:
        raise BadImageError(f"not a photo that can be read: it is {kind}{filetypes.advice_for_kind(kind)}")
    check = {"PNG": damage.png_damage, "JPEG": jpeg_excess}.get(kind)
    if reason := damage.unfinished(data, kind) or (check(data) if check else ""):
        raise BadImageError(reason)
    return kind


def _plain(data: bytes, kind: str) -> Image.Image:
    """The image as Pillow opens it; a TIFF that Pillow does not support is decoded by libtiff."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        if kind != "TIFF":
            raise
        return tiffs.by_libtiff(data)
    # Pillow reads planar 16-bit samples as 8-bit.
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    return tiffs.by_libtiff(data) if tags.get(284, 1) == 2 and max(tags.get(258, (8,))) > 8 else image


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
    coding = file.info.get("nclx_profile") or {}
    if coding.get("transfer_characteristics") not in (hdr.PQ, hdr.HLG) or "icc_profile" in image.info:
        return image
    deep = np.asarray(pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False))
    if deep.dtype != np.uint16 or deep.shape[:2] != (image.height, image.width):
        return image
    srgb = hdr.to_srgb(deep[..., :3], coding["transfer_characteristics"], primaries=coding["color_primaries"])
    tone_mapped = Image.fromarray(srgb)
    tone_mapped.info = image.info
    return tone_mapped


def _check_size(image: Image.Image, size: int, limit: int) -> None:
    """Refuse, before decoding, more pixels than the limit, and many pixels from implausibly few bytes."""
    pixels = image.width * image.height
    if pixels > limit:
        raise BadImageError(_too_large(image.width, image.height))
    # A photograph of this size takes megabytes; JPEG and similar formats compress even a uniform one at most 1:200.
    if pixels > _PILLOW_LIMIT and pixels > 400 * size and LIMIT not in os.environ:
        raise BadImageError(
            f"{image.width}x{image.height} pixels in {size} bytes: a decompression bomb? If not, set {LIMIT}={pixels}"
        )


def _too_large(width: int, height: int) -> str:
    pixels = width * height
    return (
        f"{width}x{height} is more than {max_pixels()} pixels: a decompression bomb? If not, set {LIMIT}={pixels} "
        f"({7 * pixels / 1e9:.1f} GB of memory)"
    )


def _seek_first_picture(image: Any, data: bytes) -> dict[str, Any]:
    """Seek to a TIFF's first whole picture and return its arguments for colour.srgb; BadImageError for a camera raw."""
    pages = []
    with contextlib.suppress(EOFError):
        for number in range(_PAGES):
            image.seek(number)
            tags = image.tag_v2
            if 50706 in tags or tags.get(262) in (32803, 34892):  # DNGVersion; colour filter array, linear raw
                raise BadImageError(filetypes.RAW)
            whole = not int(tags.get(254, 0)) & 5 and tags.get(255) != 2  # bit 0: reduced, bit 2: transparency mask
            pages.append((whole, image.width, image.height, 254 in tags))
    chosen = next((i for i, page in enumerate(pages) if page[0]), None)
    if chosen is None:
        raise BadImageError("its only picture is a thumbnail, as in a camera raw: save it as JPEG, PNG or TIFF")
    _, width, height, flagged = pages[chosen]
    for i, (whole, w, h, _) in enumerate(pages):  # skip a thumbnail that is not marked as such
        if whole and not flagged and w * h >= 4 * width * height and abs(w / h * height / width - 1) < 0.03:
            chosen, width, height = i, w, h
    image.seek(chosen)
    tags = image.tag_v2
    if damage.tiff_goes_on(data, tags):
        raise BadImageError("truncated: its pixels continue beyond its end: download or copy it again")
    if damage.tiff_is_cut(data, tags):
        raise BadImageError(_ZERO_FILLED.format(damage.trailing_zeros(data)))
    return _of_deep_grey(tags)


def _of_deep_grey(tags: Mapping[int, Any], bits: int = 16) -> dict[str, Any]:
    """Arguments of colour.srgb by a TIFF's tags. bits: where they say none."""
    bits = tiffs.first_number(tags, 258, bits)
    return {"white_is_zero": tags.get(_PHOTOMETRIC) == 0, "bits": bits if bits > 8 else 16}


def _misread(image: TiffImageFile) -> bool:
    """Whether the pixels are uncompressed YCbCr, which Pillow decodes wrongly.

    Pillow before 13 reads its three bytes a pixel as four, and every version reads subsampled chroma as full: the
    result is noise where other bytes follow in the file, and else a "truncated" error.
    """
    return image.tag_v2.get(_PHOTOMETRIC) == 6 and image.tag_v2.get(_COMPRESSION, 1) == 1


def _by_opencv(image: TiffImageFile, data: bytes) -> np.ndarray:
    """(H,W,3) uint8 RGB of a TIFF, with its orientation applied."""
    strips = zip(image.tag_v2.get(_STRIPS, ()), image.tag_v2.get(_STRIP_BYTES, ()), strict=False)
    if any(start + count > len(data) for start, count in strips):
        raise BadImageError("truncated: its pixels continue beyond its end")
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise BadImageError(f"cannot be decoded: {error.err}") from error
    if bgr is None:
        raise BadImageError("cannot be decoded: its YCbCr pixels are damaged")
    return np.ascontiguousarray(bgr[:, :, ::-1])
