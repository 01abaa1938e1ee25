"""Damage of image files that decoders do not report: unfinished downloads, wrong checksums, oversized metadata.

Decoders read zeros as flat blocks or black rows: a file whose second half is missing decodes to a photo with a black
bottom. Compressed pictures never end in zeros; in uncompressed ones black at the bottom must start at the beginning of
a row, like a letterbox. All other damage is detected by the decoders.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

ZEROS = 16
"""This many zero bytes at the end of compressed pixels mean damage; arithmetic coders may flush a few."""
_TEXT = 1 << 18  # larger text chunks of a PNG are removed: Pillow refuses the picture at 1 MiB
_PROFILE = 1 << 24
_CHUNKS = 100_000


def trailing_zeros(data: bytes) -> int:
    """The number of zero bytes at the end of the data."""
    end = len(data)
    step = 1 << 16
    while end > 0:
        chunk = data[max(0, end - step) : end]
        stripped = chunk.rstrip(b"\0")
        if stripped:
            return len(data) - (end - len(chunk) + len(stripped))
        end -= len(chunk)
    return len(data)


def unfinished(data: bytes, kind: str) -> str:
    """Why a compressed photo (`kind` of distill.core.signatures.sniff), or a TIFF's tags, are incomplete, or ""."""
    if kind == "TIFF" and _lacks_tags(data):
        return "truncated: its tags, which should lie behind its pixels, are missing: download or copy it again"
    zeros = trailing_zeros(data)
    if zeros < (4 if kind == "PNG" else ZEROS):
        return ""
    is_cut = {
        "JPEG": lambda: data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\xda"),  # equal: both are missing
        "WebP": lambda: _webp_is_cut(data),
        "PNG": lambda: b"IEND" not in data[-zeros - 12 :],
        "GIF": lambda: data[-zeros - 1 : -zeros] != b";",
        "AVIF": lambda: _boxes_are_cut(data, zeros),
        "HEIC": lambda: _boxes_are_cut(data, zeros),
    }.get(kind)
    if is_cut is None or not is_cut():
        return ""
    return f"truncated: it ends in {zeros} zero bytes, like an unfinished download"


def _lacks_tags(data: bytes) -> bool:
    """Whether the first directory of a TIFF lies beyond the end of the file, or in its zeros."""
    order = "<" if data[:2] == b"II" else ">"
    if len(data) < 16:
        return True
    is_big = 43 in data[2:4]
    (at,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)
    return at + 2 > len(data) or not any(data[at : at + 8])


def png_damage(data: bytes) -> str:
    """Why the pixels of a PNG are damaged, by the checksums of its chunks, or "".

    Pillow does not check them, and deflate may store incompressible pixels verbatim: then any bytes decode.
    """
    for number, (at, name, body) in enumerate(png_chunks(data)):
        if number > _CHUNKS and at < 128 * number:
            return f"it has more than {_CHUNKS} tiny chunks, which takes long to read: save it again"
        if name in (b"IHDR", b"PLTE", b"IDAT") and not _checksum_is_right(data, at, name, body):
            return "damaged: a checksum of its pixels is wrong"
        if name == b"IEND":
            return ""
    return "truncated: its end is missing"


def _webp_is_cut(data: bytes) -> bool:
    """Whether a chunk of pixels ends in zeros, or a chunk has no name."""
    at, size = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + 8 <= size:
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"\0\0\0\0":
            return True
        body = data[at + 8 : min(at + 8 + length, len(data))]
        if name in (b"VP8 ", b"VP8L", b"ALPH", b"ANMF") and trailing_zeros(body) >= min(ZEROS, max(1, len(body))):
            return True
        at += 8 + length + length % 2
    return False


def _boxes_are_cut(data: bytes, zeros: int) -> bool:
    """Whether the zeros reach into the box with the pixels (mdat), or are where a box should begin."""
    at, end = 0, len(data) - zeros
    while at + 8 <= len(data):
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        stop = len(data) if size == 0 and name != b"\0\0\0\0" else at + size
        if name == b"mdat":
            return end <= stop - min(ZEROS, size)
        if name == b"\0\0\0\0" or size < 8:
            return True
        at = stop
    return False


def bytes_missing(data: bytes, kind: str) -> int:
    """How many of the bytes declared by its headers a WebP, AVIF or HEIC lacks; 0 for anything else."""
    if kind == "WebP":
        return max(0, 8 + int.from_bytes(data[4:8], "little") - len(data))
    at = 0
    while kind in ("AVIF", "HEIC") and at + 16 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        size = int.from_bytes(data[at + 8 : at + 16], "big") if size == 1 else size
        if size < 8:
            return 0
        at += size
    return max(0, at - len(data))


def stops_mid_row(stored: bytes | memoryview, row: int, pixel: int) -> bool:
    """Whether uncompressed pixels end in zeros that begin in the middle of a row. row, pixel: bytes per row and pixel.

    Zeros below black pixels that fill less than a twentieth of the rows pass: night photographs end like that.
    """
    rows = len(stored) // row if row > 0 else 0
    if rows < 1:
        return False
    whole = np.frombuffer(stored, np.uint8, rows * row).reshape(rows, row)
    filled = np.flatnonzero(whole.any(1))
    if not len(filled):
        return False
    last_row = int(filled[-1])
    end = int(np.flatnonzero(whole[last_row])[-1]) + 1
    zeros_in_row = row - end
    if zeros_in_row < max(1, pixel) or zeros_in_row + (rows - 1 - last_row) * row < 4 * ZEROS:
        return False
    below_black = last_row > 0 and float((whole[last_row - 1, end:] == 0).mean()) >= 0.75
    return not below_black or (rows - 1 - last_row) >= rows / 20


def bmp_is_cut(data: bytes) -> bool:
    """`stops_mid_row` of an uncompressed BMP."""
    plain = len(data) >= 54 and data[14] >= 40 and int.from_bytes(data[30:34], "little") in (0, 3)
    if not plain or trailing_zeros(data) < ZEROS:
        return False
    start, width = int.from_bytes(data[10:14], "little"), int.from_bytes(data[18:22], "little", signed=True)
    bits = int.from_bytes(data[28:30], "little")
    row = (abs(width) * bits + 31) // 32 * 4
    return stops_mid_row(memoryview(data)[start:], row, bits // 8 + row - abs(width) * bits // 8)


def ppm_is_cut(data: bytes, width: int, height: int) -> bool:
    """`stops_mid_row` of a binary PPM or PGM, whose header has no fixed length."""
    bits = {b"P5": 8, b"P6": 24}.get(data[:2])
    if bits is None or trailing_zeros(data) < ZEROS:
        return False
    fields = data[:512].split(None, 4)
    deep = 2 if len(fields) > 3 and fields[3].isdigit() and int(fields[3]) > 255 else 1
    pixel = bits * deep // 8
    size = width * height * pixel
    return len(data) >= size and stops_mid_row(memoryview(data)[len(data) - size :], width * pixel, pixel)


def without_cr(data: bytes) -> bytes:
    """A binary PBM, PGM or PPM without the CR of a CRLF that ends its header; anything else unchanged.

    Exactly one whitespace byte ends the header; a second one would shift all pixels by a byte.
    """
    head = _PNM.match(data, 0, 1024)
    if head is None or (head[1] == b"4") != (head[4] is None):
        return data
    width, height, top = int(head[2]), int(head[3]), int(head[4] or 0)
    row = (width + 7) // 8 if not top else width * (3 if head[1] == b"6" else 1) * (2 if top > 255 else 1)
    return data if len(data) - head.end() != height * row else data[: head.end() - 2] + data[head.end() - 1 :]


_WHITESPACE = rb"(?:\s|#[^\n]*\n)+"
_PNM = re.compile(rb"P([456])" + _WHITESPACE + rb"(\d+)" + _WHITESPACE + rb"(\d+)(?:" + _WHITESPACE + rb"(\d+))?\r\n")


def tiff_goes_on(data: bytes, tags: Mapping[int, Any]) -> bool:
    """Whether compressed strips or tiles of a TIFF extend beyond the end of the file."""
    return tags.get(259, 1) != 1 and any(start + size > len(data) for start, size in _places(tags))


def tiff_is_cut(data: bytes, tags: Mapping[int, Any]) -> bool:
    """Whether the zeros at the end of a TIFF overwrite a page's strips or tiles."""
    zeros, stored = trailing_zeros(data), _places(tags)
    places = [place for place in stored if sum(place) > len(data) - zeros]
    if zeros < ZEROS or not places:
        return False
    if tags.get(259, 1) != 1:
        return any(start + size - (len(data) - zeros) >= min(ZEROS, max(1, size)) for start, size in places)
    tiled = 324 in tags
    width = int(tags.get(322 if tiled else 256, 0))
    samples = int(tags.get(277, 1)) if int(tags.get(284, 1)) == 1 else 1
    bits = samples * int(_numbers(tags.get(258, 1))[0])
    row = (width * bits + 7) // 8
    if tiled:
        order = {place: number for number, place in enumerate(stored)}
        inside = [_of_picture(data, place, order[place], row, bits, tags) for place in places]
        return any(stops_mid_row(tile, length, bits // 8) for tile, length in inside)
    joined = b"".join(data[start : start + size] for start, size in stored)
    return stops_mid_row(joined, row, bits // 8)


def _of_picture(
    data: bytes, place: tuple[int, int], number: int, row: int, bits: int, tags: Mapping[int, Any]
) -> tuple[bytes, int]:
    """The bytes of a tile without its padding, which is zero, and the length of their rows."""
    across, down = int(tags.get(322, 1)), int(tags.get(323, 1))
    width, height = int(tags.get(256, 0)), int(tags.get(257, 0))
    columns = -(-width // across)
    left, top = number % columns * across, number // columns % -(-height // down) * down
    length = (min(across, width - left) * bits + 7) // 8
    stored = data[place[0] : sum(place)]
    rows = [stored[at : at + length] for at in range(0, min(len(stored), row * (height - top)), row)]
    return b"".join(rows), length


def _places(tags: Mapping[int, Any]) -> list[tuple[int, int]]:
    """(first byte, bytes) of a TIFF's strips or tiles."""
    offsets, sizes = (_numbers(tags.get(a, tags.get(b, ()))) for a, b in ((273, 324), (279, 325)))
    return list(zip(offsets, sizes, strict=False))


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def with_end(data: bytes) -> bytes:
    """Append the end marker to a JPEG that lacks only that; anything else is returned unchanged.

    Cameras that split videos into pictures omit it, and so do some phones; Pillow refuses them. A decoder fills missing
    pixels from whatever bytes follow: where two different endings give the same picture, no pixels are missing. A
    progressive JPEG may lack a whole scan unnoticed: its scans must complete every coefficient to its last bit.
    """
    at = _last_scan(data)
    if at < 0 or data.find(_END, at) >= 0:
        return data
    body = data.removesuffix(b"\xff")
    pictures = []
    for ending in (b"", b"\xa5\x5a" * 64):
        try:
            with Image.open(io.BytesIO(body + ending + _END), formats=("JPEG",)) as image:
                pictures.append(image.tobytes())
        except OSError:
            return data
    return body + _END if pictures[0] == pictures[1] else data


_END = b"\xff\xd9"


def _only_scan(data: bytes) -> int:
    """Offset of the only scan of a JPEG that is not progressive; -1 for any other."""
    at = 2
    components = 0
    while (marker := data[at : at + 2])[:1] == b"\xff" and marker != b"\xff\xda":
        if marker in (b"\xff\xc0", b"\xff\xc1"):
            components = data[at + 9] if at + 9 < len(data) else 0
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    one_scan = marker == b"\xff\xda" and components and data[at + 4 : at + 5] == bytes([components])
    return at if one_scan else -1


def _last_scan(data: bytes) -> int:
    """Offset of the last scan of a JPEG; -1 where a scan is missing that its pixels need.

    ITU-T T.81, G.1.1.1: a progressive scan holds the coefficients Ss to Se of its components, to the bit Al.
    """
    if (at := _only_scan(data)) >= 0:
        return at
    at, last, components = 2, -1, 0
    missing: dict[tuple[int, int], int] = {}  # (component, coefficient) -> missing bits
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if marker == 0xC2 and len(body) >= 6:
            components = body[5]
            missing = {(component, k): 1 for component in body[6 : 6 + 3 * components : 3] for k in range(64)}
        if marker == 0xDA:
            count = body[0] if body else 0
            if not components or len(body) < 4 + 2 * count:
                return -1
            last, (first, to, bits) = at, body[1 + 2 * count : 4 + 2 * count]
            missing |= {
                (component, k): bits & 15 for component in body[1 : 1 + 2 * count : 2] for k in range(first, to + 1)
            }
            at += 2 + length
            while (at := data.find(b"\xff", at)) >= 0 and (data[at + 1 : at + 2] or b"\0")[0] in _IN_SCAN:
                at += 2
            if at < 0:
                break
        else:
            at += 2 + length
    return last if components and not any(missing.values()) else -1


def _lacks_scans(data: bytes) -> bool:
    """Whether a progressive JPEG with a single frame and intact headers lacks scans that its pixels need."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] == 0xC2:
            return _last_scan(data) < 0
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


_IN_SCAN = {0, *range(0xD0, 0xD8)}
"""Bytes that may follow 0xFF within a scan: zero (an escaped 0xFF) or a restart marker."""


def ends_early(data: bytes, image: Image.Image) -> bool:
    """Whether a decoded JPEG's end marker comes before its last pixels, as when appended to a truncated download.

    The decoder fills missing pixels with a grey of 128. Where the photo itself is grey there, more bytes before the
    end marker change nothing. A progressive JPEG would only be blurred, so its scans are checked instead.
    """
    if _lacks_scans(data):
        return True
    last = image.crop((image.width - 1, image.height - 1, image.width, image.height))
    if image.mode not in ("L", "RGB") or (np.asarray(last) != 128).any() or (at := _only_scan(data)) < 0:
        return False
    end = data.find(_END, at)
    try:
        with Image.open(io.BytesIO(data[:end] + b"\xa5\x5a" * 64 + data[end:]), formats=("JPEG",)) as longer:
            return end > 0 and longer.tobytes() != image.tobytes()
    except OSError:
        return False


def odd_jpeg(data: bytes) -> str:
    """The unsupported variant of a JPEG (lossless, JPEG-LS, 12 bits, ...), by its frame header, or ""."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, bits, height = data[at + 1], data[at + 4], int.from_bytes(data[at + 5 : at + 7], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7:
            kind = "JPEG-LS" if marker == 0xF7 else "a lossless JPEG" if marker in (0xC3, 0xC7) else "a JPEG"
            variant = f"{kind} of {bits} bits per sample" if bits != 8 or kind != "a JPEG" else ""
            variant = variant or ("a JPEG whose header gives a height of 0" if not height else "")
            return variant and f"{variant}, which is not supported: convert it to PNG or TIFF"
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return ""


def without_oversized_metadata(data: bytes) -> tuple[bytes, bytes | None]:
    """(PNG without the metadata for which Pillow would refuse it, removed ICC profile).

    Removed are oversized text and profiles, and ancillary chunks with a wrong checksum. Anything else, and a PNG
    without such chunks, is returned unchanged.
    """
    removed: list[tuple[int, int]] = []
    profile: bytes | None = None
    text = 0
    for at, name, body in png_chunks(data):
        if name[:1].islower() and not _checksum_is_right(data, at, name, body):
            removed.append((at, at + 12 + len(body)))
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            size = max(len(body), _inflated_size(name, bytes(body)))
            text += size
            if size > _TEXT or text > 16 * _TEXT:
                removed.append((at, at + 12 + len(body)))
        elif name == b"iCCP":
            start = bytes(body).find(b"\0") + 2
            plain = _inflate(body[start:], _PROFILE)
            if len(plain) > _TEXT:
                profile = plain if len(plain) <= _PROFILE else b""
                removed.append((at, at + 12 + len(body)))
    if not removed:
        return data, None
    edges = [0, *(edge for span in removed for edge in span), len(data)]
    return b"".join(data[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)), profile


def png_chunks(data: bytes) -> Iterator[tuple[int, bytes, memoryview]]:
    """Offset, name and body (not a copy) of the chunks of a PNG that are there in full."""
    at = 8
    while at + 12 <= len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        if at + 12 + length > len(data):
            return
        yield at, name, memoryview(data)[at + 8 : at + 8 + length]
        at += 12 + length


def _checksum_is_right(data: bytes, at: int, name: bytes, body: memoryview) -> bool:
    """Whether the checksum behind the chunk at an offset is that of its name and body."""
    end = at + 8 + len(body)
    return zlib.crc32(body, zlib.crc32(name)).to_bytes(4, "big") == data[end : end + 4]


def _inflated_size(name: bytes, body: bytes) -> int:
    """The decompressed size of a text chunk, counted only to just above the limit."""
    key = body.find(b"\0") + 1
    if name == b"zTXt":
        return len(_inflate(body[key + 1 :], _TEXT))
    if name == b"iTXt" and body[key : key + 1] == b"\1":
        fields = body[key + 2 :].split(b"\0", 2)
        return len(_inflate(fields[2], _TEXT)) if len(fields) == 3 else 0
    return 0


def _inflate(packed: bytes | memoryview, limit: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, limit + 1)
    except zlib.error:
        return b""
