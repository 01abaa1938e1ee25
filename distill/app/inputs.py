"""From [[images]] to input shards: a table opens its source; its shards know the table and who teaches on them."""

from __future__ import annotations

import dataclasses

from distill.app.recipe import Recipe
from distill.app.strict import RecipeError
from distill.data import published, sources
from distill.data.pairs import read_names
from distill.data.scenes import TRAIN_SEEDS
from distill.data.settings import SOURCES, ImageSettings
from distill.data.sources import InputShard, Scan
from distill.labelling.jobs import TRUTH


def _source(images: ImageSettings, first_scene: int) -> list[InputShard]:
    if images.tars:
        return sources.tars(images.tars)
    if images.photos:
        return sources.folders(images.photos)
    if images.pairs:
        return sources.pairs(images.pairs, names=read_names(images.names) if images.names else None)
    if images.dataset:
        names = read_names(images.names) if images.names else None
        return published.dataset(images.dataset, images.root, index=images.index or None, names=names)
    if images.scenes:
        return sources.scenes(images.scenes, size=(images.size, images.size), seed=first_scene, variety=images.variety)
    return sources.bundled_photos()


def _limited(shards: list[InputShard], limit: int) -> list[InputShard]:
    """The shards of the first `limit` images."""
    kept, left = [], limit
    for shard in shards:
        scan = shard.scan()
        entries = scan.entries[:left]
        left -= len(entries)
        if entries:
            kept.append(dataclasses.replace(shard, scan=_Fixed(Scan(entries, scan.rejected, scan.passed))))
    return kept or shards  # with no image at all, what was turned away says why


@dataclasses.dataclass(frozen=True, slots=True)
class _Fixed:
    scan: Scan

    def __call__(self) -> Scan:
        return self.scan


def input_shards(recipe: Recipe) -> list[InputShard]:
    """The images of every [[images]] table. Raises FileNotFoundError or ValueError naming the table's path."""
    if not recipe.images:
        raise RecipeError(f"the recipe names no images: add an [[images]] table ({', '.join(SOURCES)})")
    tables, scene = [], TRAIN_SEEDS.start + recipe.run.seed * 1_000_000
    for number, images in enumerate(recipe.images):
        shards = _source(images, scene)
        shards = published.within(shards, images.far) if images.far else shards
        scene += images.scenes
        kept = _limited(shards, images.limit) if images.limit else shards
        teachers = _teachers_on(recipe, images)
        tables.append([dataclasses.replace(shard, source=number, teachers=teachers) for shard in kept])
    return sources.combine(*tables)


def _teachers_on(recipe: Recipe, images: ImageSettings) -> tuple[str, ...]:
    """Who teaches on a source; nobody named is everybody. A source that cannot have ground truth is spared it."""
    others = tuple(spec.alias_or_name for spec in recipe.teachers if spec.name != TRUTH)
    if images.teachers or images.may_have_truth or not others or len(others) == len(recipe.teachers):
        return images.teachers
    return others
