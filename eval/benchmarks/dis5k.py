"""DIS-5K, photographs of thin and intricate objects with their masks: boundary recall on bicycles and cranes.

Root: the folder that holds DIS-TE1 ... DIS-TE4, DIS-TR, DIS-VD, each with im/NAME.jpg and gt/NAME.png, as published
(xuebinqin/DIS). list_file: photographs to use, one per line; Depth Pro scores about 200 of all parts, those of its
src/depth_pro/eval/dis5k_sample_list.txt, which is read as it is. Without it the four test parts are used, 2000
photographs. Groups: the parts.
"""

from __future__ import annotations

from pathlib import Path

from distill.eval.benchmarks import BenchmarkSample, Download
from distill.eval.benchmarks._layouts import FileLayout, ListRow
from distill.eval.benchmarks._mattes import matte_protocol, matte_samples

PROTOCOL = matte_protocol("dis5k")


def _row(rgb: str) -> ListRow | None:
    """PART/im/NAME.jpg with PART/gt/NAME.png."""
    parts = rgb.split("/")
    if len(parts) != 3 or not parts[0].startswith("DIS-") or parts[1] != "im" or not rgb.endswith(".jpg"):
        return None
    return rgb, f"{parts[0]}/gt/{parts[2].removesuffix('.jpg')}.png"


def _test_row(rgb: str) -> ListRow | None:
    return _row(rgb) if rgb.startswith("DIS-TE") else None


LAYOUT = FileLayout("DIS5K.tar", columns=1, row=_row, strip="DIS5K/")
DOWNLOAD = Download(
    archive=LAYOUT.archive, manual="agree to its terms as the README of github.com/xuebinqin/DIS says, and unpack it"
)


def samples(root: Path | str | None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The photographs of the list, or those of the test parts."""
    layout = LAYOUT if list_file is not None else FileLayout("DIS5K.tar", columns=1, row=_test_row)
    return matte_samples(root, list_file, protocol=PROTOCOL, layout=layout, group=lambda rgb: rgb.split("/")[0])
