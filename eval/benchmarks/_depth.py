"""What benchmarks with files of true depth share: their samples, and the protocol of those that score its edges."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from distill.core.depth import DepthMap
from distill.eval.benchmarks import BenchmarkSample, prediction_path
from distill.eval.benchmarks._files import Files, published
from distill.eval.benchmarks._layouts import FileLayout
from distill.eval.protocol import Protocol


def depth_samples(
    root: Path | str | None,
    list_file: Path | str | None,
    *,
    protocol: Protocol,
    layout: FileLayout,
    truth: Callable[..., DepthMap],
    image: Callable[[Files, str], Tensor] = Files.rgb,
    group: Callable[[str], str] = lambda _: "",
) -> list[BenchmarkSample]:
    """A sample for every row of the layout; truth: (files, *the row's files after the rgb) -> its depth."""
    files, rows = published(root, list_file, protocol=protocol, layout=layout)
    return [
        BenchmarkSample(
            rgb, prediction_path(rgb), partial(image, files, rgb), partial(truth, files, *others), group(rgb)
        )
        for rgb, *others in rows
    ]


def edge_protocol(benchmark: str, *, farthest: float, mask: str, resize: str = "") -> Protocol:
    """The protocol of scoring edges, Depth Pro's boundary F1. farthest: metres up to which the truth is fitted.

    The published metric has neither mask nor alignment. Here edges count between two pixels with a truth, and a kind
    with an unknown shift is fitted to the truth first (least squares in its own quantity, over the truth inside the
    protocol's range), because the ratios that define an edge depend on a shift, though not on a scale; both are ours.
    """
    return Protocol(
        benchmark=benchmark,
        max_depth=farthest,
        mask=f"edges between two pixels of: {mask}",
        resize=resize or "none: the prediction has the truth's size",
        task="boundary_f1",
    )
