"""KITTI, Eigen's test split with the improved ground truth: 652 images of 697, outdoor, sparse lidar.

Root: kitti_eigen_split_test.tar, or what it unpacks to. List columns: rgb, depth, focal length; a depth `None` has no
ground truth and is left out. Depth is a 16-bit png, metres x 256. Image and truth are cropped to KITTI's benchmark
crop, the middle 1216 columns of the bottom 352 rows, and predictions are made on the cropped image. Source:
prs-eth/Marigold, src/dataset/kitti_dataset.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from torch import Tensor

from distill.core.depth import DepthMap
from distill.eval.benchmarks import BenchmarkSample, Download
from distill.eval.benchmarks._depth import depth_samples
from distill.eval.benchmarks._files import MARIGOLD_HOST, Files, as_truth, ranged
from distill.eval.benchmarks._layouts import FileLayout, ListRow
from distill.eval.protocol import Protocol

HEIGHT, WIDTH = 352, 1216
LARGEST = 376, 1242

PROTOCOL = Protocol(
    benchmark="kitti",
    mode="marigold",
    num_images=652,
    list_sha256="f9b578d800ba9280c4afca190140a426079efa26c27649dd9912affebdaae730",
    fit_positive=True,
    disparity_floor=1e-3,
    min_depth=1e-5,
    max_depth=80.0,
    clip="range",
    crop="KITTI benchmark crop, 352 x 1216, of image and truth",
    mask="inside the range, and Eigen's rows 117:321, columns 43:1172 of the cropped map",
)


def _row(depth: str) -> ListRow | None:
    """DRIVE/proj_depth/groundtruth/CAMERA/N.png belongs to DATE/DRIVE/CAMERA/data/N.png, DRIVE starting with DATE."""
    parts = depth.split("/")
    if len(parts) != 5 or parts[1:3] != ["proj_depth", "groundtruth"]:
        return None
    drive, _, _, camera, file = parts
    return f"{drive[:10]}/{drive}/{camera}/data/{file}", depth


_SHIPPED = re.compile(
    r"(?:^|/)((\d{4}_\d\d_\d\d)_drive_\d{4}_sync/(?:(image_0\d/data)|proj_depth/groundtruth/image_0\d)/\d+\.png)$"
)


def _canonical(name: str) -> str | None:
    """KITTI's own folders: raw drives anywhere, also beside their ground truth, which is below train/ or val/."""
    if not (shipped := _SHIPPED.search(name)):
        return None
    path, date, is_image = shipped.groups()
    return f"{date}/{path}" if is_image else path


LAYOUT = FileLayout(
    "kitti/kitti_eigen_split_test.tar",
    columns=2,
    row=_row,
    shape="DATE/DRIVE/image_02/data/N.png with DRIVE/proj_depth/groundtruth/image_02/N.png",
    canonical=_canonical,
)
DOWNLOAD = Download(archive=LAYOUT.archive, url=MARIGOLD_HOST + LAYOUT.archive)


def samples(root: Path | str | None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The images with ground truth, by the published list or by rule: every ground-truth png with its rgb."""
    return depth_samples(root, list_file, protocol=PROTOCOL, layout=LAYOUT, truth=_truth, image=_image)


def _image(files: Files, name: str) -> Tensor:
    image = files.rgb(name)
    rows, columns = _crop(name, *image.shape[1:])
    return image[:, rows, columns].contiguous()


def _truth(files: Files, name: str) -> DepthMap:
    stored = files.codes(name)
    metres, valid = ranged(stored[_crop(name, *stored.shape)] / 256.0, PROTOCOL, f"{files.root}: {name}")
    eigen = np.zeros_like(valid)
    rows = int(0.3324324 * HEIGHT), int(0.91351351 * HEIGHT)
    columns = int(0.0359477 * WIDTH), int(0.96405229 * WIDTH)
    eigen[rows[0] : rows[1], columns[0] : columns[1]] = True
    return as_truth(metres, valid & eigen)


def _crop(name: str, height: int, width: int) -> tuple[slice, slice]:
    if height < HEIGHT or width < WIDTH:
        raise ValueError(f"{name}: {height} x {width} is smaller than KITTI's benchmark crop, {HEIGHT} x {WIDTH}")
    if height > LARGEST[0] or width > LARGEST[1]:  # the crop would keep another part of the view
        raise ValueError(f"{name}: {height} x {width} is larger than any image of KITTI: use the images' own size")
    left = int((width - WIDTH) / 2)
    return slice(height - HEIGHT, height), slice(left, left + WIDTH)
