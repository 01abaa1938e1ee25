"""Conversion of decoded pixels to 8-bit sRGB: modes, bit depths, transparency and profiles, in bands to bound memory.

Colours depend on the profile: a phone's Display P3 read as sRGB is off by 3 levels of 255, ProPhoto by 12. Embedded
profiles are applied (by littleCMS, which Pillow includes); a broken profile, or one of another colour space than the
pixels, is ignored, as viewers do. Whether a profile is equivalent to sRGB is measured, not taken from its name; then
no conversion is done.

Shapes: H height, W width of the pixels as they are stored.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

BAND = 1 << 22
"""Pixels per band: the extra memory of a conversion does not grow with the picture."""
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")

Convert = Callable[[Image.Image], Image.Image]


class UnusablePixelsError(ValueError):
    """Pixels that are not a photograph; the message is the reason."""


def srgb(image: Image.Image, *, white_is_zero: bool = False, bits: int = 16, icc: bytes | None = None) -> np.ndarray:
    """(H,W,3) uint8 sRGB of a loaded image.

    white_is_zero: whether integers deeper than 8 bits, which Pillow returns as stored, are inverted. bits: the bit
    depth of such integers. icc: the profile, where the image's own could not be read. Raises UnusablePixelsError for
    floating-point pixels, integers beyond 16 bits, and pictures of which nothing is visible.
    """
    profile = icc if icc is not None else image.info.get("icc_profile")
    if image.mode == "I;16B":  # getextrema does not support it
        swapped = Image.fromarray(np.asarray(image).astype(np.uint16))
        swapped.info = image.info
        image = swapped
    if image.mode == "F":
        raise UnusablePixelsError("floating-point pixels: not a photograph; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return _deep_grey_to_srgb(image, white_is_zero, bits, profile)
    transparent = image.mode in _ALPHA or (image.mode == "P" and "transparency" in image.info)
    transparent = transparent or (image.mode in ("L", "RGB", "1") and "transparency" in image.info)
    convert = _converter(image, profile)
    out = np.empty((image.height, image.width, 3), np.uint8)
    if not transparent:
        for top, band in _bands(image):
            out[top : top + band.height] = np.asarray(convert(band))
        return out
    return _composite_over_white(image, convert, out)


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, BAND // max(1, image.width))
    if image.height <= rows:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _composite_over_white(image: Image.Image, convert: Convert, out: np.ndarray) -> np.ndarray:
    """Composite over white, as viewers do; an alpha of 0 everywhere is ignored, and the colours are kept."""
    max_alpha, is_uniform, shows_nothing = 0, True, True
    first_colour: np.ndarray | None = None
    for top, band in _bands(image):
        rgba = band.convert("RGBA")
        colours = np.asarray(convert(rgba.convert("RGB")))
        alpha = np.asarray(rgba.getchannel("A")).astype(np.uint16)[..., None]
        composited = (colours * alpha + 255 * (255 - alpha) + 127) // 255
        out[top : top + band.height] = composited
        max_alpha = max(max_alpha, int(alpha.max()))
        first_colour = colours[0, 0].copy() if first_colour is None else first_colour
        is_uniform = is_uniform and bool((colours == first_colour).all())
        shows_nothing = shows_nothing and bool(
            (composited == composited[0, 0]).all() and (out[0, 0] == composited[0, 0]).all()
        )
    if max_alpha and not (shows_nothing and not is_uniform):
        return out
    if is_uniform or max_alpha:
        raise UnusablePixelsError("nothing is visible: every pixel is transparent")
    for top, band in _bands(image):
        out[top : top + band.height] = np.asarray(convert(band.convert("RGBA").convert("RGB")))
    return out


def _deep_grey_to_srgb(image: Image.Image, white_is_zero: bool, bits: int, profile: bytes | None) -> np.ndarray:
    """Scale grey of up to 16 bits to 8, by a table, so that no array is wider than 16 bits."""
    top = 2**bits - 1
    low, high = (int(value) for value in image.getextrema()[:2])  # type: ignore[arg-type]
    if low < 0 or high > 65535:
        raise UnusablePixelsError(f"integers from {low} to {high}: not an 8 or 16-bit image")
    top = top if high <= top else 65535
    if bits > 16:  # the file does not say how many of the 32 bits are used
        top = 255 if high <= 255 else 65535
    levels = np.clip(np.arange(65536) / top, 0, 1)
    levels = 1 - levels if white_is_zero else levels
    grey = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    grey.info = image.info
    curve = np.asarray(_converter(grey, profile)(grey))[0].astype(np.float64)  # (256,3)
    table = np.stack([np.interp(levels * 255, np.arange(256), curve[:, c]) for c in range(3)], axis=-1)
    table = np.floor(table + 0.5).astype(np.uint8)
    out = np.empty((image.height, image.width, 3), np.uint8)
    for row, band in _bands(image):
        out[row : row + band.height] = table[np.asarray(band).astype(np.uint16)]
    return out


def _converter(image: Image.Image, profile: bytes | None) -> Convert:
    """The conversion from the image's colour space to sRGB."""
    if profile:
        for mode in ("CMYK",) if image.mode == "CMYK" else ("LAB",) if image.mode == "LAB" else ("RGB", "L"):
            if transform := _transform(bytes(profile), mode):
                return lambda band: _apply(band, mode, transform)
    elif image.mode == "LAB":
        return lambda band: ImageCms.applyTransform(band, _lab())  # type: ignore[return-value]
    gamma = image.info.get("gamma")
    if not profile and isinstance(gamma, float) and "srgb" not in image.info and 0.1 < gamma < 5:
        if abs(gamma - 1 / 2.2) > 0.02:
            table = _gamma_table(gamma)
            return lambda band: band.convert("RGB").point(table)
    return lambda band: band if band.mode == "RGB" else band.convert("RGB")


def _apply(band: Image.Image, mode: str, transform: ImageCms.ImageCmsTransform | None) -> Image.Image:
    in_mode = band if band.mode == mode else band.convert("RGB").convert(mode)
    if transform is SAME or transform is None:
        return in_mode.convert("RGB")
    return ImageCms.applyTransform(in_mode, transform) or in_mode


SAME = ImageCms.ImageCmsTransform.__new__(ImageCms.ImageCmsTransform)
"""Placeholder transform of a profile that is equivalent to sRGB."""


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB; SAME where it changes nothing, None for a broken one or another mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space != {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode not in ("RGB", "L"):
            return transform
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        probe = Image.fromarray(cube if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
        converted = ImageCms.applyTransform(probe, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return None
    difference = np.abs(np.asarray(converted).astype(int) - np.asarray(probe.convert("RGB")).astype(int))
    return SAME if difference.max() <= 2 else transform


@lru_cache(maxsize=1)
def _lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


@lru_cache(maxsize=32)
def _gamma_table(gamma: float) -> list[int]:
    """The table to sRGB for a PNG with gAMA and no profile: its samples are light ** gamma."""
    light = (np.arange(256) / 255) ** (1 / gamma)
    coded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return [int(v) for v in np.floor(coded * 255 + 0.5)] * 3
