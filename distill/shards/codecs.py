"""Codecs of maps: values to bytes through 16-bit codes, with an error of at most MAX_ERROR of the map's range.

A few bytes may claim, or unpack to, any number of pixels, and a label shard may be a stranger's: readers look at the
size that the bytes claim before memory is taken for it.
"""

from __future__ import annotations

import gzip
import io
import struct
import tokenize
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import imagecodecs
import numpy as np
import torch
from numpy.typing import NDArray

from distill.core.codes import LAST, register
from distill.data.limits import max_pixels
from distill.data.photos import DECODE_ERRORS

MAX_ERROR = 1 / 8192  # of a map's range: guaranteed by every codec
# From tests/speed/codecs.py: a fifth of png16's bytes, and a standard that other programs open. zst is as small and
# several times faster, but a format of ours. High-throughput JPEG 2000 is as small too, but the decoder in imagecodecs
# crashes the process on damaged bytes, which a label shard from elsewhere may hold.
DEFAULT_CODEC = "jls"

# Paeth with moderate deflate is a fifth smaller than the fastest setting, at 14 ms against 6 for 560 x 560.
_PNG = (
    *(cv2.IMWRITE_PNG_COMPRESSION, 3, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT),
    *((cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_PAETH) if hasattr(cv2, "IMWRITE_PNG_FILTER") else ()),
)
# JPEG-LS and zst change a code by at most this. 8 would exceed MAX_ERROR, since rounding to a code adds another half.
_NEAR = 7
_STEP = 2 * _NEAR + 1

Codes = NDArray[np.uint16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """How a map's values become bytes, through 16-bit codes.

    suffix: of the tar member. bound: the largest error, as a fraction of the map's range. units: (65536,) float64, what
    each code means: 0 the map's lowest value, 1 its highest, NaN an invalid pixel. first: the code of the lowest value
    if codes are linear in the value up to 65535, else 0. code: (H,W) float64 units, which it may overwrite, and bool
    usable -> codes. write, read: codes (H,W) -> bytes and back; `read` raises ValueError for unreadable bytes.
    """

    suffix: str
    bound: float
    units: NDArray[np.float64]
    first: int
    code: Callable[[NDArray[np.float64], NDArray[np.bool_]], Codes]
    write: Callable[[Codes], bytes]
    read: Callable[[bytes], NDArray[Any]]


def _linear(first: int, near: int = 0) -> tuple[NDArray[np.float64], Callable[..., Codes], float]:
    """Units, coder and error bound of codes from `first` (lowest value) to 65535 (highest), and 0 for invalid.

    A codec that changes codes by up to `near` never makes a valid pixel invalid or the reverse, because first > 2 near.
    """
    assert first > 2 * near
    steps = 65535 - first
    codes = np.arange(65536, dtype=np.float64)
    units = np.where(codes > near, np.clip((codes - first) / steps, 0.0, 1.0), np.nan)

    def code(unit: NDArray[np.float64], usable: NDArray[np.bool_]) -> Codes:
        unit *= steps
        np.rint(unit, out=unit)
        unit += first
        unit *= usable
        return unit.astype(np.uint16)

    return units, code, (near + 0.5) / steps


def _check_size(height: int, width: int) -> None:
    """Raise ValueError for more pixels than a photograph may have (DISTILL_MAX_PIXELS)."""
    if height * width > max_pixels():
        raise ValueError(f"its header claims {width} x {height} pixels, more than {max_pixels()}")


def _png16() -> Codec:
    units, code, bound = _linear(1)

    def write(codes: Codes) -> bytes:
        success, png = cv2.imencode(".png", codes, _PNG)
        assert success, "OpenCV refused to encode a 16-bit PNG"
        return png.tobytes()

    def read(data: bytes) -> NDArray[Any]:
        if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 33:  # OpenCV would read any other format
            raise ValueError("not a PNG")
        width, height, *depth_and_colour = struct.unpack(">IIBB", data[16:26])
        if depth_and_colour != [16, 0]:
            raise ValueError("not a 16-bit map in png16")
        _check_size(height, width)
        try:
            codes = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error as error:
            raise ValueError(f"not a PNG ({error.err})") from error
        if codes is None:
            raise ValueError("not a PNG")
        return codes

    return Codec(suffix="png", bound=bound, units=units, first=1, code=code, write=write, read=read)


def _jls() -> Codec:
    units, code, bound = _linear(2 * _NEAR + 2, near=_NEAR)

    def write(codes: Codes) -> bytes:
        return bytes(imagecodecs.jpegls_encode(codes, level=_NEAR))

    def read(data: bytes) -> NDArray[Any]:
        _check_size(*_jls_size(data))
        try:
            return np.asarray(imagecodecs.jpegls_decode(data))
        except (imagecodecs.JpeglsError, MemoryError) as error:
            raise ValueError(f"not JPEG-LS ({error})") from error

    return Codec(suffix="jls", bound=bound, units=units, first=2 * _NEAR + 2, code=code, write=write, read=read)


def _jls_size(data: bytes) -> tuple[int, int]:
    """The height, and the width times the channels, of JPEG-LS by its header; (0, 0) where there is none."""
    at, height, width = 2, 0, 0
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xF8 and data[at + 4] == 4:  # sides beyond 16 bits, which the frame header then gives as 0
            count = data[at + 5]
            sides = data[at + 6 : at + 6 + 2 * count]
            height, width = int.from_bytes(sides[:count], "big"), int.from_bytes(sides[count:], "big")
        if marker == 0xF7:
            frame_height, frame_width = struct.unpack(">HH", data[at + 5 : at + 9])
            return frame_height or height, (frame_width or width) * data[at + 9]
        at += 2 + length
    return 0, 0


def _zst_size(data: bytes) -> int:
    """The unpacked bytes of zstandard by the header of its first frame (RFC 8878, 3.1.1.1), -1 where it has none."""
    if len(data) < 6:
        return -1
    descriptor = data[4]
    is_single = descriptor >> 5 & 1
    length = (is_single, 2, 4, 8)[descriptor >> 6]
    at = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    return int.from_bytes(data[at : at + length], "little") + 256 * (length == 2) if length else -1


def _zst() -> Codec:
    """Steps of 15 codes, each predicted from its three neighbours above and to the left, compressed by zstandard.

    The uncompressed bytes, one frame: height and width (two little-endian uint32), then the low byte of every pixel's
    prediction error (steps - left - above + above left, modulo 65536, as int16), then the high part of every pixel:
    (error - int8(low byte)) / 256.
    """
    # The lowest value is one step, so that a step's code is a plain multiple and 0 stays free for invalid pixels.
    units, code, bound = _linear(_STEP, near=_NEAR)

    def write(codes: Codes) -> bytes:
        steps = (np.minimum(codes, LAST - _NEAR) + np.uint16(_NEAR)) // np.uint16(_STEP)
        errors = imagecodecs.delta_encode(imagecodecs.delta_encode(steps, axis=1), axis=0).view(np.int16)
        low, high = (errors & 255).astype(np.uint8), ((errors + 128) >> 8).astype(np.int8)
        plain = b"".join((np.array(codes.shape, "<u4").tobytes(), low.tobytes(), high.tobytes()))
        return bytes(imagecodecs.zstd_encode(plain, level=1))

    def read(data: bytes) -> NDArray[Any]:
        most = 8 + 2 * max_pixels()
        size = _zst_size(data)
        if size > most:
            raise ValueError(f"unpacks to {size} bytes: more than a map of {max_pixels()} pixels")
        try:
            plain = imagecodecs.zstd_decode(data, out=most if size < 0 else size)
        except (imagecodecs.ZstdError, MemoryError) as error:
            raise ValueError(f"not zstandard ({error})") from error
        height, width = np.frombuffer(plain, "<u4", 2).tolist() if len(plain) > 8 else (0, 0)
        if not height * width or len(plain) != 8 + 2 * height * width:
            raise ValueError("not a map in zst")
        low, high = np.frombuffer(plain, np.int8, offset=8).reshape(2, height, width)
        errors = low.astype(np.int16)
        if high.any():
            errors += high.astype(np.int16) << 8
        steps = imagecodecs.delta_decode(imagecodecs.delta_decode(errors, axis=0), axis=1).view(np.uint16)
        return np.asarray(steps * np.uint16(_STEP))

    return Codec(suffix="zst", bound=bound, units=units, first=_STEP, code=code, write=write, read=read)


_NPY_HEADER = 1 << 16
"""The most bytes of an .npy before its numbers."""


def _float16() -> Codec:
    # From -1 to 1, where half precision is twice as fine as from 0 to 1: an error of at most 2**-12 of half the range.
    halves = np.arange(65536).astype(np.uint16).view(np.float16)
    units = (np.where(np.isfinite(halves), halves, np.float16(np.nan)).astype(np.float64) + 1.0) / 2.0

    def code(unit: NDArray[np.float64], usable: NDArray[np.bool_]) -> Codes:
        return np.where(usable, 2.0 * unit - 1.0, np.nan).astype(np.float16).view(np.uint16)

    def write(codes: Codes) -> bytes:
        file = io.BytesIO()
        np.save(file, codes.view(np.float16))
        return gzip.compress(file.getvalue(), compresslevel=6, mtime=0)

    def read(data: bytes) -> NDArray[Any]:
        unpacking, most = zlib.decompressobj(wbits=31), 2 * max_pixels() + _NPY_HEADER
        try:
            plain = unpacking.decompress(data, most + 1)
            if len(plain) > most:
                raise ValueError(f"unpacks to more than a map of {max_pixels()} pixels")
            if not unpacking.eof or not plain.startswith(b"\x93NUMPY"):
                raise ValueError("cut short, or other content")
            return np.load(io.BytesIO(plain), allow_pickle=False).view(np.uint16)
        except (*DECODE_ERRORS, tokenize.TokenError) as error:
            raise ValueError(f"not a compressed npy ({error})") from error

    return Codec(suffix="npy.gz", bound=2.0**-13, units=units, first=0, code=code, write=write, read=read)


CODECS = {"jls": _jls(), "zst": _zst(), "png16": _png16(), "float16": _float16()}
for _name, _codec in CODECS.items():
    register(_name, torch.from_numpy(_codec.units))
