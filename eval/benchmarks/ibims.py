"""iBims-1, 100 indoor photographs with laser-scanned depth that is complete at object edges: boundary F1.

Root: ibims1_core_raw, as published: rgb/NAME.png, depth/NAME.png (16 bits, 50 m = 65535), mask_invalid/NAME.png and
mask_transp/NAME.png, 0 where the depth is missing or behind glass. list_file: photographs to use, one per line.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.core.depth import DepthMap
from distill.eval.benchmarks import BenchmarkSample, Download
from distill.eval.benchmarks._depth import depth_samples, edge_protocol
from distill.eval.benchmarks._files import Files, as_truth
from distill.eval.benchmarks._layouts import FileLayout, ListRow

PROTOCOL = edge_protocol("ibims", farthest=50.0, mask="positive depth outside of both masks")


def _row(rgb: str) -> ListRow | None:
    """rgb/NAME.png with its depth and masks."""
    folder, _, name = rgb.partition("/")
    if folder != "rgb" or not name.endswith(".png") or "/" in name:
        return None
    return rgb, f"depth/{name}", f"mask_invalid/{name}", f"mask_transp/{name}"


LAYOUT = FileLayout(
    "ibims1_core_raw.tar", columns=1, row=_row, shape="rgb/, depth/, mask_invalid/ and mask_transp/ with NAME.png"
)
DOWNLOAD = Download(
    archive=LAYOUT.archive, manual="take ibims1_core_raw from the page of iBims-1 at mediaTUM, and unpack it"
)


def samples(root: Path | str | None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The photographs, by name."""
    return depth_samples(root, list_file, protocol=PROTOCOL, layout=LAYOUT, truth=_truth)


def _truth(files: Files, depth: str, *masks: str) -> DepthMap:
    metres = (files.codes(depth) * (50.0 / 65535.0)).astype(np.float32)
    known, opaque = (files.map(mask) > 0 for mask in masks)
    if not known.shape == opaque.shape == metres.shape:
        raise OSError(f"{files.root}: {depth} and its masks have different sizes")
    return as_truth(metres, (metres > 0) & known & opaque)
