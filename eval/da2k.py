"""DA-2K: which of two points is nearer, on 1.1K photographs of eight kinds of scene (Depth Anything V2, Sec. 6).

Root: the folder with annotations.json, as published: {image path: [{"point1": [row, column], "point2": [row, column],
"closer_point": "point1"}, ...]}. Predictions are stored at the image's size, named as everywhere (`prediction_path`).
No scoring code is published. Here a pair is right where the nearer point is strictly nearer in the prediction, a tie is
wrong, and the accuracy is over all pairs; the mean over scenes stands beside it. Nothing is aligned, since an order
survives every increasing map: of a kind, only whether larger is nearer or farther counts. For that reason this is no
file of eval/benchmarks/, whose truths are maps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from distill.depth import Kind
from eval.benchmarks import prediction_path
from eval.stored import BadPrediction, read_prediction

SCENES = frozenset(
    {"indoor", "outdoor", "non_real", "transparent_reflective", "adverse_style", "aerial", "underwater", "object"}
)


@dataclass(frozen=True, slots=True)
class PointPair:
    """Two pixels (row, column) of an image, of which the first is nearer."""

    near: tuple[int, int]
    far: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ordinal:
    """How often the order was right.

    accuracy: over all pairs. by_scene: over each scene's. scene_mean: the plain mean of these. They are None (and
    empty) where images failed and were not allowed to. images: image -> (right, pairs), None where it failed.
    problems: one line per failed image.
    """

    accuracy: float | None
    scene_mean: float | None
    by_scene: dict[str, float]
    images: dict[str, tuple[int, int] | None]
    problems: tuple[str, ...]


def read_annotations(root: Path | str) -> dict[str, list[PointPair]]:
    """The annotated pairs of every image; `root` is the folder of annotations.json, or that file."""
    path = Path(root) / "annotations.json" if Path(root).is_dir() else Path(root)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the root of DA-2K is the folder that holds annotations.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {image: [_pair(entry) for entry in entries] for image, entries in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not DA-2K's annotations ({type(error).__name__}: {error})") from error


def scene(image: str) -> str:
    """The kind of scene, from the image's path; "" where it names none."""
    return next((part for part in PurePosixPath(image).parts if part in SCENES), "")


def num_right(values: np.ndarray, pairs: list[PointPair], kind: Kind | str) -> int:
    """How many pairs a map (H,W) of a kind puts in the right order; IndexError for a point outside of it."""
    nearer_is_larger = Kind(kind).larger_is == "nearer"
    count = 0
    for pair in pairs:
        for point in (pair.near, pair.far):
            if not (0 <= point[0] < values.shape[0] and 0 <= point[1] < values.shape[1]):
                raise IndexError(f"the point {point} lies outside of the prediction, {values.shape}")
        near, far = values[pair.near], values[pair.far]
        count += bool(near > far if nearer_is_larger else near < far)
    return count


def score_order(
    store: Path | str,
    kind: Kind | str,
    root: Path | str,
    *,
    allow_failed: bool = False,
    report: Callable[..., None] | None = None,
) -> Ordinal:
    """Score the predictions in `store` of the images annotated in `root`.

    The size is checked where the image lies beside the annotations. NaN at a point puts its pair in the wrong order.
    """
    annotations = read_annotations(root)
    folder = Path(root) if Path(root).is_dir() else Path(root).parent
    images: dict[str, tuple[int, int] | None] = {}
    problems = []
    for done, (image, pairs) in enumerate(annotations.items(), 1):
        try:
            values, _ = read_prediction(Path(store) / prediction_path(image), _size(folder / image))
            images[image] = (num_right(values, pairs, kind), len(pairs))
        except (BadPrediction, IndexError, OSError) as error:
            images[image] = None
            problems.append(f"{image}: {error}")
        if report:
            report(done, len(annotations))
    counted = {image: result for image, result in images.items() if result is not None}
    usable = counted if allow_failed or not problems else {}
    by_scene = {
        name: _share([result for image, result in usable.items() if scene(image) == name])
        for name in dict.fromkeys(map(scene, usable))
    }
    return Ordinal(
        accuracy=_share(list(usable.values())) if usable else None,
        scene_mean=sum(by_scene.values()) / len(by_scene) if by_scene else None,
        by_scene=by_scene,
        images=images,
        problems=tuple(problems),
    )


def _share(results: list[tuple[int, int]]) -> float:
    return sum(right for right, _ in results) / max(sum(pairs for _, pairs in results), 1)


def _size(image: Path) -> tuple[int, int] | None:
    """(H,W) of an image, or None where it is not there."""
    if not image.is_file():
        return None
    with Image.open(image) as opened:
        return opened.height, opened.width


def _pair(entry: Mapping[str, Any]) -> PointPair:
    points = {name: (int(entry[name][0]), int(entry[name][1])) for name in ("point1", "point2")}
    nearer = entry["closer_point"]
    if nearer not in points:
        raise ValueError(f"closer_point is {nearer!r}, neither point1 nor point2")
    return PointPair(points[nearer], points["point2" if nearer == "point1" else "point1"])
