"""Surveys a recipe's sources before labelling: how many images, how many are trained on, and photos to try."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distill.app.inputs import input_shards
from distill.app.recipe import Recipe
from distill.data.sources import BadImageError, InputShard, Photo, Scan
from distill.labelling.jobs import plan_photo

SCANNED = 3
"""How many input shards are scanned; the others are assumed to be like them."""
TRIED = 20
"""How many photos are tried at most, to find two that can be labelled."""


@dataclass(frozen=True, slots=True)
class Images:
    """What the sources hold: numbers of photos and parts (estimates unless all shards are `scanned`), photos to try.

    learnt: photos of sources that are trained on (images.weight above 0); more than the samples that training sees, as
    some images are held out or quarantined. idle: whether there are other sources. bad: photos that were tried and
    cannot be used; rejected: files that the scan left out. Both with the reason.
    """

    count: int
    learnt: int
    idle: bool
    scanned: bool
    parts: int
    photos: list[Photo]
    bad: list[str]
    rejected: list[str]

    @property
    def most(self) -> str:
        """The word before a number of samples that is computed from these counts."""
        return "at most" if self.scanned else "about"


def survey(recipe: Recipe, *, crops: bool) -> Images:
    """Surveys the sources; crops: a photo to try must be one that crops can be cut from."""
    shards: list[InputShard] = input_shards(recipe)
    per_part = max(1, recipe.labels.samples_per_part // recipe.crops.crops_per_image)
    scans = [shard.scan() for shard in shards[:SCANNED]]
    scale = len(shards) / max(1, len(scans))
    photos: list[Photo] = []
    bad: list[str] = []
    for entry in [entry for scan in scans for entry in scan.entries][:TRIED]:
        try:
            photo = entry.load()
            if crops:
                plan_photo(photo, recipe.crops, seed=recipe.run.seed)
            photos.append(photo)
        except BadImageError as error:
            bad.append(f"{entry.origin}: {error}")
        if len(photos) == 2:
            break
    return Images(
        count=round(scale * sum(len(scan.entries) for scan in scans)),
        learnt=_learnt(recipe, shards, scans),
        idle=any(images.weight == 0 for images in recipe.images),
        scanned=len(scans) == len(shards),
        parts=round(scale * sum(math.ceil(len(scan.entries) / per_part) for scan in scans)),
        photos=photos,
        bad=bad,
        rejected=[f"{line.origin}: {line.reason}" for scan in scans for line in scan.rejected],
    )


def _learnt(recipe: Recipe, shards: Sequence[InputShard], scans: Sequence[Scan]) -> int:
    """Images of sources with a weight above 0; a shard that was not scanned counts as the mean of those that were."""
    scanned_counts = [len(scan.entries) for scan in scans]
    mean = sum(scanned_counts) / max(1, len(scanned_counts))
    counts = [float(count) for count in scanned_counts] + [mean] * (len(shards) - len(scanned_counts))
    pairs = zip(shards, counts, strict=True)
    return round(sum(count for shard, count in pairs if recipe.images[shard.source].weight > 0))
