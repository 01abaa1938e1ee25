"""Tone mapping of high dynamic range to 8-bit sRGB: videos of phones (HLG, Dolby Vision over HLG) and HDR10 (PQ).

They use another transfer function and wider primaries: read as sRGB they look pale and flat, unlike in any viewer. So
the codes are converted to linear light relative to diffuse white (203 cd/m2) and to sRGB's primaries, and what is
brighter than 3/4 of diffuse white is compressed into the last quarter of the range.

Sources: ITU-R BT.2100-2, tables 4 and 5 (both curves, HLG's OOTF at 1000 cd/m2); BT.2408, section 2 (203 cd/m2);
BT.2087 and SMPTE EG 432-1 (the matrices). The shoulder is ours: BT.2390's needs the peak luminance of
the mastering display.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

PQ, HLG = 16, 18
"""Code points of the transfer characteristics in ITU-T H.273."""
WIDE = 9
"""Code point of BT.2020's primaries."""
_DIFFUSE_WHITE = 203.0
_KNEE = 0.75
_LUMINANCE = np.array([[0.2627, 0.6780, 0.0593]], np.float32)
P3 = 12
"""Code point of Display P3's primaries."""
_TO_SRGB = {
    WIDE: [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]],
    P3: [[1.224940, -0.224940, 0.0], [-0.042057, 1.042057, 0.0], [-0.019638, -0.078636, 1.098274]],
}


def to_srgb(rgb: np.ndarray, transfer: int, *, primaries: int = WIDE) -> np.ndarray:
    """(H,W,3) uint8 sRGB of (H,W,3) uint16 full-range RGB under `transfer`, PQ or HLG."""
    light = _curve(transfer)[rgb]
    if transfer == HLG:  # scene light: HLG's OOTF makes it display light
        light *= cv2.transform(light, _LUMINANCE)[..., None] ** np.float32(0.2) * np.float32(1000 / _DIFFUSE_WHITE)
    if primaries in _TO_SRGB:
        light = np.maximum(cv2.transform(light, np.array(_TO_SRGB[primaries], np.float32)), 0)
    brightest = light.max(-1, keepdims=True)
    excess = np.maximum(brightest - _KNEE, 0)
    compressed = np.minimum(brightest, _KNEE) + (1 - _KNEE) * (1 - np.exp(-excess / (1 - _KNEE)))
    light *= compressed / np.maximum(brightest, np.float32(1e-6))
    return _srgb_codes()[np.minimum(light * 4095 + 0.5, 4095).astype(np.uint16)]


@lru_cache(maxsize=2)
def _curve(transfer: int) -> np.ndarray:
    """(65536,) float32 light per code: display light relative to diffuse white for PQ; scene light in [0,1] for HLG."""
    signal = np.arange(65536) / 65535
    if transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        light = (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1) * 10000 / _DIFFUSE_WHITE
    return light.astype(np.float32)


@lru_cache(maxsize=1)
def _srgb_codes() -> np.ndarray:
    """(4096,) uint8: sRGB codes of linear light from 0 to 1."""
    light = np.arange(4096) / 4095
    coded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.floor(coded * 255 + 0.5).astype(np.uint8)
