"""Checks of `distill doctor` for samples that training would refuse once all are labelled: too few, or no camera."""

from __future__ import annotations

import math
from collections.abc import Iterator

from distill.app.image_survey import Images
from distill.app.inputs import input_shards
from distill.app.recipe import Recipe
from distill.core.findings import Finding
from distill.core.wording import counted
from distill.data.photos import BadImageError

TRIED = 5
"""Images of a source that are tried until one can be read."""
FEW = 10
"""Fewer held-out images than this choose the best checkpoint by chance; ours."""


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
    yield from _few_held_out(recipe, images)
    if recipe.student.canonical_focal:
        yield from _without_camera(recipe)


def _few_held_out(recipe: Recipe, images: Images) -> Iterator[Finding]:
    """A finding if only a handful of images will select the checkpoint."""
    fraction, count = recipe.train.val_fraction, images.count
    held_out = max(1, round(fraction * count))  # at least one; how many more, hashes of their names decide
    if not fraction or count < 2 or held_out >= FEW:
        return
    number = "only one image" if held_out == 1 else f"only about {held_out} images"
    wanted = min(0.5, math.ceil(2 * FEW / count * 100) / 100)
    yield Finding(
        "warn",
        f"train.val_fraction = {fraction:g} of {images.most} {counted(count, 'image')}: {number} will be held out, and "
        "the checkpoint with the lowest loss on so few is chosen almost by chance",
        f"set train.val_fraction = {wanted:g} or give more images; val_fraction = 0 keeps the last checkpoint",
    )


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
