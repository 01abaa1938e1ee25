"""Ray-cast rooms, streets and country with exact depth: the benchmark that needs no download.

Its images are rendered from seeds that training never draws (`data.scenes.BENCHMARK_SEEDS`), so `root` is ignored.
Every fourth view is wide instead of square. Groups: indoors, outdoors. Scored up to 80 metres, like KITTI: a hill at
300 metres would otherwise weigh as much in AbsRel as the road.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

from torch import Tensor

from distill.core.depth import DepthMap, Kind
from distill.data.pairs import read_names
from distill.data.scenes import BENCHMARK_SEEDS, OUTDOORS, TRAIN_SEEDS, View, kind_of, render
from distill.eval.benchmarks import BenchmarkSample, prediction_path
from distill.eval.protocol import Protocol, list_hash


def _key(seed: int) -> str:
    return f"{kind_of(seed)}_{seed:03d}.png"


_KEYS = {_key(seed): seed for seed in BENCHMARK_SEEDS}

PROTOCOL = Protocol(
    benchmark="scenes",
    num_images=len(_KEYS),
    list_sha256=list_hash(_KEYS),
    min_depth=0.05,
    max_depth=80.0,
    mask="everything but the sky",
)


def view_sample(seed: int, size: tuple[int, int] | None = None) -> BenchmarkSample:
    """A view; size: its (H,W), by default the benchmark's own."""
    key, view = _key(seed), (seed, size or ((192, 256) if seed % 4 == 3 else (224, 224)))
    group = "outdoors" if key.startswith(OUTDOORS) else "indoors"
    path, focal = prediction_path(key), partial(_focal, *view)
    return BenchmarkSample(key, path, partial(_image, *view), partial(_truth, *view), group, focal=focal)


def samples(root: Path | str | None = None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The views, by seed. list_file: keys to use ("room_003.png"), one per line."""
    keys = list(_KEYS) if list_file is None else _chosen(Path(list_file))
    return [view_sample(_KEYS[key]) for key in keys]


def training_samples(count: int) -> list[BenchmarkSample]:
    """The first views of the training range, to fit a baseline for the benchmark on."""
    return [view_sample(seed) for seed in TRAIN_SEEDS[:count]]


def _chosen(list_file: Path) -> list[str]:
    keys = [line.split()[0] for line in read_names(list_file)]
    if unknown := [key for key in keys if key not in _KEYS]:
        views = f"its views are {next(iter(_KEYS))!r} and {len(_KEYS) - 1} more"
        raise LookupError(f"{list_file}: {unknown[0]!r} is not a view of this benchmark; {views}")
    return keys


# An image and its truth are requested one after the other, and an ablation requests all of them once per student.
@lru_cache(maxsize=2 * len(_KEYS))
def _view(seed: int, size: tuple[int, int]) -> View:
    return render(seed, size=size)


def _image(seed: int, size: tuple[int, int]) -> Tensor:
    return _view(seed, size).image.clone()


def _focal(seed: int, size: tuple[int, int]) -> float:
    return _view(seed, size).focal


def _truth(seed: int, size: tuple[int, int]) -> DepthMap:
    view = _view(seed, size)
    return DepthMap(view.depth[None].clone(), view.valid[None].clone(), Kind.METRIC_DEPTH)
