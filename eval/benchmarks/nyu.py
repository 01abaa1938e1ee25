"""NYUv2, the 654 labelled test images: indoor, Kinect, 480 x 640.

Root: nyu_labeled_extracted.tar, what it unpacks to, or the authors' own nyu_depth_v2_labeled.mat. List columns: rgb,
depth, filled depth (loaded by the official evaluation, never used). Depth is a 16-bit png in millimetres. Source:
prs-eth/Marigold, src/dataset/nyu_dataset.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from distill.core.depth import DepthMap
from distill.eval.benchmarks import BenchmarkSample, Download, _nyu_mat, prediction_path
from distill.eval.benchmarks._depth import depth_samples
from distill.eval.benchmarks._files import MARIGOLD_HOST, Files, as_truth, ranged
from distill.eval.benchmarks._layouts import FileLayout, ListRow, read_list
from distill.eval.protocol import Protocol

HEIGHT, WIDTH = 480, 640

PROTOCOL = Protocol(
    benchmark="nyu",
    mode="marigold",
    num_images=654,
    list_sha256="507e5cc85ce4c595f0c1a5a319edc36e9fa6529f7849631b67680f003c8ff2b2",
    fit_positive=True,
    disparity_floor=1e-3,
    min_depth=1e-3,
    max_depth=10.0,
    clip="range",
    mask="inside the range, and Eigen's rows 45:471, columns 41:601",
)


def _row(name: str) -> ListRow | None:
    """test/SCENE/rgb_N.png with its depth_N.png."""
    chosen = name.startswith("test/") and "/rgb_" in name
    return (name, name.replace("/rgb_", "/depth_")) if chosen else None


LAYOUT = FileLayout(
    "nyuv2/nyu_labeled_extracted.tar", columns=2, row=_row, shape="test/SCENE/rgb_N.png with depth_N.png"
)
DOWNLOAD = Download(archive=LAYOUT.archive, url=MARIGOLD_HOST + LAYOUT.archive)


def samples(root: Path | str | None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The test images, by the published list or by rule: every test/*/rgb_N.png with its depth_N.png."""
    if (mat := container(root)) is not None:
        keys = _nyu_mat.names(mat) if list_file is None else [rgb for rgb, _ in read_list(list_file, LAYOUT)]
        _nyu_mat.check_listed(mat, keys)
        return [
            BenchmarkSample(key, prediction_path(key), partial(_nyu_mat.rgb, mat, key), partial(_truth_of, mat, key))
            for key in keys
        ]
    return depth_samples(root, list_file, protocol=PROTOCOL, layout=LAYOUT, truth=_truth)


def container(root: Path | str | None) -> Path | None:
    """The authors' own file, if `root` refers to it."""
    return _nyu_mat.find(root)


def _truth_of(mat: Path, key: str) -> DepthMap:
    return _cropped(_nyu_mat.depth(mat, key), f"{mat}: {key}")


def _truth(files: Files, name: str) -> DepthMap:
    return _cropped(files.codes(name) / 1000.0, f"{files.root}: {name}")


def _cropped(depth: np.ndarray, name: str) -> DepthMap:
    if depth.shape != (HEIGHT, WIDTH):  # Eigen's crop would keep other parts of the view
        raise OSError(f"{name} is {depth.shape[0]} x {depth.shape[1]}, not {HEIGHT} x {WIDTH}: use NYUv2's own size")
    metres, valid = ranged(depth, PROTOCOL, name)
    crop = np.zeros_like(valid)
    crop[45:471, 41:601] = True
    return as_truth(metres, valid & crop)
