"""Decoded pixels as 8-bit sRGB: modes, bit depths, transparency and embedded profiles, in bands of bounded memory.

A photo's numbers mean colours only under its profile: a phone's Display P3 read as sRGB is off by 3 levels of 255,
ProPhoto by 12. What is embedded and whole is converted (littleCMS, which Pillow carries); a profile that is broken or
of another colour space than the pixels is left aside, as viewers do. A profile that says what sRGB says is measured,
not believed by its name, and costs nothing.

Shapes: H height, W width of the pixels as they are stored.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

BAND = 1 << 22
"""Pixels that are converted at once: what a conversion needs beside the picture does not grow with it."""
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")

Convert = Callable[[Image.Image], Image.Image]


class UnusablePixelsError(ValueError):
    """Pixels that are no photograph; the message is the reason."""


def srgb(image: Image.Image, *, white_is_zero: bool = False, bits: int = 16, icc: bytes | None = None) -> np.ndarray:
    """(H,W,3) uint8 sRGB of a loaded image.

    white_is_zero: of integers deeper than 8 bits, which Pillow gives as they are stored. bits: how many such integers
    fill. icc: the profile, where the image's own could not be read. Raises UnusablePixelsError for floating-point
    pixels, integers beyond 16 bits, and pictures of which nothing shows.
    """
    profile = icc if icc is not None else image.info.get("icc_profile")
    if image.mode == "I;16B":  # of which Pillow knows no extremes
        swapped = Image.fromarray(np.asarray(image).astype(np.uint16))
        swapped.info = image.info
        image = swapped
    if image.mode == "F":
        raise UnusablePixelsError("floating-point pixels: not a photograph; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return _deep_grey(image, white_is_zero, bits, profile)
    transparent = image.mode in _ALPHA or (image.mode == "P" and "transparency" in image.info)
    transparent = transparent or (image.mode in ("L", "RGB", "1") and "transparency" in image.info)
    convert = _converter(image, profile)
    out = np.empty((image.height, image.width, 3), np.uint8)
    if not transparent:
        for top, band in _bands(image):
            out[top : top + band.height] = np.asarray(convert(band))
        return out
    return _composited(image, convert, out)


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, BAND // max(1, image.width))
    if image.height <= rows:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _composited(image: Image.Image, convert: Convert, out: np.ndarray) -> np.ndarray:
    """Over white, as viewers show it. Where nothing is opaque at all, alpha says nothing, and the colours stand."""
    seen, flat, hidden = 0, True, True
    first: np.ndarray | None = None
    for top, band in _bands(image):
        over = band.convert("RGBA")
        colours = np.asarray(convert(over.convert("RGB")))
        alpha = np.asarray(over.getchannel("A")).astype(np.uint16)[..., None]
        shown = (colours * alpha + 255 * (255 - alpha) + 127) // 255
        out[top : top + band.height] = shown
        seen = max(seen, int(alpha.max()))
        first = colours[0, 0].copy() if first is None else first
        flat = flat and bool((colours == first).all())
        hidden = hidden and bool((shown == shown[0, 0]).all() and (out[0, 0] == shown[0, 0]).all())
    if seen and not (hidden and not flat):
        return out
    if flat or seen:
        raise UnusablePixelsError("nothing of it shows: every pixel is transparent")
    for top, band in _bands(image):
        out[top : top + band.height] = np.asarray(convert(band.convert("RGBA").convert("RGB")))
    return out


def _deep_grey(image: Image.Image, white_is_zero: bool, bits: int, profile: bytes | None) -> np.ndarray:
    """Grey of up to 16 bits, scaled to 8: by a table, so that nothing wider than 16 bits is held."""
    top = 2**bits - 1
    low, high = (int(value) for value in image.getextrema()[:2])  # type: ignore[arg-type]
    if low < 0 or high > 65535:
        raise UnusablePixelsError(f"integers from {low} to {high}: not an 8 or 16-bit image")
    top = top if high <= top else 65535
    if bits > 16:  # how much of 32 bits is filled nobody says
        top = 255 if high <= 255 else 65535
    levels = np.clip(np.arange(65536) / top, 0, 1)
    levels = 1 - levels if white_is_zero else levels
    grey = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    grey.info = image.info
    curve = np.asarray(_converter(grey, profile)(grey))[0].astype(np.float64)  # (256,3)
    table = np.stack([np.interp(levels * 255, np.arange(256), curve[:, c]) for c in range(3)], axis=-1)
    table = np.floor(table + 0.5).astype(np.uint8)
    out = np.empty((image.height, image.width, 3), np.uint8)
    for at, band in _bands(image):
        out[at : at + band.height] = table[np.asarray(band).astype(np.uint16)]
    return out


def _converter(image: Image.Image, profile: bytes | None) -> Convert:
    """From the image's own numbers to sRGB."""
    if profile:
        for mode in ("CMYK",) if image.mode == "CMYK" else ("LAB",) if image.mode == "LAB" else ("RGB", "L"):
            if transform := _transform(bytes(profile), mode):
                return lambda band: _through(band, mode, transform)
    elif image.mode == "LAB":
        return lambda band: ImageCms.applyTransform(band, _lab())  # type: ignore[return-value]
    gamma = image.info.get("gamma")
    if not profile and isinstance(gamma, float) and "srgb" not in image.info and 0.1 < gamma < 5:
        if abs(gamma - 1 / 2.2) > 0.02:
            table = _gamma_table(gamma)
            return lambda band: band.convert("RGB").point(table)
    return lambda band: band if band.mode == "RGB" else band.convert("RGB")


def _through(band: Image.Image, mode: str, transform: ImageCms.ImageCmsTransform | None) -> Image.Image:
    plain = band if band.mode == mode else band.convert("RGB").convert(mode)
    if transform is SAME or transform is None:
        return plain.convert("RGB")
    return ImageCms.applyTransform(plain, transform) or plain


SAME = ImageCms.ImageCmsTransform.__new__(ImageCms.ImageCmsTransform)
"""Stands for a profile that changes nothing."""


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way from a profile to sRGB; SAME where it is sRGB's own, None for a broken one or another mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space != {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}[mode]:
            return None
        made = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode not in ("RGB", "L"):
            return made
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        probe = Image.fromarray(cube if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
        changed = ImageCms.applyTransform(probe, made)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return None
    difference = np.abs(np.asarray(changed).astype(int) - np.asarray(probe.convert("RGB")).astype(int))
    return SAME if difference.max() <= 2 else made


@lru_cache(maxsize=1)
def _lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


@lru_cache(maxsize=32)
def _gamma_table(gamma: float) -> list[int]:
    """PNG's gAMA without a profile: the sample is light ** gamma, and sRGB is wanted."""
    light = (np.arange(256) / 255) ** (1 / gamma)
    coded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return [int(v) for v in np.floor(coded * 255 + 0.5)] * 3
