"""TartanAir (Wang et al., IROS 2020): flights through thirty rendered worlds, 640 x 480.

ENVIRONMENT/DIFFICULTY/PNNN/image_left/IIIIII_left.png beside .../depth_left/IIIIII_left_depth.npy: metres along the
axis. The sky is a distant sphere ("e.g. 10000", according to the authors): values from 1000 m on count as sky (ours).
Its zip files unpack to ENVIRONMENT/ENVIRONMENT/..., or each into a folder of its own name (image_left/ENVIRONMENT/...
and depth_left/ENVIRONMENT/... below DIFFICULTY), which is read too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distill.core.depth import Kind
from distill.data.datasets import Facts, Group, Row, files_of, folders_of, frames, mask_invalid, paired, stored

FOCAL, SKY = 320.0, 1000.0

FACTS = Facts(
    title="TartanAir",
    url="https://theairlab.org/tartanair-dataset/",
    licence="CC BY 4.0",
    commercial=True,
    kind=Kind.METRIC_DEPTH,
    images=306_637,
    kept=186_693,
    means=(0.328, 0.454),
    focal=FOCAL,
    width=640,
    note="only the left pictures; Depth Anything 3 leaves out the environment `amusement`",
)


def groups(root: Path) -> Iterator[str]:
    """Flights: abandonedfactory/Easy/P000, also where only its depth is there."""
    for world in folders_of(root):
        for difficulty in ("Easy", "Hard"):
            own = f"{difficulty}/image_left/{world.name}/{difficulty}"  # image_left.zip in a folder of its name
            for inner in (difficulty, f"{world.name}/{difficulty}", own, f"{world.name}/{own}"):
                flights = folders_of(world / inner)
                prefix = f"{world.name}/{inner}"
                sorts = ("image_left",) if inner.endswith(own) else ("image_left", "depth_left")
                yield from (f"{prefix}/{f.name}" for f in flights if any((f / sort).is_dir() for sort in sorts))


def scene(group: str) -> str:
    """ENVIRONMENT/DIFFICULTY/PNNN, whichever folders the archives were unpacked to."""
    parts = group.split("/")
    return "/".join((parts[0], *parts[-2:]))


def rows(root: Path, group: str) -> Group:
    """The left pictures of one flight."""
    images = frames(files_of(root / group / "image_left"), "", "_left.png")
    beside = group.replace("/image_left/", "/depth_left/")
    depths = frames(files_of(root / beside / "depth_left"), "", "_left_depth.npy")
    return paired(root, images, depths, prefix=group, focal=FOCAL)


def read(root: Path, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Metres; the sky is invalid."""
    return mask_invalid(stored(root, row), below=SKY)
