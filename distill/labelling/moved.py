"""Labels of images that lie elsewhere now: a labels folder's address has the images' path in it, its labels have not.

A part's json says which files it was made from, by their names, their sizes and bytes from their middles; so labels are
known again whatever the path. The folder's own name must be the same, for it names the tars.
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
from distill.shards.shards import MANIFEST, SETTINGS, DamagedTableError, read_json

PLACES = ("tars", "photos", "pairs", "root", "index", "names")
"""Keys of [[images]] that say where images lie."""


def made_from(
    folder: Path, shards: Sequence[InputShard], crops: CropSettings, labels: LabelSettings, *, first: bool = False
) -> bool:
    """Whether every part of the labels in `folder` is of the files that these shards hold, and of no others.

    first: by the first shard alone. Raises OSError where a file cannot be read.
    """
    names = set()
    sized = zip(shards, part_sizes(shards, crops, labels), strict=True)
    for shard, size in [*sized][: 1 if first else None]:
        for part in parts_of(shard, size):
            if not _is_of(folder, part):
                return False
            names.add(part.name)
    return first or all(path.name in names for path in folder.glob("*.tar"))


def _is_of(folder: Path, part: Part) -> bool:
    return _says((folder / part.name).with_suffix(".json"), part)


def _says(path: Path, part: Part) -> bool:
    """Whether a part's json is of the files of this part."""
    try:
        told = read_json(path)
    except (FileNotFoundError, DamagedTableError, ValueError):
        return False
    same = told["images"] == [entry.key for entry in part.entries] and told["of"] == part.of
    return same and bool(told.get("input")) and told["input"] == identity(part.entries)


def elsewhere(
    folder: Path,
    settings: Mapping[str, Any],
    shards: Sequence[InputShard],
    crops: CropSettings,
    labels: LabelSettings,
) -> tuple[Path, str] | None:
    """Finished labels beside `folder`, where there are none yet, of these settings and, by their first shard, of these
    files, and how their first tar is named where it is another name. settings: manifest.settings_of.
    """
    if (folder / SETTINGS).is_file() or not folder.parent.is_dir():
        return None
    for other in sorted(path.parent for path in folder.parent.glob(f"*/{MANIFEST}")):
        try:
            if read_json(other / SETTINGS) != settings:
                continue
            if made_from(other, shards, crops, labels, first=True):
                return other, ""
            first = parts_of(shards[0], part_sizes(shards, crops, labels)[0])[0]
            if path := next((path for path in sorted(other.glob("*-000.json")) if _says(path, first)), None):
                return other, path.stem.removesuffix("-000")
        except (OSError, ValueError):
            continue  # damaged, or of another version: nothing to offer
    return None
