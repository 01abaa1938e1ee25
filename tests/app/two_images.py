"""A benchmark of two small images, which tests select by its path."""

from __future__ import annotations

import torch

from distill.core.depth import DepthMap, Kind
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.protocol import Protocol

PROTOCOL = Protocol(benchmark="two_images", num_images=2, min_depth=0.1, max_depth=100.0)


def _image(i: int) -> torch.Tensor:
    return torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(i))


def samples(root=None, list_file=None):
    def sample(i: int) -> BenchmarkSample:
        metres = 1 + 9 * _image(i).mean(0, keepdim=True)
        truth = DepthMap(metres, metres > 0, Kind.METRIC_DEPTH)
        return BenchmarkSample(f"{i}.png", f"pred_{i}.npy", lambda: _image(i), lambda: truth)

    return [sample(i) for i in range(2)]
