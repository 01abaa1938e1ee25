"""The scenes benchmark's views at 32 x 32 pixels: what a student of 32 pixels is scored on.

At the benchmark's own 224 pixels, a map of 32 pixels has no edges steep enough to count (boundary F1 of 0.001),
whatever was learnt. Seeds, range and groups are the same; focal lengths are not given.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distill.data.scenes import BENCHMARK_SEEDS
from distill.eval.benchmarks import BenchmarkSample, scenes

SIZE = 32
PROTOCOL = replace(scenes.PROTOCOL, benchmark="small_scenes")


def samples(root: Path | str | None = None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The views, by seed."""
    if list_file is not None:
        raise LookupError(f"{list_file}: this benchmark has no lists")
    return [replace(scenes.view_sample(seed, (SIZE, SIZE)), focal=None) for seed in BENCHMARK_SEEDS]
