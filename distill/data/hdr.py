"""High dynamic range as 8-bit sRGB: films of phones (HLG, Dolby Vision over HLG) and of studios (HDR10: PQ).

Their numbers are another curve of light, over wider primaries: shown as if they were sRGB they are pale and flat, as no
viewer shows them. So light is computed from them, relative to the white of paper (203 cd/m2), brought to sRGB's
primaries, and what is brighter than paper is compressed into the last quarter of the range.

Sources: ITU-R BT.2100-2, tables 4 and 5 (both curves, HLG's OOTF at 1000 cd/m2); BT.2408, section 2 (203 cd/m2);
BT.2087 and SMPTE EG 432-1 (the matrices). The shoulder is ours: BT.2390's needs to know the screen that a film was
graded on.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

PQ, HLG = 16, 18
"""Transfer characteristics, by their numbers in ITU-T H.273."""
WIDE = 9
"""BT.2020's primaries, likewise."""
_PAPER = 203.0
_KNEE = 0.75
_LUMINANCE = np.array([[0.2627, 0.6780, 0.0593]], np.float32)
P3 = 12
"""Those of Display P3."""
_TO_SRGB = {
    WIDE: [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]],
    P3: [[1.224940, -0.224940, 0.0], [-0.042057, 1.042057, 0.0], [-0.019638, -0.078636, 1.098274]],
}


def to_srgb(rgb: np.ndarray, transfer: int, *, primaries: int = WIDE) -> np.ndarray:
    """(H,W,3) uint8 sRGB of (H,W,3) uint16 full-range RGB under `transfer`, PQ or HLG."""
    light = _curve(transfer)[rgb]
    if transfer == HLG:  # of the scene; a screen shows it with more contrast
        light *= cv2.transform(light, _LUMINANCE)[..., None] ** np.float32(0.2) * np.float32(1000 / _PAPER)
    if primaries in _TO_SRGB:
        light = np.maximum(cv2.transform(light, np.array(_TO_SRGB[primaries], np.float32)), 0)
    brightest = light.max(-1, keepdims=True)
    beyond = np.maximum(brightest - _KNEE, 0)
    shown = np.minimum(brightest, _KNEE) + (1 - _KNEE) * (1 - np.exp(-beyond / (1 - _KNEE)))
    light *= shown / np.maximum(brightest, np.float32(1e-6))
    return _coded()[np.minimum(light * 4095 + 0.5, 4095).astype(np.uint16)]


@lru_cache(maxsize=2)
def _curve(transfer: int) -> np.ndarray:
    """(65536,) float32 light of every number: of PQ on a screen, white paper is 1; of HLG in the scene, to 1."""
    signal = np.arange(65536) / 65535
    if transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        light = (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1) * 10000 / _PAPER
    return light.astype(np.float32)


@lru_cache(maxsize=1)
def _coded() -> np.ndarray:
    """(4096,) uint8: sRGB's code of light from 0 to 1."""
    light = np.arange(4096) / 4095
    coded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.floor(coded * 255 + 0.5).astype(np.uint8)
