"""DA-2K's annotations and the rule of a right order (Depth Anything V2, Sec. 6: 1K photographs, eight kinds of scene).

annotations.json, as published: {image path: [{"point1": [row, column], "point2": [row, column], "closer_point":
"point1"}, ...]}. No scoring code is published. Here a pair is correct if the nearer point is strictly nearer in
the prediction: a tie is wrong, and so is NaN. Nothing is aligned, since increasing maps keep the order: of a kind, only
whether larger means nearer or farther matters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from distill.core import signatures
from distill.core.depth import Kind
from distill.core.files import decoded

SCENES = frozenset(
    {"indoor", "outdoor", "non_real", "transparent_reflective", "adverse_style", "aerial", "underwater", "object"}
)


@dataclass(frozen=True, slots=True)
class PointPair:
    """Two pixels (row, column) of an image, of which the first is nearer."""

    near: tuple[int, int]
    far: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Points:
    """The pairs of an image, and its size (H,W) if the image is available."""

    pairs: tuple[PointPair, ...]
    size: tuple[int, int] | None = None


def read_annotations(root: Path | str) -> dict[str, list[PointPair]]:
    """The annotated pairs of every image; `root` is the folder of annotations.json, or that file."""
    path = Path(root) / "annotations.json" if Path(root).is_dir() else Path(root)
    if not path.is_file():
        packed = min((name.name for name in path.parent.glob("*.zip")), default="")
        hint = f": {packed} should be unpacked" if packed else ""
        raise FileNotFoundError(
            f"{path}: no such file; the root of DA-2K is the folder that holds annotations.json{hint}"
        )
    data = path.read_bytes()
    if signatures.is_packed(kind := signatures.sniff(data)):
        raise ValueError(f"{path}: {kind}: unpack it, and give the folder that holds annotations.json")
    try:
        content = json.loads(decoded(data))
        return {image: [_pair(entry) for entry in entries] for image, entries in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not DA-2K's annotations ({type(error).__name__}: {error})") from error


def scene(image: str) -> str:
    """The kind of scene, from the image's path; "" where it names none."""
    return next((part for part in PurePosixPath(image).parts if part in SCENES), "")


def num_right(values: np.ndarray, pairs: Sequence[PointPair], kind: Kind | str) -> int:
    """The number of pairs that a map (H,W) of a kind orders correctly; ValueError for a point outside of it."""
    nearer_is_larger = Kind(kind).larger_is == "nearer"
    count = 0
    for pair in pairs:
        for point in (pair.near, pair.far):
            if not (0 <= point[0] < values.shape[0] and 0 <= point[1] < values.shape[1]):
                raise ValueError(f"the point {point} lies outside of the prediction, {values.shape}")
        near, far = values[pair.near], values[pair.far]
        count += bool(near > far if nearer_is_larger else near < far)
    return count


def _pair(entry: Mapping[str, Any]) -> PointPair:
    points = {name: (int(entry[name][0]), int(entry[name][1])) for name in ("point1", "point2")}
    nearer = entry["closer_point"]
    if nearer not in points:
        raise ValueError(f"closer_point is {nearer!r}, neither point1 nor point2")
    return PointPair(points[nearer], points["point2" if nearer == "point1" else "point1"])
