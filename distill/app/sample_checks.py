"""Checks of `distill doctor` for samples that training would refuse once all are labelled: too few, or no camera."""

from __future__ import annotations

from collections.abc import Iterator

from distill.app.image_survey import Images
from distill.app.inputs import input_shards
from distill.app.recipe import Recipe
from distill.core.findings import Finding
from distill.core.wording import counted
from distill.data.photos import BadImageError

TRIED = 5
"""Images of a source that are tried until one can be read."""


def sample_findings(recipe: Recipe, images: Images) -> Iterator[Finding]:
    """images: what the sources hold; their number is checked only if every source was scanned completely."""
    train, per_image = recipe.train, recipe.crops.crops_per_image
    if images.scanned:
        # At least one image is held out (maybe an idle one); how many more, hashes of their names decide.
        max_samples = per_image * (images.learnt - (train.val_fraction > 0 and images.count > 1 and not images.idle))
        if max_samples < train.batch_size:
            described = counted(images.learnt, "image") + " whose images.weight is above 0" * images.idle
            yield Finding(
                "bad",
                f"train.batch_size = {train.batch_size}, but {described} make at most {max_samples} training samples",
                "lower train.batch_size, give more images, or raise crops.crops_per_image",
            )
    if recipe.student.canonical_focal:
        yield from _without_camera(recipe)


def _without_camera(recipe: Recipe) -> Iterator[Finding]:
    shards = input_shards(recipe)
    for number in range(len(recipe.images)):
        entries = next(
            (scan.entries for shard in shards if shard.source == number and (scan := shard.scan()).entries), ()
        )
        for entry in entries[:TRIED]:
            try:
                focal = entry.load().focal
            except BadImageError:
                continue
            if not focal:
                yield Finding(
                    "bad",
                    f"images[{number}]: {entry.origin} has no focal length, which student.canonical_focal needs",
                    "add it before labelling (column focal of pairs, a data set's index), or leave canonical_focal out",
                )
            break
