"""Virtual KITTI 2 (Cabon et al., 2020): five drives re-rendered in ten weathers and angles, 1242 x 375.

SceneXX/VARIATION/frames/rgb/Camera_C/rgb_IIIII.jpg beside .../frames/depth/Camera_C/depth_IIIII.png: centimetres in 16
bits. The far plane lies at 655.35 m, the largest code: it holds only the sky and is invalid. The two archives
may be unpacked into one root, or stay in their own folders (vkitti_2.0.3_rgb, vkitti_2.0.3_depth).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distill.core.depth import Kind
from distill.data.datasets import Facts, Group, Row, files_of, folders_of, frames, mask_invalid, paired, stored, unique

FOCAL, WIDTH = 725.0087, 1242
FAR = 655.35
_ARCHIVES = ("vkitti_2.0.3_rgb", "vkitti_2.0.3_depth")

FACTS = Facts(
    title="Virtual KITTI 2",
    url="https://europe.naverlabs.com/research/computer-vision/proxy-virtual-worlds-vkitti-2/",
    licence="CC BY-NC-SA 3.0",
    commercial=False,
    kind=Kind.METRIC_DEPTH,
    images=19_559,
    kept=12_643,
    means=(0.388, 0.421),
    focal=FOCAL,
    width=WIDTH,
    note="21,260 frames x 2 cameras are published; AnyDepth counts 19,559, and its list has Camera_0 alone",
)


def _top(root: Path, archive: str) -> Path:
    return root / archive if (root / archive).is_dir() else root


def groups(root: Path) -> Iterator[str]:
    """Cameras: Scene01/clone/Camera_0, also where only its depth is there."""
    yield from unique(
        f"{scene.name}/{variation.name}/{camera.name}"
        for archive, modality in zip(_ARCHIVES, ("rgb", "depth"), strict=True)
        for scene in folders_of(_top(root, archive))
        if scene.name.startswith("Scene")
        for variation in folders_of(scene)
        for camera in folders_of(variation / "frames" / modality)
    )


def rows(root: Path, group: str) -> Group:
    """The frames of one camera."""
    scene, variation, camera = group.split("/")
    rgb, depth = (
        _top(root, archive) / scene / variation / "frames" / modality / camera
        for archive, modality in zip(_ARCHIVES, ("rgb", "depth"), strict=True)
    )
    images, depths = frames(files_of(rgb), "rgb_", ".jpg"), frames(files_of(depth), "depth_", ".png")
    return paired(root, images, depths, prefix=group, focal=FOCAL)


def read(root: Path, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Metres; the far plane is invalid."""
    codes = stored(root, row)
    values, valid = mask_invalid(codes * np.float32(0.01))
    valid &= codes < 65535
    return np.where(valid, values, np.float32(0)), valid
