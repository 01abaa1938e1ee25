"""One real stereo pair, the motorcycle of Middlebury 2014, from scikit-image's wheel: real depth without a download.

Depth is 994.978 * 0.193001 / (disparity + 31.086) metres, by the calibration that scikit-image documents. One image is
not a benchmark: it only shows that a model works on a photograph. `root` is ignored.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

from torch import Tensor

from distill.core.depth import DepthMap
from distill.core.division import unit_range
from distill.data.sources import Entry, Photo, bundled_photos
from distill.eval.benchmarks import BenchmarkSample, prediction_path
from distill.eval.protocol import Protocol, list_hash

_KEY = "motorcycle_left.png"

PROTOCOL = Protocol(benchmark="motorcycle", num_images=1, list_sha256=list_hash([_KEY]), mask="finite stereo disparity")


def samples(root: Path | str | None = None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The one image. Raises FileNotFoundError where scikit-image is not installed."""
    if list_file is not None:
        raise ValueError(f"{list_file}: the motorcycle benchmark is one image and takes no list")
    entry = next(
        entry for shard in bundled_photos() for entry in shard.scan().entries if entry.key == "motorcycle_left"
    )
    path, focal = prediction_path(_KEY), partial(_focal, entry)
    return [BenchmarkSample(_KEY, path, partial(_image, entry), partial(_truth, entry), focal=focal)]


@lru_cache(maxsize=1)
def _photo(entry: Entry) -> Photo:
    return entry.load()


def _image(entry: Entry) -> Tensor:
    return unit_range(_photo(entry).rgb)


def _focal(entry: Entry) -> float:
    return _photo(entry).focal


def _truth(entry: Entry) -> DepthMap:
    truth = _photo(entry).truth
    assert truth is not None
    return truth
