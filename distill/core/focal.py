"""Focal lengths in pixels, and canonical depth: depth as seen by one canonical camera.

Pixels alone do not determine distance: with twice the focal length an object looks the same at twice the distance. A
network that learns canonical depth, depth * canonical / focal, avoids this ambiguity; its output is multiplied by
focal / canonical to get metres. Source: Depth Anything 3's metric model, with 300 pixels (README: metres = focal *
output / 300). Every focal length is in pixels of the image at the size that the network sees.
"""

from __future__ import annotations


def resized(focal: float, before: tuple[int, int], after: tuple[int, int]) -> float:
    """Return the focal length, in pixels, of an image after resizing it from `before` (H,W) to `after`.

    The mean over both axes, which differ if the aspect is not kept. Ours.
    """
    return focal * (after[0] / before[0] + after[1] / before[1]) / 2


def factor(focal: float, canonical: float) -> float:
    """Return the factor from canonical depth to metres; raises ValueError for an impossible focal length."""
    if not 0 < focal < float("inf"):
        raise ValueError(f"a focal length must be finite and above 0 pixels, not {focal}")
    return focal / canonical
