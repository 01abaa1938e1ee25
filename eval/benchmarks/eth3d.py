"""ETH3D, 454 high-resolution images of 13 scenes: 4032 x 6048, laser scanned.

Root: eth3d.tar, or what it unpacks to. List columns: rgb, depth. Depth is raw little-endian float32 of 4032 x 6048 in a
file named .JPG; infinity means nothing was measured. The fit uses 1024 columns (`--alignment_max_res 1024`, set in
Marigold's shell script, not in its config). Depth has no upper bound, so that in marigold mode a disparity at the floor
becomes 1000 m. Source: prs-eth/Marigold, src/dataset/eth3d_dataset.py, script/depth/eval.
"""

from __future__ import annotations

import re
from pathlib import Path

from distill.core.depth import DepthMap
from distill.eval.benchmarks import BenchmarkSample, Download
from distill.eval.benchmarks._depth import depth_samples
from distill.eval.benchmarks._files import MARIGOLD_HOST, Files, as_truth, ranged
from distill.eval.benchmarks._layouts import FileLayout, ListRow
from distill.eval.protocol import Protocol

HEIGHT, WIDTH = 4032, 6048

PROTOCOL = Protocol(
    benchmark="eth3d",
    mode="marigold",
    num_images=454,
    list_sha256="2eaec364cf5eea085a8308b28eb6f000364acb3a82ea16af3dc559a9ad4c4e16",
    fit_columns=1024,
    fit_positive=True,
    disparity_floor=1e-3,
    min_depth=1e-5,
    clip="range",
    mask="depth above 1e-5",
)


def _row(rgb: str) -> ListRow | None:
    """rgb/SCENE/images/... belongs to depth/SCENE_dslr_depth/SCENE/ground_truth_depth/..."""
    parts = rgb.split("/")
    if len(parts) != 5 or parts[0] != "rgb":
        return None
    return rgb, f"depth/{parts[1]}_dslr_depth/{parts[1]}/ground_truth_depth/{parts[3]}/{parts[4]}"


def _size(name: str) -> int | None:
    """Depth files have a known size."""
    return 4 * HEIGHT * WIDTH if name.startswith("depth/") else None


_SHIPPED = re.compile(r"(?:^|/)(\w+)/(images|ground_truth_depth)/(dslr_images/[^/]+)$")


def _canonical(name: str) -> str | None:
    """ETH3D's own folders: SCENE/images and SCENE/ground_truth_depth, wherever its archives were unpacked."""
    shipped = _SHIPPED.search(name)
    if shipped is None:
        return None
    scene, kind, file = shipped.groups()
    return f"rgb/{scene}/{kind}/{file}" if kind == "images" else f"depth/{scene}_dslr_depth/{scene}/{kind}/{file}"


LAYOUT = FileLayout(
    "eth3d/eth3d.tar",
    columns=2,
    row=_row,
    size=_size,
    shape="rgb/SCENE/images/dslr_images/X.JPG with depth/SCENE_dslr_depth/SCENE/ground_truth_depth/dslr_images/X.JPG",
    canonical=_canonical,
)
DOWNLOAD = Download(archive=LAYOUT.archive, url=MARIGOLD_HOST + LAYOUT.archive)


def samples(root: Path | str | None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The images, by the published list or by rule: every rgb with a depth partner."""
    return depth_samples(root, list_file, protocol=PROTOCOL, layout=LAYOUT, truth=_truth)


def _truth(files: Files, name: str) -> DepthMap:
    # Infinity is not below the protocol's upper limit of infinity, so it becomes invalid without a check of its own.
    return as_truth(*ranged(files.floats(name, (HEIGHT, WIDTH)), PROTOCOL, name))
