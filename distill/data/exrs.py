"""OpenEXR: the channels of all parts, placed in the display window, and the choice of the depth channel.

Shapes: H height, W width of the display window; the stored pixels may cover only a part of it, or more than it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from distill.data.limits import unpacks_to


def channels(data: bytes) -> dict[str, np.ndarray]:
    """Every channel (H,W) by name, prefixed with its part's name where two parts have a channel of that name.

    Pixels that are not stored are NaN in floats and 0 in integers. Raises ImportError without OpenEXR, ValueError for
    a damaged file.
    """
    import OpenEXR

    with tempfile.NamedTemporaryFile(suffix=".exr") as file:  # OpenEXR only opens paths
        file.write(data)
        file.flush()
        _check_claims(OpenEXR.File(file.name, header_only=True).parts, data)
        parts = OpenEXR.File(file.name, separate_channels=True).parts
    if not parts:
        raise ValueError("not a readable .exr (its pixels are cut short or damaged: download or copy it again)")
    by_name: dict[str, np.ndarray] = {}
    for number, part in enumerate(parts):
        for name, channel in part.channels.items():
            plane = _in_display(channel.pixels, part.header)
            by_name[f"{part.name() or number}/{name}" if name in by_name else name] = plane
    return by_name


def _check_claims(parts: Iterable[Any], data: bytes) -> None:
    """Raise ValueError where the headers claim more pixels than so many bytes may have."""
    size = 0
    for part, lists in zip(parts, re.finditer(rb"channels\0chlist\0", data), strict=False):
        (left, top), (right, bottom) = (np.asarray(corner).astype(int) for corner in part.header["dataWindow"])
        pixels = int(right - left + 1) * int(bottom - top + 1)
        size += pixels * _bytes_per_pixel(data, lists.end() + 4, len(part.header["channels"]))
    if reason := unpacks_to(size, len(data)):
        raise ValueError(reason)


_HALF, _TYPE_TO_NEXT = b"\1\0\0\0", 16


def _bytes_per_pixel(data: bytes, at: int, count: int) -> int:
    """Of the `count` channels of the list that begins at an offset: two of half precision, four of the other types."""
    size = 0
    for _ in range(count):  # a name up to a zero, the type, and twelve bytes
        at = data.index(0, at) + 1
        size += 2 if data[at : at + 4] == _HALF else 4
        at += _TYPE_TO_NEXT
    return size


def one_map(channels: Mapping[str, np.ndarray], names: Iterable[str]) -> np.ndarray:
    """The depth channel; names: what channels and layers of maps are called besides Z, V, Y and D.

    ValueError where there is none, or more than one.
    """
    named = [
        name for name in channels if _last(name) in ("z", "y", "v", "d", *names) and not _of_vector(name, channels)
    ]
    if len(named) > 1:  # Blender's Depth.Z beside Mist.Z
        named = [name for name in named if {_last(name), _last(name.rpartition(".")[0])} & set(names)] or named
    is_grey = len({array.tobytes() for name, array in channels.items() if name in ("R", "G", "B")}) == 1
    if len(channels) == 1 or len(named) == 1:
        return channels[named[0] if len(named) == 1 else next(iter(channels))]
    if is_grey and not named:
        return channels["R"] if "R" in channels else channels["G"]
    listed = f"{', '.join(list(channels)[:12])}{', ...' if len(channels) > 12 else ''}"
    raise ValueError(f"has the channels {listed}: a picture, not a map; a depth map has one channel")


def _last(name: str) -> str:
    """The last part of a channel's name, in lower case: `z` for `ViewLayer.Depth.Z`."""
    return name.rpartition(".")[2].rpartition("/")[2].lower()


def _of_vector(name: str, names: Iterable[str]) -> bool:
    """Whether a channel belongs to normals (X, Y, Z), flow (X, Y) or texture coordinates (U, V)."""
    siblings = {_last(other) for other in names if other.rpartition(".")[0] == name.rpartition(".")[0]}
    return bool(siblings & set(_VECTOR_SIBLINGS.get(_last(name), "")))


_VECTOR_SIBLINGS = {"x": "yz", "y": "xz", "z": "xy", "u": "v", "v": "u"}
"""Sibling channels that make a channel a component of a vector."""


def _in_display(pixels: np.ndarray, header: Mapping[str, Any]) -> np.ndarray:
    data_window, display_window = header.get("dataWindow"), header.get("displayWindow")
    if data_window is None or display_window is None or np.array_equal(data_window, display_window) or pixels.ndim != 2:
        return pixels
    (left, top), (right, bottom) = (np.asarray(corner).astype(int) for corner in data_window)
    (x0, y0), (x1, y1) = (np.asarray(corner).astype(int) for corner in display_window)
    if pixels.shape != (bottom - top + 1, right - left + 1):
        return pixels
    across, down = (max(left, x0), min(right, x1)), (max(top, y0), min(bottom, y1))
    if across[0] > across[1] or down[0] > down[1]:
        raise ValueError("its pixels lie entirely outside its display window")
    if (y1 - y0 + 1) * (x1 - x0 + 1) > 64 * pixels.size:
        raise ValueError(
            f"its pixels cover only {right - left + 1} x {bottom - top + 1} of "
            f"its display window of {x1 - x0 + 1} x {y1 - y0 + 1}"
        )
    whole = np.full((y1 - y0 + 1, x1 - x0 + 1), np.nan if pixels.dtype.kind == "f" else 0, pixels.dtype)
    whole[down[0] - y0 : down[1] - y0 + 1, across[0] - x0 : across[1] - x0 + 1] = pixels[
        down[0] - top : down[1] - top + 1, across[0] - left : across[1] - left + 1
    ]
    return whole
