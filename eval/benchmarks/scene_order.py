"""Which of two points is nearer, on the views of `scenes`: an order that no scale, shift or bend of a map can change.

Pairs are drawn with each view's key as seed, so every run uses the same ones; the farther point is at least a tenth
farther (ours; DA-2K's pairs were picked where people are sure). Every view has equally many, so the accuracy over all
pairs is also the mean over views. `root` is ignored.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from distill.core.crops import generator
from distill.eval.benchmarks import BenchmarkSample, scenes
from distill.eval.da2k import PointPair, Points
from distill.eval.protocol import Protocol

PAIRS = 256
"""Pairs per view."""
APART = 1.1
"""The minimum ratio of the two points' depths."""
DRAWN = 16 * PAIRS
"""Pairs drawn to find PAIRS that are far enough apart; every view has enough of them."""

PROTOCOL = Protocol(
    benchmark="scene_order",
    num_images=scenes.PROTOCOL.num_images,
    list_sha256=scenes.PROTOCOL.list_sha256,
    truth="point pairs",
    mask=f"{PAIRS} pairs a view, drawn from its key, within {scenes.PROTOCOL.max_depth:g} m, {APART:g} times as far",
    pooling="over all pairs of all images",
    task="order",
)


def samples(root: Path | str | None = None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The views of `scenes`, in its order. list_file: as for `scenes`."""
    return [
        replace(view, mark=partial(_points, view), truth=partial(_no_depth, view.key))
        for view in scenes.samples(root, list_file)
    ]


def _points(view: BenchmarkSample) -> Points:
    truth = view.truth()
    depth = truth.values[0].numpy()
    near, far = scenes.PROTOCOL.min_depth, scenes.PROTOCOL.max_depth
    rows, columns = np.nonzero(truth.valid[0].numpy() & (depth > near) & (depth < far))
    drawn = generator("point pairs", view.key).integers(len(rows), size=(DRAWN, 2))
    distance = depth[rows[drawn], columns[drawn]]  # (DRAWN, 2)
    drawn = drawn[distance.max(1) >= APART * distance.min(1)][:PAIRS]
    pairs = []
    for first, second in drawn.tolist():
        a, b = ((int(rows[i]), int(columns[i])) for i in (first, second))
        pairs.append(PointPair(a, b) if depth[a] < depth[b] else PointPair(b, a))
    return Points(tuple(pairs), (depth.shape[0], depth.shape[1]))


def _no_depth(key: str) -> NoReturn:
    raise ValueError(f"{key} has point pairs here, not depth: use the benchmark scenes for its depth")
