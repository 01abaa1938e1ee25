"""Focal lengths in pixels, and depth as one canonical camera would have it.

Pixels alone do not tell far from near: through a lens of twice the focal length a thing looks the same at twice the
distance. A network that learns canonical depth, depth * canonical / focal, is spared the question; whoever uses it
multiplies by focal / canonical. Source: Depth Anything 3's metric model, with 300 pixels (README: metres = focal *
output / 300). Every focal length is in pixels of the image at the size that the network sees.
"""

from __future__ import annotations


def resized(focal: float, before: tuple[int, int], after: tuple[int, int]) -> float:
    """The focal length, in pixels, of an image of `before` (H,W) that is brought to `after`.

    The mean over both axes, which differ where the aspect is not kept. Ours.
    """
    return focal * (after[0] / before[0] + after[1] / before[1]) / 2


def factor(focal: float, canonical: float) -> float:
    """What canonical depth is times, to be metres; ValueError for a focal length that cannot be."""
    if not 0 < focal < float("inf"):
        raise ValueError(f"a focal length must be finite and above 0 pixels, not {focal}")
    return focal / canonical
