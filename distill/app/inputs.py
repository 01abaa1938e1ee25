"""Opens the [[images]] tables as input shards, each with the number of its table and the teachers of its images."""

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
    names = read_names(images.names) if images.names else None
    if images.pairs:
        return sources.pairs(images.pairs, names=names)
    if images.dataset:
        return published.dataset(images.dataset, images.root, index=images.index or None, names=names)
    if images.scenes:
        return sources.scenes(images.scenes, size=(images.size, images.size), seed=first_scene, variety=images.variety)
    return sources.bundled_photos()


def _limited(shards: list[InputShard], limit: int) -> list[InputShard]:
    """The shards of the first `limit` images."""
    limited, remaining = [], limit
    for shard in shards:
        scan = shard.scan()
        entries = scan.entries[:remaining]
        remaining -= len(entries)
        if entries:
            limited.append(dataclasses.replace(shard, scan=_Fixed(Scan(entries, scan.rejected, scan.skipped))))
    return limited or shards  # without any image, the scans' rejected files say why


@dataclasses.dataclass(frozen=True, slots=True)
class _Fixed:
    scan: Scan

    def __call__(self) -> Scan:
        return self.scan


def input_shards(recipe: Recipe) -> list[InputShard]:
    """The images of every [[images]] table. Raises FileNotFoundError or ValueError naming the table's path."""
    if not recipe.images:
        raise RecipeError(f"the recipe names no images: add an [[images]] table ({', '.join(SOURCES)})")
    tables, first_scene = [], TRAIN_SEEDS.start + recipe.run.seed * 1_000_000
    for number, images in enumerate(recipe.images):
        shards = _source(images, first_scene)
        shards = published.within(shards, images.far) if images.far else shards
        first_scene += images.scenes
        limited = _limited(shards, images.limit) if images.limit else shards
        teachers = _teachers_on(recipe, images)
        tables.append([dataclasses.replace(shard, source=number, teachers=teachers) for shard in limited])
    return sources.combine(*tables)


def _teachers_on(recipe: Recipe, images: ImageSettings) -> tuple[str, ...]:
    """The teachers of a source; () means all. If it cannot have ground truth, all but the teacher "truth"."""
    networks = tuple(spec.alias_or_name for spec in recipe.teachers if spec.name != TRUTH)
    if images.teachers or images.may_have_truth or not networks or len(networks) == len(recipe.teachers):
        return images.teachers
    return networks
