"""Stored predictions as a teacher: a folder of .npy maps, or a folder of finished label shards.

It looks maps up by key and computes nothing, so that scoring, comparison and training also work with earlier
predictions of any model.

Keys: for maps the image's path below its root ("a/rgb_0001.png" finds a/rgb_0001.npy, or a/pred_0001.npy as Marigold's
evaluation names it; distill.data.maps has the rule and the formats); for shards the sample's key, with ".shared" or
".local<i>" for one of its maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from distill.core.depth import DepthMap, Kind, cat
from distill.core.home import home_expanded
from distill.core.labels import Labels
from distill.data.maps import find_map, read_map, stored_stems
from distill.data.orientation import of_size
from distill.shards.shards import MANIFEST, LabelDataset
from distill.teachers import Card, WeightsMissingError, check_images, finite, read_config

CARDS: tuple[Card, ...] = (
    Card(
        name="stored",
        weights="path/to/predictions",
        kind=Kind.AFFINE_DISPARITY,
        licence="as of what predicted them",
        code_licence="as of what predicted them",
        commercial=False,
        source="ours",
        note="looks maps up by key; kind as declared",
        seeded=True,
    ),
)
SETTINGS = "settings.json"
REMEMBERED = 16
"""Samples of label shards that stay decoded: their maps are asked for one by one, and each would decode them all."""


class MissingMapError(LookupError):
    """There is no stored map for a key; the message says where it was looked for."""


class Teacher:
    """Looks up the maps of a folder by key."""

    def __init__(self, find: Callable[[str, tuple[int, int]], DepthMap], card: Card) -> None:
        self.find = find
        self.card = card

    @classmethod
    def load(
        cls,
        weights: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kind: str | None = None,
        teacher: str | None = None,
    ) -> Teacher:
        """The maps in folder `weights`; they come back on the images' device, as float32.

        kind: of .npy maps without a settings.json. teacher: whose labels to read, if the shards have several.
        """
        folder = home_expanded(weights)
        if not folder.is_dir():
            raise WeightsMissingError(f"{folder}: no such folder of stored predictions or labels")
        if (folder / MANIFEST).is_file():
            if kind is not None:
                raise ValueError(f"{folder} holds labels, which carry their own kind: leave kind out")
            return _from_shards(folder, teacher)
        if teacher is not None:
            raise ValueError(f"{folder} holds no labels ({MANIFEST}), so it has no teacher {teacher!r}: leave it out")
        return _from_maps(folder, kind)

    @torch.no_grad()
    def predict(self, images: Tensor, *, keys: Sequence[str] | None = None) -> DepthMap:
        """The stored maps of `keys`, one per image; MissingMapError for an unknown key, ValueError for another size."""
        images = check_images(images)
        if keys is None or len(keys) != len(images):
            raise ValueError(f"stored maps are looked up: give keys=, one for each of the {len(images)} images")
        height, width = images.shape[-2:]
        maps = [self.find(key, (height, width)) for key in keys]
        for key, depth in zip(keys, maps, strict=True):
            if depth.values.shape[-2:] != images.shape[-2:]:
                have, want = tuple(depth.values.shape[-2:]), tuple(images.shape[-2:])
                raise ValueError(f"the stored map of {key} is {have}, the image {want}: they must be of one size")
        return cat(maps).to(images.device)


def _from_maps(folder: Path, kind: str | None) -> Teacher:
    settings = folder / SETTINGS
    table = read_config(settings)
    declared = table.get("kind")
    if kind is None and declared is None:
        raise ValueError(f"{folder} does not say what its maps are: give kind ({', '.join(Kind)})")
    if None not in (kind, declared) and kind != declared:
        raise ValueError(f"{settings} says that the maps are {declared}, not {kind}: leave kind out")
    if declared is not None and declared not in list(Kind):
        raise ValueError(f"{settings}: kind = {declared!r} is not one of {', '.join(Kind)}")
    map_kind = Kind(kind or declared or "")

    def find(key: str, size: tuple[int, int]) -> DepthMap:
        path = find_map(folder, [_inside(key)])
        if path is None:
            names = ", ".join(f"{stem}.npy" for stem in stored_stems(key))
            raise MissingMapError(f"no stored map for {key}: looked for {names} (or .npz, .png, ...) in {folder}")
        try:
            array = read_map(path, map_kind.quantity, scale=1.0 if map_kind.unknown == "metric" else None)
        except OSError as error:
            raise ValueError(f"{path} is not a readable map ({error}): predict it again") from error
        array = of_size(array, path, size)
        return finite(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None], map_kind)

    return Teacher(find, replace(CARDS[0], weights=str(folder), kind=map_kind, note=str(table.get("model", ""))))


def _inside(key: str) -> str:
    """Returns the key; raises MissingMapError if it leads out of the folder."""
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise MissingMapError(f"{key!r} is no key of a stored map: it must be a path inside the folder")
    return key


def _from_shards(folder: Path, teacher: str | None) -> Teacher:
    dataset = LabelDataset(folder)
    if teacher is None and len(dataset.teachers) > 1:
        raise ValueError(f"{folder} has labels by {', '.join(dataset.teachers)}: give teacher, one of them")
    name = teacher or dataset.teachers[0]
    dataset = LabelDataset(folder, teachers=[name])
    rows = {key: row for row, key in enumerate(dataset.keys)}

    @lru_cache(maxsize=REMEMBERED)
    def labels_at(row: int) -> Labels:
        return dataset[row].labels[name]

    def find(key: str, _size: tuple[int, int]) -> DepthMap:
        sample, _, part = key.partition(".")
        if sample not in rows:
            raise MissingMapError(f"{folder} has no labels for {sample}")
        labels = labels_at(rows[sample])
        if part in ("", "shared"):
            return labels.shared
        number = part.removeprefix("local")
        count = 0 if labels.local is None else len(labels.local)
        if labels.local is None or not number.isdigit() or int(number) >= count:
            raise MissingMapError(f"{folder} has no map {part!r} of {sample}; it has shared and {count} local ones")
        return labels.local[int(number) : int(number) + 1]

    card_info = dataset.manifest["teachers"][name]
    card = replace(
        CARDS[0],
        weights=str(folder),
        kind=dataset[0].labels[name].shared.kind,
        licence=str(card_info.get("licence", CARDS[0].licence)),
        code_licence=str(card_info.get("code_licence", CARDS[0].code_licence)),
        commercial=card_info.get("commercial") is True,
        revision=str(card_info.get("revision", "unknown")),
        note=f"labels by {name}",
    )
    return Teacher(find, card)
