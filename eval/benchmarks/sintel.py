"""MPI Sintel, the training frames of the animated film with their rendered depth: boundary F1.

Root: the folder that holds training/final/SCENE/frame_N.png (MPI-Sintel-complete) and training/depth/SCENE/frame_N.dpt
(MPI-Sintel-depth), unpacked into one or beside each other. A .dpt is the float32 202021.25, width and height as int32,
and float32 metres, all little-endian. list_file: frames to use, one per line. Which frames and which pass (final,
clean) were scored is not published; the final pass of all training frames is ours. The sky is rendered far away and is
left out of the fit.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from distill.core.depth import DepthMap
from distill.eval.benchmarks import BenchmarkSample, Download
from distill.eval.benchmarks._edges import edge_protocol, edge_samples
from distill.eval.benchmarks._files import Files, as_truth
from distill.eval.benchmarks._layouts import FileLayout, ListRow

_TAG = np.float32(202021.25)

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
    return edge_samples(
        root, list_file, protocol=PROTOCOL, layout=LAYOUT, truth=_truth, group=lambda rgb: rgb.split("/")[2]
    )


def _truth(files: Files, row: ListRow) -> DepthMap:
    data = files.read(row[1])
    width, height = (int(n) for n in np.frombuffer(data[4:12], "<i4")) if len(data) > 12 else (0, 0)
    if len(data) != 12 + 4 * width * height or np.frombuffer(data[:4], "<f4")[0] != _TAG:
        raise OSError(f"{files.root}: {row[1]} is cut short, or not a depth file of Sintel")
    metres = np.frombuffer(data[12:], "<f4").reshape(height, width).astype(np.float32)
    return as_truth(metres, np.isfinite(metres) & (metres > 0))
