"""Hypersim (Roberts et al., ICCV 2021): 461 interiors, 1024 x 768, as HDF5 or as Marigold and Lotus pack it.

As published: ai_VVV_NNN/images/scene_cam_XX_final_preview/frame.IIII.tonemap.jpg beside
ai_VVV_NNN/images/scene_cam_XX_geometry_hdf5/frame.IIII.depth_meters.hdf5, which holds the distance from the camera's
centre in metres, float16, NaN where nothing was hit. Depth along the optical axis is distance * f / |(x, y, f)| with
f = 886.81 pixels and x, y of pixel centres (the authors' formula; it is inexact for scenes with tilted lenses).

As Marigold's and Lotus's preprocessing writes it: SPLIT/ai_VVV_NNN/rgb_cam_XX_frIIII.png beside depth_plane_..., planar
depth in millimetres, 16 bits, 0 where invalid.

Where metadata_images_split_scene_v1.csv lies in the root, images that are not in the public release are left out, and
each row carries its split.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from distill.core.depth import Kind
from distill.data.datasets import Facts, Group, Row, files_of, folders_of, frames, mask_invalid, paired, stored

FOCAL, WIDTH = 886.81, 1024
SPLITS = "metadata_images_split_scene_v1.csv"

FACTS = Facts(
    title="Hypersim",
    url="https://github.com/apple/ml-hypersim",
    licence="CC BY-SA 3.0",
    commercial=True,
    kind=Kind.METRIC_DEPTH,
    images=39_648,
    kept=26_912,
    means=(0.612, 0.548),
    focal=FOCAL,
    width=WIDTH,
    note="HDF5 holds distances from the camera's centre; they become depth along the axis. 77,400 images in all",
)


def groups(root: Path) -> Iterator[str]:
    """Cameras (ai_001_001/cam_00) of the published layout, scenes (train/ai_001_001) of the prepared one."""
    for scene in folders_of(root):
        if scene.name.startswith("ai_"):
            for folder in folders_of(scene / "images"):
                if match := re.fullmatch(r"scene_(cam_\d+)_(?:final_preview|geometry_hdf5)", folder.name):
                    yield f"{scene.name}/{match[1]}"
        else:
            yield from (f"{scene.name}/{inner.name}" for inner in folders_of(scene) if inner.name.startswith("ai_"))


def rows(root: Path, group: str) -> Group:
    """The frames of one camera, or of one prepared scene."""
    first, second = group.split("/")
    if not first.startswith("ai_"):
        files = files_of(root / group)
        images, depths = frames(files, "rgb_", ".png"), frames(files, "depth_plane_", ".png")
        pairs = paired(root, images, depths, prefix=group, focal=FOCAL)
        return replace(pairs, rows=tuple(Row(r.name, r.rgb, r.depth, r.focal, first) for r in pairs.rows))
    folder = root / first / "images"
    images = frames(files_of(folder / f"scene_{second}_final_preview"), "frame.", ".tonemap.jpg")
    depths = frames(files_of(folder / f"scene_{second}_geometry_hdf5"), "frame.", ".depth_meters.hdf5")
    pairs = paired(root, images, depths, prefix=group, focal=FOCAL)
    splits = _splits(root / SPLITS)
    if splits is None:
        return pairs
    released = [(row, splits.get((first, second, int(row.name.rpartition("/")[2])))) for row in pairs.rows]
    listed = tuple(Row(r.name, r.rgb, r.depth, r.focal, split) for r, split in released if split)
    return replace(pairs, rows=listed, unlisted=len(pairs.rows) - len(listed))


@functools.lru_cache(maxsize=4)
def _splits(path: Path) -> dict[tuple[str, str, int], str] | None:
    """The split of every released image by scene, camera and frame; None where the table is missing."""
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        needed = {"scene_name", "camera_name", "frame_id", "included_in_public_release", "split_partition_name"}
        if missing := needed - set(table.fieldnames or ()):
            raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; download it again, or remove it")
        return {
            (line["scene_name"], line["camera_name"], int(line["frame_id"])): line["split_partition_name"]
            for line in table
            if line["included_in_public_release"].strip().lower() == "true"
        }


def read(root: Path, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Metres along the optical axis."""
    values = stored(root, row)
    if row.depth.endswith(".png"):
        return mask_invalid(values * np.float32(0.001))
    return mask_invalid(values * _planar(*values.shape))


@functools.lru_cache(maxsize=4)
def _planar(height: int, width: int) -> np.ndarray:
    """(H,W) float32 factors from distance to depth along the axis, for a whole image at any resolution."""
    focal = FOCAL * width / WIDTH
    x = np.arange(width) - (width - 1) / 2
    y = np.arange(height) - (height - 1) / 2
    return (focal / np.sqrt(x[None, :] ** 2 + y[:, None] ** 2 + focal**2)).astype(np.float32)
