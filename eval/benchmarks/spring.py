"""Spring, the left training frames of the animated film with their rendered disparity: boundary F1.

Root: the folder that holds train/SEQ/frame_left/frame_left_N.png, train/SEQ/disp1_left/disp1_left_N.dsp5 and
train/SEQ/cam_data/intrinsics.txt, as published. A .dsp5 is HDF5 with a data set "disparity" of twice the image's height
and width, in pixels of the image; every second row and column is used, which is ours. Depth is fx x 0.065 m /
disparity, fx from the N-th line of the intrinsics. No disparity means the sky, far away; NaN means no truth. list_file:
frames to use, one per line. Which frames were scored is not published.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.core.depth import DepthMap
from distill.eval.benchmarks import BenchmarkSample, Download
from distill.eval.benchmarks._depth import depth_samples, edge_protocol
from distill.eval.benchmarks._files import Files, as_truth
from distill.eval.benchmarks._layouts import FileLayout, ListRow

BASELINE = 0.065
_SKY = 1e6

PROTOCOL = edge_protocol(
    "spring",
    farthest=1000.0,
    mask="finite disparity, the sky far away",
    resize="every second row and column of the truth, which has twice the image's size",
)


def _row(rgb: str) -> ListRow | None:
    """train/SEQ/frame_left/frame_left_N.png with its disparity and its sequence's intrinsics."""
    parts = rgb.split("/")
    if len(parts) != 4 or parts[0] != "train" or parts[2] != "frame_left" or not rgb.endswith(".png"):
        return None
    number = parts[3].removesuffix(".png").rpartition("_")[2]
    folder = f"train/{parts[1]}"
    return rgb, f"{folder}/disp1_left/disp1_left_{number}.dsp5", f"{folder}/cam_data/intrinsics.txt"


LAYOUT = FileLayout(
    "spring.tar",
    columns=1,
    row=_row,
    strip="spring/",
    shape="train/SEQ/ with frame_left/frame_left_N.png, disp1_left/disp1_left_N.dsp5 and cam_data/intrinsics.txt",
)
DOWNLOAD = Download(
    archive=LAYOUT.archive,
    manual="take train_frame_left, train_disp1_left and train_cam_data from spring-benchmark.org",
)


def samples(root: Path | str | None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The left frames, by sequence and number."""
    return depth_samples(
        root, list_file, protocol=PROTOCOL, layout=LAYOUT, truth=_truth, group=lambda rgb: rgb.split("/")[1]
    )


def _truth(files: Files, dsp5: str, intrinsics: str) -> DepthMap:
    disparity = files.map(dsp5)[::2, ::2].astype(np.float32)
    number = int(dsp5.removesuffix(".dsp5").rpartition("_")[2])
    try:
        focal = float(files.read(intrinsics).decode().splitlines()[number - 1].split()[0])
    except (ValueError, IndexError) as error:
        raise OSError(f"{files.root}: {intrinsics} has no focal length for frame {number}") from error
    depth = np.where(disparity > 0, focal * BASELINE / np.maximum(disparity, 1e-9), _SKY).astype(np.float32)
    return as_truth(np.minimum(depth, np.float32(_SKY)), np.isfinite(disparity))
