"""What `distill doctor` says of samples that training would refuse after all are labelled: too few, or no camera."""

from __future__ import annotations

from collections.abc import Iterator

from distill.app.image_survey import Images
from distill.app.inputs import input_shards
from distill.app.recipe import Recipe
from distill.core.findings import Finding
from distill.data.photos import BadImageError

TRIED = 5
"""Images of a source that are read in search of one that can be."""


def about_samples(recipe: Recipe, images: Images) -> Iterator[Finding]:
    """images: what the sources hold, whose number says nothing where they were not counted to the last."""
    train, each = recipe.train, recipe.crops.crops_per_image
    if images.scanned:
        # At least one image is held out (of the idle ones, maybe); more by their names' hashes, which no count knows.
        most = each * (images.learnt - (train.val_fraction > 0 and images.count > 1 and not images.idle))
        if most < train.batch_size:
            learnt = f"{images.learnt} images" + " whose images.weight is above 0" * images.idle
            yield Finding(
                "bad",
                f"train.batch_size = {train.batch_size}, and {learnt} make at most {most} training samples",
                "lower train.batch_size, give more images, or raise crops.crops_per_image",
            )
    if recipe.student.canonical_focal:
        yield from _without_camera(recipe)


def _without_camera(recipe: Recipe) -> Iterator[Finding]:
    shards = input_shards(recipe)
    for number in range(len(recipe.images)):
        entries = next((scan.entries for one in shards if one.source == number and (scan := one.scan()).entries), ())
        for entry in entries[:TRIED]:
            try:
                focal = entry.load().focal
            except BadImageError:
                continue
            if not focal:
                yield Finding(
                    "bad",
                    f"images[{number}]: {entry.origin} has no focal length, which student.canonical_focal needs",
                    "give it one before labelling (the column focal of pairs, a data set's index), or leave it out",
                )
            break
