"""Virtual KITTI 1.3.1 (Gaidon et al., CVPR 2016): five drives rendered in ten weathers and angles, 1242 x 375.

vkitti_1.3.1_rgb/WORLD/VARIATION/IIIII.png and vkitti_1.3.1_depthgt/WORLD/VARIATION/IIIII.png: distance to the camera
plane, centimetres in 16 bits. Both archives have the same names inside, so each stays in its own folder. The far plane
lies at 655.35 m, and "points at infinity like sky pixels are clipped to a depth of 655.3m" (the authors' README):
values from 655.3 m on are invalid.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distill.core.depth import Kind
from distill.data.datasets import Facts, Group, Row, files_of, folders_of, frames, mask_invalid, paired, stored, unique

FOCAL, WIDTH = 725.0, 1242
FAR = 65530
"""Centimetres."""
_RGB, _DEPTH = "vkitti_1.3.1_rgb", "vkitti_1.3.1_depthgt"

FACTS = Facts(
    title="Virtual KITTI 1.3.1",
    url="https://europe.naverlabs.com/research/computer-vision/proxy-virtual-worlds-vkitti-1/",
    licence="CC BY-NC-SA 3.0",
    commercial=False,
    kind=Kind.METRIC_DEPTH,
    images=21_260,
    focal=FOCAL,
    width=WIDTH,
    note="one camera; the drives and variations of Virtual KITTI 2, rendered anew there",
)


def groups(root: Path) -> Iterator[str]:
    """Videos: vkitti_1.3.1_rgb/0001/clone, also where only its depth is there."""
    yield from unique(
        f"{_RGB}/{world.name}/{variation.name}"
        for archive in (_RGB, _DEPTH)
        for world in folders_of(root / archive)
        for variation in folders_of(world)
    )


def rows(root: Path, group: str) -> Group:
    """The frames of one video, named WORLD/VARIATION/IIIII."""
    video = group.removeprefix(f"{_RGB}/")
    images, depths = (frames(files_of(root / archive / video), "", ".png") for archive in (_RGB, _DEPTH))
    return paired(root, images, depths, prefix=video, focal=FOCAL)


def read(root: Path, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Metres along the axis; the far plane is invalid."""
    codes = stored(root, row)
    return mask_invalid(np.where(codes < FAR, codes, np.float32(0)) * np.float32(0.01))
