"""MPI Sintel, the training frames of the animated film with their rendered depth: boundary F1.

Root: the folder that holds training/final/SCENE/frame_N.png (MPI-Sintel-complete) and training/depth/SCENE/frame_N.dpt
(MPI-Sintel-depth), unpacked into one or beside each other. A .dpt is in metres. list_file: frames to use, one per line.
Which frames and which pass (final, clean) were scored is not published; the final pass of all training frames is ours.
The sky is rendered far away and is left out of the fit.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from distill.core.depth import DepthMap
from distill.eval.benchmarks import BenchmarkSample, Download
from distill.eval.benchmarks._depth import depth_samples, edge_protocol
from distill.eval.benchmarks._files import Files, as_truth
from distill.eval.benchmarks._layouts import FileLayout, ListRow

PROTOCOL = edge_protocol("sintel", farthest=100.0, mask="finite positive depth")


def _row(rgb: str) -> ListRow | None:
    """training/final/SCENE/frame_N.png with training/depth/SCENE/frame_N.dpt."""
    parts = rgb.split("/")
    if len(parts) != 4 or parts[:2] != ["training", "final"] or not rgb.endswith(".png"):
        return None
    return rgb, f"training/depth/{parts[2]}/{parts[3].removesuffix('.png')}.dpt"


_SHIPPED = re.compile(r"(?:^|/)((?:final|depth)/[^/]+/frame_\d+\.(?:png|dpt))$")


def _canonical(name: str) -> str | None:
    """Sintel's own folders, whose archives may be unpacked apart from each other."""
    shipped = _SHIPPED.search(name)
    return f"training/{shipped[1]}" if shipped and "test/" not in name else None


LAYOUT = FileLayout(
    "MPI-Sintel.tar",
    columns=1,
    row=_row,
    shape="training/final/SCENE/frame_N.png with training/depth/SCENE/frame_N.dpt",
    canonical=_canonical,
)
DOWNLOAD = Download(
    archive=LAYOUT.archive, manual="unpack the images and the depth of http://sintel.is.tue.mpg.de into one folder"
)


def samples(root: Path | str | None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The frames, by scene and number."""
    return depth_samples(
        root, list_file, protocol=PROTOCOL, layout=LAYOUT, truth=_truth, group=lambda rgb: rgb.split("/")[2]
    )


def _truth(files: Files, depth: str) -> DepthMap:
    metres = files.map(depth).astype(np.float32)
    return as_truth(metres, np.isfinite(metres) & (metres > 0))
