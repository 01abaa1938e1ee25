"""The sources of `distill filter`: data sets, tables of pairs, labels folders, and the [[images]] of recipes.

    hypersim=data/hypersim     a data set by its index        data/rgbd/INDEX.tsv     pairs (or their folder)
    runs/x/labels/HASH         labels, of their first teacher  my.toml                 images with truth of a recipe

Shapes: H, W of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distill.app.filtering import Scored, Source
from distill.app.inputs import input_shards
from distill.app.recipe import load as load_recipe
from distill.core.depth import DepthMap
from distill.core.home import home_expanded
from distill.core.plugins import find, is_path, short_name
from distill.data import published, sources
from distill.data.datasets import FOLDER
from distill.data.photos import safe_key
from distill.data.sources import Entry, InputShard
from distill.eval.agreement import alignment_error, to_disparity
from distill.shards.codec import Sample
from distill.shards.shards import MANIFEST, LabelDataset
from distill.shards.tables import labels_address


def open_sources(words: Sequence[str], *, far: float = 0.0, limit: int = 0, teacher: str = "") -> list[Source]:
    """The sources that `words` name, each with a unique name.

    far: metric truth beyond it is invalid; 0: no limit. limit: the first so many samples of each; 0: all. teacher: the
    one whose labels in a labels folder are scored; by default the first. Raises FileNotFoundError, ValueError or
    LookupError.
    """
    opened: list[Source] = []
    for word in words:
        opened += _open(word, far, limit, teacher)
    taken: set[str] = set()
    for number, source in enumerate(opened):
        name, suffix = source.name, 2
        while name in taken:
            name, suffix = f"{source.name}_{suffix}", suffix + 1
        taken.add(name)
        opened[number] = replace(source, name=name)
    return opened


def _open(word: str, far: float, limit: int, teacher: str) -> list[Source]:
    name, equals, root = word.partition("=")
    path = home_expanded(word)
    if equals and (is_path(name) or name.isidentifier()):
        if home_expanded(root).is_file():
            raise ValueError(f"{word}: a data set's root must be a folder; for pairs give only their table: {root}")
        facts = find(FOLDER, name).FACTS
        return [_of_entries(short_name(name), word, published.dataset(name, root), far, limit, facts)]
    if (path / MANIFEST).is_file():
        return [_of_labels(path, limit, teacher)]
    if path.suffix.lower() in (".tsv", ".csv") or (path / "INDEX.tsv").is_file():
        source_name = (path if path.is_dir() else path.parent).name
        return [_of_entries(safe_key(source_name), word, sources.pairs(path), far, limit, None)]
    if path.is_dir():
        raise FileNotFoundError(
            f"{word}: neither a labels folder ({MANIFEST}) nor pairs (INDEX.tsv); for a data set write NAME={word}"
        )
    return _of_recipe(word, far, limit)


def _of_recipe(word: str, far: float, limit: int) -> list[Source]:
    """A recipe's [[images]] that may have ground truth."""
    recipe = load_recipe(word, command="label")
    shards = input_shards(recipe)
    opened = []
    for number, images in enumerate(recipe.images):
        if images.may_have_truth:
            own_shards = [shard for shard in shards if shard.source == number]
            facts = find(FOLDER, images.dataset).FACTS if images.dataset else None
            source_name = short_name(images.dataset) if images.dataset else f"images_{number}"
            source = _of_entries(source_name, f"{word}, images[{number}]", own_shards, far, limit, facts)
            opened.append(source if images.pairs or images.dataset else replace(source, key=""))
    if not opened:
        raise ValueError(f"{word}: none of its [[images]] has ground truth; filter its labels folder instead")
    return opened


def _of_entries(name: str, what: str, shards: Sequence[InputShard], far: float, limit: int, facts: Any) -> Source:
    shards = published.within(shards, far) if far else shards
    entries = [entry for shard in shards for entry in shard.scan().entries][: limit or None]
    names = [entry.origin.partition(":")[2] or entry.origin for entry in entries]
    return Source(name, f"{what}{f', far {far:g}' if far else ''}", names, _Entries(entries), facts)


class _Entries:
    """Loads an image and its truth by number."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries

    def __call__(self, number: int) -> Scored:
        photo = self.entries[number].load()
        if photo.truth is None:
            raise ValueError(f"{photo.origin}: no ground truth")
        image = np.ascontiguousarray(photo.rgb.permute(1, 2, 0).numpy())
        return Scored(image, *_as_depth(photo.truth))


def _as_depth(one: DepthMap) -> tuple[np.ndarray, np.ndarray, bool]:
    """Values and validity (H,W) of a map, converted to depth if possible, and whether it is still disparity."""
    if one.kind.quantity == "disparity" and one.kind.unknown != "affine":
        one = one.convert(f"{one.kind.unknown}_depth")
    return one.values[0].numpy(), one.valid[0].numpy(), one.kind.quantity == "disparity"


def _of_labels(path: Path, limit: int, teacher: str) -> Source:
    dataset = LabelDataset(path)
    scored = teacher or dataset.teachers[0]
    if scored not in dataset.teachers:
        raise LookupError(f"{path} has no labels by {scored}; it has {', '.join(dataset.teachers)}")
    names = dataset.keys[: limit or None]
    load = _LabelSamples(dataset, scored)
    address = labels_address(path)
    place = f"{path}" if address == path.name else f"{path} ({address})"
    return Source(safe_key(f"labels_{path.name}"), f"{place}, {scored}", names, load, key="labels.names")


class _LabelSamples:
    """Loads a region and the label of one teacher by number."""

    def __init__(self, dataset: LabelDataset, teacher: str) -> None:
        self.dataset, self.teacher = dataset, teacher

    def __call__(self, number: int) -> Scored:
        sample = self.dataset[number]
        name = self.teacher if self.teacher in sample.labels else next(iter(sample.labels))
        image = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
        return Scored(image, *_as_depth(sample.labels[name].shared), _of_teachers(sample, name))


def _of_teachers(sample: Sample, name: str) -> dict[str, float]:
    """Scores that labels bring along: disagreement with another teacher, and the residuals of fits."""
    scores: dict[str, float] = {}
    others = [teacher for teacher in sample.labels if teacher != name]
    if others:
        first, second = (to_disparity(sample.labels[teacher].shared) for teacher in (name, others[0]))
        scores["disagreement"] = float(alignment_error(first.values, second.values, first.valid & second.valid)[0])
    for table in sample.record.get("labels", {}).values():
        for fit in ("bridge", "align"):
            if fit in table:
                scores[fit] = max(scores.get(fit, 0.0), float(table[fit]["shared"]["residual"]))
    return scores
