"""Colour coding of PNG and AVIF by the code points of ITU-T H.273 (CICP), and decoding of those in HDR.

Pillow ignores the codes: a screenshot in PQ would look pale and flat. In AVIF they are a property (colr of type nclx)
of the primary item; other items, such as the HDR rendition beside a gain map, have codes of their own, which do not
apply to the picture that is read.

Sources: PNG (third edition), 11.3.2.6 (cICP, which takes precedence over every other colour chunk); ISO/IEC 14496-12,
8.11 (pitm, iprp, ipco, ipma) and 12.1.5 (colr); ISO/IEC 23008-12, 6.5.6 (pixi).
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

from distill.data import damage, hdr


def decode_hdr(data: bytes, kind: str) -> np.ndarray | None:
    """(H,W,3) uint8 sRGB, before rotation, of a PNG or AVIF with a PQ or HLG transfer; None for any other.

    kind: "PNG" or "AVIF". Raises RuntimeError or ValueError for pixels that cannot be decoded.
    """
    coding = _png_coding(data) if kind == "PNG" else _avif_coding(data) if kind == "AVIF" else None
    if coding is None or coding[1] not in (hdr.PQ, hdr.HLG):
        return None
    primaries, transfer, bits = coding
    pixels = _png_pixels(data) if kind == "PNG" else _avif_pixels(data, bits)
    pixels = np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels
    pixels = pixels[..., [0, 0, 0, 1]] if pixels.shape[-1] == 2 else pixels
    shown = hdr.to_srgb(pixels[..., :3], transfer, primaries=primaries)
    if pixels.shape[-1] == 4 and pixels[..., 3].min() < 65535:
        alpha = pixels[..., 3:].astype(np.uint32)
        shown = ((shown * alpha + 255 * (65535 - alpha) + 32767) // 65535).astype(np.uint8)
    return shown


def _png_pixels(data: bytes) -> np.ndarray:
    """(H,W) or (H,W,C) uint16 RGB or RGBA."""
    stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None:
        raise ValueError("its high-dynamic-range pixels are damaged")
    stored = stored if stored.dtype == np.uint16 else stored.astype(np.uint16) * 257
    return np.ascontiguousarray(stored[..., [2, 1, 0, 3][: stored.shape[-1]]]) if stored.ndim == 3 else stored


def _avif_pixels(data: bytes, bits: int) -> np.ndarray:
    import imagecodecs

    stored = np.asarray(imagecodecs.avif_decode(data, index=0))
    bits = 8 if stored.dtype == np.uint8 else bits
    return (stored.astype(np.uint32) * 65535 // (2**bits - 1)).clip(0, 65535).astype(np.uint16)


def _png_coding(data: bytes) -> tuple[int, int, int] | None:
    """(primaries, transfer, 16)."""
    for _, name, body in damage.png_chunks(data):
        if name == b"IDAT":
            break
        if name == b"cICP" and len(body) == 4:
            return body[0], body[1], 16
    return None


def _avif_coding(data: bytes) -> tuple[int, int, int] | None:
    """(primaries, transfer, bits) of the primary item; None where they are missing or it has an ICC profile."""
    meta = dict(_boxes(data)).get(b"meta", b"")[4:]
    inside = dict(_boxes(meta))
    item = inside.get(b"pitm", b"")
    number = int.from_bytes(item[4 : 8 if item[:1] == b"\1" else 6], "big")
    properties = dict(_boxes(inside.get(b"iprp", b"")))
    stored = list(_boxes(properties.get(b"ipco", b"")))
    properties_of_item = [
        stored[i - 1] for i in _property_indices(properties.get(b"ipma", b""), number) if 0 < i <= len(stored)
    ]
    colours = [body for name, body in properties_of_item if name == b"colr"]
    codes = next((body for body in colours if body[:4] == b"nclx" and len(body) >= 8), None)
    if codes is None or any(body[:4] in (b"prof", b"rICC") for body in colours):
        return None
    depths = [body[5] for name, body in properties_of_item if name == b"pixi" and len(body) > 5]
    # Without pixi, as for a grid of tiles, the bit depth is in the tiles' codec configuration.
    coded = [body[2] >> 5 & 3 for name, body in stored if name == b"av1C" and len(body) > 2]
    bits = depths[0] if depths else {2: 10, 3: 12}.get(coded[0] if coded else 0, 8)
    return int.from_bytes(codes[4:6], "big"), int.from_bytes(codes[6:8], "big"), bits


def _property_indices(table: bytes, item: int) -> list[int]:
    """1-based indices of an item's properties, from the ipma box."""
    if len(table) < 8:
        return []
    wide, long = table[3] & 1, table[0] >= 1
    at = 8
    for _ in range(int.from_bytes(table[4:8], "big")):
        size = 4 if long else 2
        number, count = int.from_bytes(table[at : at + size], "big"), table[at + size] if at + size < len(table) else 0
        at += size + 1
        places = range(at, at + count * (1 + wide), 1 + wide)
        if number == item:
            return [int.from_bytes(table[p : p + 1 + wide], "big") & (0x7FFF if wide else 0x7F) for p in places]
        at = places.stop
        if at >= len(table):
            break
    return []


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big") or len(data) - at
        start = at + 8
        if size == 1:
            size, start = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        if size < 8:
            return
        yield data[at + 4 : at + 8], data[start : at + size]
        at += size
