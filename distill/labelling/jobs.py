"""Labelling jobs: regions and patches cut out of photos, with their ground truth, and the teachers to ask.

Shapes: B batch, N patches of a region, S region size, P patch size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from distill.core.crop_settings import CropSettings
from distill.core.crops import ImageTooSmallError, Plan, Square, cut_patches, cut_region, plan
from distill.core.depth import DepthMap, cat
from distill.core.focal import resized
from distill.core.labels import Labels
from distill.data.corruptions import Corruptions
from distill.data.photos import squashed
from distill.data.sources import BadImageError, InputShard, Photo
from distill.labelling.bridge import Bridged
from distill.labelling.settings import DEFAULTS
from distill.teachers import Teacher

TRUTH: Literal["truth"] = "truth"
Teachers: TypeAlias = Sequence[tuple[str, Teacher | Literal["truth"] | Corruptions]]


def plan_photo(photo: Photo, crops: CropSettings, *, seed: int = 0, draw: int = 0) -> Plan:
    """The plan of one photo's draw; raises BadImageError where it is too small."""
    try:
        height, width = photo.rgb.shape[1:]
        return plan(height, width, crops, key=photo.key, seed=seed, draw=draw)
    except ImageTooSmallError as error:
        raise BadImageError(str(error)) from error


@dataclass(frozen=True, slots=True)
class CropJob:
    """One region to be labelled.

    region: (3,S,S) uint8. patches: (N,3,P,P) uint8. truth: its ground truth, if the photo has one. record: the sample's
    json, without labels. teachers: names of the teachers to ask; empty: all.
    """

    key: str
    image_key: str
    origin: str
    region: Tensor
    patches: Tensor
    boxes: Tensor
    truth: Labels | None
    record: dict[str, Any]
    teachers: tuple[str, ...] = ()

    def asks(self, name: str) -> bool:
        """Whether a teacher labels this region."""
        return not self.teachers or name in self.teachers


def prepare(
    photo: Photo,
    *,
    crops: CropSettings,
    seed: int = 0,
    draw: int = 0,
    sky: str = DEFAULTS.sky,
    teachers: Collection[str] = (),
) -> CropJob:
    """Cut one draw's region and patches out of a photo; raises BadImageError where it is smaller than the smallest
    region. sky: labels.sky, for the record. teachers: names of the teachers to ask; empty: all.

    The ground truth is cut the same way, by nearest neighbour: no values are invented at edges and no invalid ones
    leak. The record's crop has the focal length in pixels of the resized region, where the photo has one.
    """
    height, width = photo.rgb.shape[1:]
    extras: dict[str, Any] = {}
    focal = photo.focal
    if crops.region == "whole":
        photo, extras = squashed(photo), {"squashed": True}  # the region is in pixels of the squashed image
        focal = resized(focal, (height, width), (photo.rgb.shape[1], photo.rgb.shape[2]))
    chosen = plan_photo(photo, crops, seed=seed, draw=draw)
    region = chosen.region
    if focal:
        extras["focal"] = resized(focal, (region.side, region.columns), chosen.shape)
    boxes = chosen.boxes()[None]
    truth = None
    if photo.truth is not None:
        shared = _cut_truth(photo.truth, region, chosen.shape)
        squares = [Square(region.top + p.top, region.left + p.left, p.side) for p in chosen.patches]
        local = [_cut_truth(photo.truth, square, (chosen.patch_size, chosen.patch_size)) for square in squares]
        truth = Labels(shared, cat(local) if local else None, boxes)
    record = {
        "image": {"key": photo.key, "origin": photo.origin, "height": height, "width": width},
        "crop": {**region.record, "size": chosen.size, "patch_size": chosen.patch_size, "draw": draw, **extras},
        "patches": [[p.top, p.left, p.side] for p in chosen.patches],
        "seed": seed,
        "sky": None if sky == "teacher" else sky,
    }
    return CropJob(
        key=f"{photo.key}-{draw}",
        image_key=photo.key,
        origin=photo.origin,
        region=cut_region(photo.rgb, chosen),
        patches=cut_patches(photo.rgb, chosen),
        boxes=boxes,
        truth=truth,
        record=record,
        teachers=tuple(teachers),
    )


def _cut_truth(truth: DepthMap, square: Square, size: tuple[int, int]) -> DepthMap:
    rows = slice(square.top, square.top + square.side)
    columns = slice(square.left, square.left + square.columns)
    values, valid = truth.values[:, rows, columns], truth.valid[:, rows, columns]
    if (square.side, square.columns) != size:
        values = F.interpolate(values[None], size=size, mode="nearest-exact")[0]
        valid = F.interpolate(valid[None].float(), size=size, mode="nearest-exact")[0] > 0.5
    return DepthMap(values, valid, truth.kind)


def teachers_for(names: Collection[str], teachers: Teachers, *, origin: str) -> Teachers:
    """The named ones of `teachers`, all without names, with the primaries of bridged ones; in their order.

    Raises ValueError for a name that no teacher has, naming `origin`.
    """
    known = [name for name, _ in teachers]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{origin}: no teacher is named {', '.join(unknown)}; the teachers are {', '.join(known)}")
    needed: set[str] = set()
    for name, teacher in teachers:
        if name in names and isinstance(teacher, Bridged):
            needed.add(teacher.primary)
    return [(name, teacher) for name, teacher in teachers if not names or name in names or name in needed]


def asked_about(shard: InputShard, teachers: Teachers) -> tuple[str, ...]:
    """Names of a shard's teachers; raises ValueError for an unknown name, or a bridged one without its primary."""
    asked = tuple(name for name, _ in teachers_for(shard.teachers, teachers, origin=shard.origin))
    if unnamed := [name for name in asked if shard.teachers and name not in shard.teachers]:
        raise ValueError(f"{shard.origin}: one of its teachers is bridged to {unnamed[0]}; list {unnamed[0]} there too")
    return asked
