"""One file per benchmark; the file's name is the benchmark's name.

A benchmark module has

    PROTOCOL: Protocol               how it is scored; num_images and list_sha256 are those of the published list,
                                     or 0 and "" where there is none
    samples(root, list_file=None)    -> list[BenchmarkSample]: the images, in a fixed order, nothing decoded yet
    DOWNLOAD: Download               optional: where its data can be obtained

root: a folder or a tar (also compressed), None if the benchmark makes its own images. list_file: which images, in the
columns of the benchmark's published list; without it, all images in the root, which must then be those of the published
list. Errors name the root or the list, and the remedy. Files that start with "_" are not benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from distill.core.depth import DepthMap, Kind
from distill.core.files import leaves_root
from distill.eval.protocol import Protocol, list_hash


@dataclass(frozen=True, slots=True)
class BenchmarkSample:
    """One image of a benchmark.

    key: its name in the published list (the rgb's relative path), unique in the benchmark.
    mark: () -> what is scored if that is not depth (see distill.eval.tasks): a matte (1,H,W) float32 in [0,1], or
    distill.eval.da2k.Points; `truth` then raises ValueError.
    prediction_path: the path of its stored prediction below the predictions' folder.
    image: () -> (3,H,W) float32 in [0,1], RGB, cropped as the benchmark prescribes. Decodes at every call.
    truth: () -> the ground truth, (1,H,W), usually metric_depth, valid where it may be scored. Decodes at every call.
    group: a part of the benchmark that is also reported separately ("indoors"), or "".
    photo: the image's path below the root if it differs from the key, or "".
    focal: () -> the focal length in pixels of the image; None if the benchmark does not provide it.
    kind: the truth's, where each image of a benchmark says its own; None: as PROTOCOL.truth says.
    """

    key: str
    prediction_path: str
    image: Callable[[], Tensor]
    truth: Callable[[], DepthMap]
    group: str = ""
    mark: Callable[[], Any] | None = None
    photo: str = ""
    focal: Callable[[], float] | None = None
    kind: Kind | None = None

    def __post_init__(self) -> None:
        if why := leaves_root(self.prediction_path):
            raise ValueError(f"the image {self.key!r} is refused, since {why}: predictions are written below a folder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """Where a benchmark's archive can be obtained.

    archive: its path below the folder of all benchmarks. url: of the file; "" if the host requires a form or has no
    file to fetch: `manual` then says what to do instead. sha256: as published by its authors, or "".
    """

    archive: str
    url: str = ""
    sha256: str = ""
    manual: str = ""


def prediction_path(rgb: str) -> str:
    """The path of an rgb's stored prediction: `a/b/pred_NAME.npy` for `a/b/NAME.png`.

    Marigold's naming (src/dataset, get_pred_name). A leading `rgb_` is dropped: NYU's rgb_0001.png
    becomes pred_0001.npy.
    """
    path = PurePosixPath(rgb)
    return str(path.with_name(f"pred_{path.stem.removeprefix('rgb_')}.npy"))


def with_listed_images(protocol: Protocol, samples: Sequence[BenchmarkSample]) -> Protocol:
    """The protocol with the number and the hash of the given images instead of the published ones."""
    return replace(protocol, num_images=len(samples), list_sha256=list_hash(sample.key for sample in samples))
