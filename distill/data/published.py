"""Published data sets (distill.data.datasets) as image sources, and a far limit for ground truth.

Shapes: H height, W width of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from distill.core.depth import DepthMap
from distill.core.home import home_expanded
from distill.core.plugins import find, short_name
from distill.data import photos
from distill.data.datasets import FOLDER, Row, _index
from distill.data.photos import DECODE_ERRORS, BadImageError, Photo, safe_key
from distill.data.sources import Entry, InputShard, Scan, in_shards

METRES = (0.02, 1000.0)
"""Bounds of the median of metric ground truth; outside them the file is in another unit. Ours."""


def dataset(
    name: str,
    root: str | Path,
    *,
    index: str | Path | None = None,
    names: Sequence[str] | None = None,
    per_shard: int = 1000,
) -> list[InputShard]:
    """The images of a published data set with their ground truth, from its index; `names` selects some of them.

    Raises what distill.data.datasets._index.read raises for a missing or damaged index and for unknown names.
    """
    folder = home_expanded(root)
    rows = _index.read(name, folder, home_expanded(index) if index else None, names=names)
    keys = photos.unique_keys([f"{row.name}.x" for row in rows])
    stem = safe_key(short_name(name))
    entries = [
        Entry(key, f"{stem}:{row.name}", partial(_load_row, name, folder, row, key, f"{stem}:{row.name}"))
        for key, row in zip(keys, rows, strict=True)
    ]
    return in_shards(stem, f"{stem} in {folder}", entries, per_shard)


def _load_row(name: str, root: Path, row: Row, key: str, origin: str) -> Photo:
    plugin = find(FOLDER, name)
    photo = photos.load_file(root / row.rgb, key, origin)
    try:
        values, valid = plugin.read(root, row)
    except DECODE_ERRORS as error:
        raise BadImageError(str(error)) from error
    if values.shape != photo.rgb.shape[1:]:
        height, width = photo.rgb.shape[1:]
        raise BadImageError(
            f"{root / row.depth}: {values.shape[1]} x {values.shape[0]}, but the image is {width} x {height}"
        )
    sampled = values[valid][:: max(1, int(valid.sum()) // 4096)]
    if plugin.FACTS.kind.unknown == "metric" and sampled.size and not METRES[0] < np.median(sampled) < METRES[1]:
        raise BadImageError(
            f"{root / row.depth}: its median is {np.median(sampled):.4g} m, impossible for a scene: another unit than "
            f"{plugin.FACTS.title}'s"
        )
    truth = DepthMap(torch.from_numpy(values)[None], torch.from_numpy(valid)[None], plugin.FACTS.kind)
    return Photo(key, photo.rgb, truth, origin, row.focal)


def within(shards: Sequence[InputShard], far: float) -> list[InputShard]:
    """The shards with metric ground truth masked beyond `far` metres; truth of unknown scale is unchanged."""
    return [replace(shard, scan=partial(_scan_within, shard.scan, far)) for shard in shards]


def _scan_within(scan: Callable[[], Scan], far: float) -> Scan:
    scanned = scan()
    entries = tuple(replace(entry, load=partial(_load_within, entry.load, far)) for entry in scanned.entries)
    return replace(scanned, entries=entries)


def _load_within(load: Callable[[], Photo], far: float) -> Photo:
    photo = load()
    if photo.truth is None or photo.truth.kind.unknown != "metric":
        return photo
    values, valid = photo.truth.values, photo.truth.valid
    in_range = values <= far if photo.truth.kind.quantity == "depth" else values >= 1.0 / far
    return replace(photo, truth=DepthMap(values, valid & in_range, photo.truth.kind))
