"""One file per benchmark; the file's name is the benchmark's name.

A benchmark module has

    PROTOCOL: Protocol               how it is scored; num_images and list_sha256 are those of the published list,
                                     or 0 and "" where there is none
    samples(root, list_file=None)    -> list[Sample]: the images, in a fixed order, nothing decoded yet
    DOWNLOAD: Download               optional: where its data can be had

root: a folder or a tar (also compressed), None where the benchmark makes its own images. list_file: which images, in
the columns in which the benchmark's list is published; without it, all that the root holds, which must then be the
published list. Errors name the root or the list, and the way out. Files that start with "_" are no benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from distill.core.depth import DepthMap
from distill.core.files import leaves_root
from distill.eval.protocol import Protocol, list_hash


@dataclass(frozen=True, slots=True)
class BenchmarkSample:
    """One image of a benchmark.

    key: its name in the published list (the rgb's relative path), unique in the benchmark.
    mark: () -> what is scored where that is no depth (see distill.eval.tasks): a matte (1,H,W) float32 in [0,1], or
    distill.eval.da2k.Points; `truth` then raises ValueError.
    prediction_path: where its stored prediction lies below the predictions' folder.
    image: () -> (3,H,W) float32 in [0,1], RGB, cropped as the benchmark prescribes. Decodes at every call.
    truth: () -> the ground truth, (1,H,W), usually metric_depth, valid where it may be scored. Decodes at every call.
    group: a part of the benchmark that is also reported by itself ("indoors"), or "".
    photo: the image's path below the root where the key is another name, or "".
    focal: () -> the focal length in pixels of the image; None where the benchmark does not say it.
    """

    key: str
    prediction_path: str
    image: Callable[[], Tensor]
    truth: Callable[[], DepthMap]
    group: str = ""
    mark: Callable[[], Any] | None = None
    photo: str = ""
    focal: Callable[[], float] | None = None

    def __post_init__(self) -> None:
        if why := leaves_root(self.prediction_path):
            raise ValueError(f"the image {self.key!r} is refused, since {why}: predictions are written below a folder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """Where a benchmark's archive can be had.

    archive: its place below the folder of all benchmarks. url: of the file; "" where the host asks for a form or has
    no file to fetch, and where `manual` says what to do instead. sha256: as its authors publish it, "" where they do
    not.
    """

    archive: str
    url: str = ""
    sha256: str = ""
    manual: str = ""


def prediction_path(rgb: str) -> str:
    """Where the prediction of an rgb is stored: `a/b/pred_NAME.npy` for `a/b/NAME.png`.

    Marigold's naming (src/dataset, get_pred_name). An `rgb_` in front of the name is dropped: NYU's rgb_0001.png
    becomes pred_0001.npy.
    """
    path = PurePosixPath(rgb)
    return str(path.with_name(f"pred_{path.stem.removeprefix('rgb_')}.npy"))


def actual(protocol: Protocol, samples: Sequence[BenchmarkSample]) -> Protocol:
    """The protocol with the number and the hash of the images that are there, instead of the published ones."""
    return replace(protocol, num_images=len(samples), list_sha256=list_hash(sample.key for sample in samples))
