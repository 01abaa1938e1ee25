"""Mattes as ground truth: photographs with a foreground matte exact to the hair, and without depth.

Scored by Depth Pro's boundary recall: an edge of the matte must be an edge of the predicted depth at the same pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from distill.eval.benchmarks import BenchmarkSample, prediction_path
from distill.eval.benchmarks._files import Files, published
from distill.eval.benchmarks._layouts import FileLayout
from distill.eval.protocol import Protocol


def matte_protocol(benchmark: str) -> Protocol:
    """The protocol of scoring mattes. Source: Depth Pro (Bochkovskii et al. 2024), Sec. 3.2."""
    return Protocol(
        benchmark=benchmark,
        truth="matte",
        mask="every pixel; foreground where the matte is above 0.1",
        task="boundary_recall",
    )


def matte_samples(
    root: Path | str | None,
    list_file: Path | str | None,
    *,
    protocol: Protocol,
    layout: FileLayout,
    group: Callable[[str], str] = lambda _: "",
) -> list[BenchmarkSample]:
    """A sample for every (photograph, matte) of the layout."""
    files, rows = published(root, list_file, protocol=protocol, layout=layout)
    return [
        BenchmarkSample(
            rgb,
            prediction_path(rgb),
            partial(files.rgb, rgb),
            partial(_no_depth, rgb),
            group(rgb),
            mark=partial(_alpha, files, matte),
        )
        for rgb, matte in rows
    ]


def _no_depth(rgb: str) -> NoReturn:
    raise ValueError(f"{rgb} has a matte and no depth")


def _alpha(files: Files, name: str) -> Tensor:
    """(1,H,W) float32 in [0,1]. Some mattes are stored with three equal channels, or with 16 bits."""
    values = files.pixels(name)
    values = values[..., 0] if values.ndim == 3 else values
    white = 65535.0 if values.dtype.itemsize > 1 else 1.0 if values.dtype == bool else 255.0
    return torch.from_numpy(values.astype(np.float32) / np.float32(white))[None]
