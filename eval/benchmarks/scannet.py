"""ScanNet, 800 sampled validation images: indoor, Structure sensor.

Root: scannet_val_sampled_800_1.tar, or what it unpacks to. List columns: rgb, depth. Depth is a 16-bit png in
millimetres at the colour image's size. Source: prs-eth/Marigold, src/dataset/scannet_dataset.py.
"""

from __future__ import annotations

from pathlib import Path

from distill.core.depth import DepthMap
from distill.eval.benchmarks import BenchmarkSample, Download
from distill.eval.benchmarks._depth import depth_samples
from distill.eval.benchmarks._files import Files, as_truth, ranged
from distill.eval.benchmarks._layouts import FileLayout, ListRow
from distill.eval.protocol import Protocol

PROTOCOL = Protocol(
    benchmark="scannet",
    mode="marigold",
    num_images=800,
    list_sha256="4ee072e18615bc4307816e04d4927c7a991848b2b61ac68fc1e1fe45e29a5cb7",
    fit_positive=True,
    disparity_floor=1e-3,
    min_depth=1e-3,
    max_depth=10.0,
    clip="range",
    mask="inside the range",
)


def _row(rgb: str) -> ListRow | None:
    """SCENE/color/N.jpg with its SCENE/depth/N.png."""
    if "/color/" not in rgb or not rgb.endswith(".jpg"):
        return None
    return rgb, rgb.replace("/color/", "/depth/").removesuffix(".jpg") + ".png"


LAYOUT = FileLayout(
    "scannet/scannet_val_sampled_800_1.tar", columns=2, row=_row, shape="SCENE/color/N.jpg with SCENE/depth/N.png"
)
DOWNLOAD = Download(
    archive=LAYOUT.archive,
    manual="ScanNet is given to those who sign its terms of use: ask for access at http://www.scan-net.org, then "
    "take the 800 sampled images from Marigold's evaluation data (README of prs-eth/Marigold) and give the address "
    "of the tar with --url",
)


def samples(root: Path | str | None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The images, by the published list or by rule: every SCENE/color/N.jpg with its SCENE/depth/N.png."""
    return depth_samples(root, list_file, protocol=PROTOCOL, layout=LAYOUT, truth=_truth)


def _truth(files: Files, name: str) -> DepthMap:
    return as_truth(*ranged(files.codes(name) / 1000.0, PROTOCOL, f"{files.root}: {name}"))
