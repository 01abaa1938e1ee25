"""AM-2k, 200 validation photographs of animals with their mattes: boundary recall in fur.

Root: the folder that holds validation/original/NAME.jpg and validation/mask/NAME.png, as published (JizhiziLi/GFM).
list_file: photographs to use, one per line. Which images were scored is not published, so no list is checked here.
"""

from __future__ import annotations

from pathlib import Path

from distill.eval.benchmarks import BenchmarkSample, Download
from distill.eval.benchmarks._layouts import FileLayout, ListRow
from distill.eval.benchmarks._mattes import matte_protocol, matte_samples

PROTOCOL = matte_protocol("am2k")


def _row(rgb: str) -> ListRow | None:
    """validation/original/NAME.jpg with validation/mask/NAME.png."""
    folder, _, name = rgb.rpartition("/")
    stem = name.removesuffix(".jpg")
    return (rgb, f"validation/mask/{stem}.png") if folder == "validation/original" and stem != name else None


LAYOUT = FileLayout("AM-2k.tar", columns=1, row=_row, strip="AM-2k/")
DOWNLOAD = Download(
    archive=LAYOUT.archive, manual="ask its authors as the README of github.com/JizhiziLi/GFM says, and unpack it"
)


def samples(root: Path | str | None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The validation photographs, by name."""
    return matte_samples(root, list_file, protocol=PROTOCOL, layout=LAYOUT)
