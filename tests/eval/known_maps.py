"""Shared by the tests of scoring: truths, predictions of every kind, and a model that echoes its input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from distill.core.depth import DepthMap, Kind
from distill.eval.benchmarks import BenchmarkSample, prediction_path
from distill.eval.fit import measure
from distill.eval.metrics import from_sums
from distill.eval.protocol import Protocol
from distill.teachers import Card

CLEAN = Protocol(benchmark="test", min_depth=0.1, max_depth=80.0)
MARIGOLD = replace(CLEAN, mode="marigold", fit_positive=True, disparity_floor=1e-3, clip="range", mask_range=False)
SIZE = (40, 56)
DEPTHS = ("metric_depth", "scale_depth", "affine_depth")
DISPARITIES = ("metric_disparity", "scale_disparity", "affine_disparity")


def truth(seed: int = 0, size: tuple[int, int] = SIZE, kind: str = "metric_depth") -> DepthMap:
    rng = torch.Generator().manual_seed(seed)  # its own generator: several threads call this at once
    values = 1.0 + 20.0 * torch.rand(1, *size, generator=rng) ** 2
    return DepthMap(values, torch.rand(1, *size, generator=rng) < 0.8, Kind(kind))


def as_kind(depth: DepthMap, kind: str) -> np.ndarray:
    """The truth as a prediction of a kind, with an arbitrary scale and shift where these are unknown."""
    values = depth.values[0] if kind in DEPTHS else 1.0 / depth.values[0]
    scale, shift = {"metric": (1.0, 0.0), "scale": (0.3, 0.0), "affine": (0.3, 2.0)}[Kind(kind).unknown]
    return (scale * values + shift).numpy()


def numbers(pred: np.ndarray, target: DepthMap, kind: str, protocol: Protocol = CLEAN) -> dict[str, float]:
    measured = measure(pred, target, Kind(kind), protocol)
    return {name: float(value) for name, value in from_sums(measured.sums[None]).items()}


def samples(count: int = 5) -> list[BenchmarkSample]:
    return [
        BenchmarkSample(
            f"part/rgb_{i:02d}.png",
            prediction_path(f"part/rgb_{i:02d}.png"),
            lambda i=i: truth(i).values.expand(3, -1, -1) / 21,
            lambda i=i: truth(i),
            "odd" if i % 2 else "even",
        )
        for i in range(count)
    ]


def noisy(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return as_kind(truth(seed), "affine_depth") * (1 + 0.1 * rng.random(SIZE, dtype=np.float32))


class Echo:
    """A teacher that predicts the image's channel mean + 0.1 as depth, and records the keys of its calls."""

    def __init__(self, kind: Kind = Kind.SCALE_DEPTH, seeded: bool = False) -> None:
        self.card = Card(
            name="echo", weights="", kind=kind, licence="", code_licence="", commercial=True, seeded=seeded
        )
        self.seen: list[object] = []

    def predict(self, images, *, keys=None):
        self.seen.append(keys)
        values = images.mean(1) + 0.1
        return DepthMap(values, images[:, 0] > 0.06, self.card.kind)
