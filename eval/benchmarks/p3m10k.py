"""P3M-10k, the 1000 validation portraits with their mattes: boundary recall in hair.

Root: the folder that holds validation/P3M-500-P (faces blurred, in blurred_image/) and validation/P3M-500-NP (in
original_image/), each with mask/, as published (JizhiziLi/P3M). list_file: photographs to use, one per line. Groups:
P3M-500-P, P3M-500-NP. Which images were scored is not published, so no list is checked here.
"""

from __future__ import annotations

from pathlib import Path

from distill.eval.benchmarks import BenchmarkSample, Download
from distill.eval.benchmarks._layouts import FileLayout, ListRow
from distill.eval.benchmarks._mattes import matte_protocol, matte_samples

PROTOCOL = matte_protocol("p3m10k")
_IMAGES = {"P3M-500-P": "blurred_image", "P3M-500-NP": "original_image"}


def _row(rgb: str) -> ListRow | None:
    """validation/PART/IMAGES/NAME.jpg with validation/PART/mask/NAME.png."""
    parts = rgb.split("/")
    if len(parts) != 4 or parts[0] != "validation" or _IMAGES.get(parts[1]) != parts[2] or not rgb.endswith(".jpg"):
        return None
    return rgb, f"validation/{parts[1]}/mask/{parts[3].removesuffix('.jpg')}.png"


LAYOUT = FileLayout("P3M-10k.tar", columns=1, row=_row, strip="P3M-10k/")
DOWNLOAD = Download(
    archive=LAYOUT.archive, manual="agree to its terms as the README of github.com/JizhiziLi/P3M says, and unpack it"
)


def samples(root: Path | str | None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The validation portraits, by part and name."""
    return matte_samples(root, list_file, protocol=PROTOCOL, layout=LAYOUT, group=lambda rgb: rgb.split("/")[1])
