"""DIODE, 771 validation images, 325 indoors and 446 outdoor: 768 x 1024, laser scanned.

Root: diode_val.tar, or what it unpacks to. List columns: rgb, depth, mask. Depth and mask are .npy, depth in metres. In
marigold mode only the mask file defines what is valid, although the range is 0.6 to 350 m; clean mode applies both.
Source: prs-eth/Marigold, src/dataset/diode_dataset.py. Groups: indoors, outdoor.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.core.depth import DepthMap
from distill.eval.benchmarks import BenchmarkSample, Download
from distill.eval.benchmarks._depth import depth_samples
from distill.eval.benchmarks._files import MARIGOLD_HOST, Files, as_truth
from distill.eval.benchmarks._layouts import FileLayout, ListRow
from distill.eval.benchmarks._units import check_unit
from distill.eval.protocol import Protocol

PROTOCOL = Protocol(
    benchmark="diode",
    mode="marigold",
    num_images=771,
    list_sha256="8c1093e7b2b637f1cedb1b814924b2b23800e6907b34b111a1eb9ea5682590cd",
    fit_positive=True,
    disparity_floor=1e-3,
    min_depth=0.6,
    max_depth=350.0,
    clip="range",
    mask="the mask file",
    mask_range=False,
)


def _row(name: str) -> ListRow | None:
    """X.png with its X_depth.npy and X_depth_mask.npy."""
    stem = name.removesuffix(".png")
    return (name, f"{stem}_depth.npy", f"{stem}_depth_mask.npy") if stem != name else None


LAYOUT = FileLayout(
    "diode/diode_val.tar",
    columns=3,
    row=_row,
    shape="indoors/ and outdoor/ with X.png, X_depth.npy and X_depth_mask.npy",
    parts={
        "indoors": (325, "49bf3e099ca435fde432ab95282bbadd9dc6b04ad27ef80767bc8e1acea514da"),
        "outdoor": (446, "d99d1bf99926ce6290d5dc2369ea8ff73c97150dfc732c215f13d973522ef155"),
    },
)
DOWNLOAD = Download(archive=LAYOUT.archive, url=MARIGOLD_HOST + LAYOUT.archive)


def samples(root: Path | str | None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The images, by the published list or by rule: every X.png with its X_depth.npy and X_depth_mask.npy."""
    return depth_samples(root, list_file, protocol=PROTOCOL, layout=LAYOUT, truth=_truth, group=_group)


def _group(rgb: str) -> str:
    """Indoors or outdoor: the published list begins with it, lists of others with val/."""
    return next((part for part in rgb.split("/") if part in LAYOUT.parts), rgb.split("/")[0])


def _truth(files: Files, depth: str, mask: str) -> DepthMap:
    metres, valid = files.map(depth).astype(np.float32), np.nan_to_num(files.map(mask)).astype(bool)
    if metres.ndim != 2 or metres.shape != valid.shape:
        raise OSError(f"{files.root}: {depth} and its mask have the shapes {metres.shape} and {valid.shape}")
    check_unit(metres, valid, PROTOCOL, f"{files.root}: {depth}")
    return as_truth(metres, valid)
