"""Finds labels of images that have moved: a labels folder's address depends on the images' path, its labels do not.

A part's json identifies the files it was made from, by their names, their sizes and bytes from their middles, so labels
are recognized whatever the path. The images' folder must keep its own name, because the tars are named after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.core.crop_settings import CropSettings
from distill.data.sources import InputShard, identity
from distill.labelling.parts import Part, parts_of
from distill.labelling.run import part_sizes
from distill.labelling.settings import LabelSettings
from distill.shards.shards import MANIFEST, SETTINGS, read_json

PLACES = ("tars", "photos", "pairs", "root", "index", "names")
"""Keys of [[images]] that locate images."""


def is_made_from(
    folder: Path, shards: Sequence[InputShard], crops: CropSettings, labels: LabelSettings, *, first: bool = False
) -> bool:
    """Whether the parts of the labels in `folder` were made from exactly the files of these shards.

    first: checks the first shard only. Raises OSError where a file cannot be read.
    """
    names = set()
    sized = zip(shards, part_sizes(shards, crops, labels), strict=True)
    for shard, size in [*sized][: 1 if first else None]:
        for part in parts_of(shard, size):
            if not _describes(folder / part.sidecar, part):
                return False
            names.add(part.name)
    return first or all(path.name in names for path in folder.glob("*.tar"))


def _describes(path: Path, part: Part) -> bool:
    """Whether a part's json describes this part's files."""
    try:
        description = read_json(path)
    except (FileNotFoundError, ValueError):
        return False
    same = description["images"] == [entry.key for entry in part.entries] and description["of"] == part.of
    return same and bool(description.get("input")) and description["input"] == identity(part.entries)


def find_moved_labels(
    folder: Path,
    settings: Mapping[str, Any],
    shards: Sequence[InputShard],
    crops: CropSettings,
    labels: LabelSettings,
) -> tuple[Path, str] | None:
    """Finished labels beside a `folder` without labels, with these settings and, judged by the first shard, of these
    files; and the stem of their first tar where that differs, else "". settings: manifest.settings_of.
    """
    if (folder / SETTINGS).is_file() or not folder.parent.is_dir():
        return None
    for other in sorted(path.parent for path in folder.parent.glob(f"*/{MANIFEST}")):
        try:
            if read_json(other / SETTINGS) != settings:
                continue
            if is_made_from(other, shards, crops, labels, first=True):
                return other, ""
            first = parts_of(shards[0], part_sizes(shards, crops, labels)[0])[0]
            if path := next((path for path in sorted(other.glob("*-000.json")) if _describes(path, first)), None):
                return other, path.stem.removesuffix("-000")
        except (OSError, ValueError):
            continue  # damaged, or of another version
    return None
