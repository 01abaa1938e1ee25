"""Benchmarks that score the edges of true depth: Depth Pro's boundary F1.

The published metric has neither mask nor alignment. Here edges count between two pixels with a truth, and a kind with
an unknown shift is fitted to the truth first (least squares in its own quantity, over the truth inside the range of the
protocol), because the ratios that define an edge do not depend on a scale but do on a shift; both choices are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from distill.core.depth import DepthMap
from distill.eval.benchmarks import BenchmarkSample, prediction_path
from distill.eval.benchmarks._files import Files, published
from distill.eval.benchmarks._layouts import FileLayout, ListRow
from distill.eval.protocol import Protocol


def edge_protocol(benchmark: str, *, farthest: float, mask: str, resize: str = "") -> Protocol:
    """The protocol of scoring edges. farthest: the depth in metres up to which the truth is fitted."""
    return Protocol(
        benchmark=benchmark,
        max_depth=farthest,
        mask=f"edges between two pixels of: {mask}",
        resize=resize or "none: the prediction has the truth's size",
        task="boundary_f1",
    )


def edge_samples(
    root: Path | str | None,
    list_file: Path | str | None,
    *,
    protocol: Protocol,
    layout: FileLayout,
    truth: Callable[[Files, ListRow], DepthMap],
    group: Callable[[str], str] = lambda _: "",
) -> list[BenchmarkSample]:
    """A sample for every row of the layout; truth: (files, row) -> its depth."""
    files, rows = published(root, list_file, protocol=protocol, layout=layout)
    return [
        BenchmarkSample(
            row[0], prediction_path(row[0]), partial(files.rgb, row[0]), partial(truth, files, row), group(row[0])
        )
        for row in rows
    ]
