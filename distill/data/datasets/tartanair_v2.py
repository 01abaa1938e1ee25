"""TartanAir V2 (castacks/tartanairpy): flights through rendered worlds with twelve pinhole cameras, 640 x 640.

ENVIRONMENT/Data_easy/PNNN/image_lcam_front/IIIIII_lcam_front.png, with IIIIII_lcam_front_depth.png in depth_lcam_front
beside it (also Data_hard): metres along the axis, float32 in the four bytes of an RGBA pixel. Every camera has folders
of its own: lcam and rcam (0.25 m apart), each with front, back, left, right, top and bottom, all of 90 degrees. The
pictures that are resampled from them (lcam_fish, lcam_equirect, ...) are not pinhole and not read.
The sky has "a very large value" (the authors): values from 1000 m on count as sky (ours, as for TartanAir).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distill.core.depth import Kind
from distill.data.datasets import Facts, Group, Row, files_of, folders_of, frames, mask_invalid, paired, stored

FOCAL, WIDTH, SKY = 320.0, 640, 1000.0
CAMERAS = tuple(f"{side}cam_{view}" for side in "lr" for view in ("front", "back", "left", "right", "top", "bottom"))

FACTS = Facts(
    title="TartanAir V2",
    url="https://tartanair.org/",
    licence="CC BY 4.0",
    commercial=True,
    kind=Kind.METRIC_DEPTH,
    focal=FOCAL,
    width=WIDTH,
    note="the pinhole cameras that are there, top and bottom included: a list of names selects some",
)


def groups(root: Path) -> Iterator[str]:
    """Cameras of flights: CarWelding/Data_easy/P000/lcam_front, also where only its depth is there."""
    for world in folders_of(root):
        for difficulty in ("Data_easy", "Data_hard"):
            for flight in folders_of(world / difficulty):
                there = {folder.name for folder in folders_of(flight)}
                yield from (
                    f"{world.name}/{difficulty}/{flight.name}/{camera}"
                    for camera in CAMERAS
                    if not there.isdisjoint((f"image_{camera}", f"depth_{camera}"))
                )


def rows(root: Path, group: str) -> Group:
    """The pictures of one camera on one flight."""
    flight, _, camera = group.rpartition("/")
    images = frames(files_of(root / flight / f"image_{camera}"), "", f"_{camera}.png")
    depths = frames(files_of(root / flight / f"depth_{camera}"), "", f"_{camera}_depth.png")
    return paired(root, images, depths, prefix=group, focal=FOCAL)


def read(root: Path, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Metres; the sky is invalid."""
    return mask_invalid(stored(root, row), below=SKY)
