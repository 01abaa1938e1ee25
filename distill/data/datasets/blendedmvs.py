"""BlendedMVS, with its extensions + and ++ (Yao et al., CVPR 2020): reconstructed scenes, re-rendered, 768 x 576.

PID/blended_images/IIIIIIII.jpg (IIIIIIII_masked.jpg beside it is not read) and PID/rendered_depth_maps/IIIIIIII.pfm;
PID/cams/IIIIIIII_cam.txt has the camera. Each scene has the unit of its reconstruction: depth up to scale; 0 is
invalid. The PIDs may lie in folders of their own (dataset_low_res, BlendedMVS++, ...) below the root.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distill.core.depth import Kind
from distill.data.datasets import Facts, Group, Row, below, files_of, folders_of, frames, mask_invalid, stored

FACTS = Facts(
    title="BlendedMVS",
    url="https://github.com/YoYo000/BlendedMVS",
    licence="CC BY 4.0",
    commercial=True,
    kind=Kind.SCALE_DEPTH,
    images=115_142,
    kept=74_838,
    means=(0.435, 0.590),
    width=768,
    note="each scene has a unit of its own; AnyDepth's count is that of BlendedMVS, + and ++ together",
)


def groups(root: Path) -> Iterator[str]:
    """Scenes: PID, or dataset_low_res/PID."""
    for folder in folders_of(root):
        if _is_scene(folder):
            yield folder.name
        else:
            yield from (f"{folder.name}/{inner.name}" for inner in folders_of(folder) if _is_scene(inner))


def scene(group: str) -> str:
    """The PID: the authors publish many in two resolutions."""
    return group.rpartition("/")[2]


def _is_scene(folder: Path) -> bool:
    """Whether a folder has a scene's images, or only its depth."""
    return (folder / "blended_images").is_dir() or (folder / "rendered_depth_maps").is_dir()


def rows(root: Path, group: str) -> Group:
    """The views of one scene."""
    folder = root / group
    images = frames(files_of(folder / "blended_images"), "", ".jpg")
    images = {frame: path for frame, path in images.items() if not frame.endswith("_masked")}
    depths = frames(files_of(folder / "rendered_depth_maps"), "", ".pfm")
    cameras = frames(files_of(folder / "cams"), "", "_cam.txt")
    pairs, alone = [], []
    for frame, path in images.items():
        if frame not in depths:
            alone.append(below(root, path))
            continue
        focal = _focal(cameras[frame]) if frame in cameras else 0.0
        pairs.append(Row(f"{group}/{frame}", below(root, path), below(root, depths[frame]), focal))
    spare = tuple(below(root, path) for frame, path in depths.items() if frame not in images)
    return Group(tuple(pairs), tuple(alone), spare)


def _focal(path: Path) -> float:
    """fx of a camera file: the first number after the word "intrinsic"; 0 where there is none."""
    words = path.read_text(encoding="utf-8", errors="replace").split()
    try:
        return float(words[words.index("intrinsic") + 1])
    except (ValueError, IndexError):
        return 0.0


def read(root: Path, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Depth in the unit of the scene."""
    return mask_invalid(stored(root, row))
