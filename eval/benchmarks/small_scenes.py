"""The scenes benchmark's views at 32 x 32 pixels: what a student of 32 pixels is scored on.

At the benchmark's own 224 pixels, a map of 32 pixels has no edges steep enough to count (boundary F1 of 0.001),
whatever was learnt. Seeds, range and groups are the same.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from torch import Tensor

from distill.core.depth import DepthMap, Kind
from distill.data.scenes import BENCHMARK_SEEDS, OUTDOORS, View, kind_of, render
from distill.eval.benchmarks import BenchmarkSample, prediction_path
from distill.eval.benchmarks.scenes import PROTOCOL as LARGE
from distill.eval.protocol import list_hash

SIZE = 32
_KEYS = {f"{kind_of(seed)}_{seed:03d}.png": seed for seed in BENCHMARK_SEEDS}
PROTOCOL = replace(LARGE, benchmark="small_scenes", list_sha256=list_hash(_KEYS))


def samples(root: Path | str | None = None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The views, by seed."""
    if list_file is not None:
        raise LookupError(f"{list_file}: this benchmark has no lists")
    return [_sample(key, seed) for key, seed in _KEYS.items()]


def _sample(key: str, seed: int) -> BenchmarkSample:
    group = "outdoors" if key.startswith(OUTDOORS) else "indoors"
    return BenchmarkSample(key, prediction_path(key), partial(_image, seed), partial(_truth, seed), group)


@lru_cache(maxsize=64)
def _view(seed: int) -> View:
    return render(seed, size=(SIZE, SIZE))


def _image(seed: int) -> Tensor:
    return _view(seed).image.clone()


def _truth(seed: int) -> DepthMap:
    view = _view(seed)
    return DepthMap(view.depth[None].clone(), view.valid[None].clone(), Kind.METRIC_DEPTH)
