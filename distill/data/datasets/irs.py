"""IRS (Wang et al., ICME 2021): a stereo camera in rendered homes, offices, restaurants and stores, 960 x 540.

CLASS/SCENE/l_N.png, the left picture, beside d_N.exr, its disparity in pixels; numbers without leading zeros. Depth is
focal * baseline / disparity with focal = 480 pixels (the authors' loader) and a baseline of 0.1 m (for "most of the
data", according to the authors: blackjack2015/IRS#2; a wrong baseline only scales the depth). The classes lie in the
root or, as in the authors' lists, in its folder IRSDataset.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distill.core.depth import Kind
from distill.data.datasets import Facts, Group, Row, files_of, folders_of, frames, mask_invalid, paired, stored

FOCAL, BASELINE = 480.0, 0.1
CLASSES = ("Home", "Office", "Restaurant", "Store")

FACTS = Facts(
    title="IRS",
    url="https://github.com/blackjack2015/IRS",
    licence="unknown: its page states none",
    commercial=False,
    kind=Kind.METRIC_DEPTH,
    images=103_316,
    kept=68_211,
    means=(0.443, 0.527),
    focal=FOCAL,
    width=960,
    note="only the left pictures; disparity becomes depth",
)


def groups(root: Path) -> Iterator[str]:
    """Scenes: Home/ArchVizInterior03, or IRSDataset/Home/..."""
    for top in ("", "IRSDataset"):
        for scene_class in CLASSES:
            prefix = f"{top}/{scene_class}" if top else scene_class
            yield from (f"{prefix}/{scene.name}" for scene in folders_of(root / prefix))


def scene(group: str) -> str:
    """CLASS/SCENE, whichever folder the classes are in."""
    return group.removeprefix("IRSDataset/")


def rows(root: Path, group: str) -> Group:
    """The left pictures of one scene."""
    files = files_of(root / group)
    return paired(root, frames(files, "l_", ".png"), frames(files, "d_", ".exr"), prefix=group, focal=FOCAL)


def read(root: Path, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Metres; pixels without positive disparity are invalid."""
    disparity, valid = mask_invalid(stored(root, row))
    depth = np.float32(FOCAL * BASELINE) / np.where(valid, disparity, np.float32(1))
    return np.where(valid, depth, np.float32(0)), valid
