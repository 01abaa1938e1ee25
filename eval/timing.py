"""The run time of a model for one image: the median of many calls after warm-up, each synchronized.

FiffDepth's Table 3 gives the mean over 100 images of 512 x 512 pixels on a Titan RTX, at every method's default
settings; the median, which is ours, is robust against short disturbances by other work on the machine.
"""

from __future__ import annotations

import statistics
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.core.wording import counted

WARM_UP, CALLS = 3, 20


@dataclass(frozen=True, slots=True)
class RunTime:
    """Seconds for one image of size x size pixels: the median of `calls`, and the fastest and slowest of them."""

    size: int
    seconds: float
    fastest: float
    slowest: float
    calls: int
    device: str


@dataclass(frozen=True, slots=True)
class PaperRunTime:
    """A published run time. device: as the paper names it."""

    paper: str
    where: str
    model: str
    size: int
    seconds: float
    device: str


def run_time(predict: Callable[[Tensor], Any], size: int, device: torch.device, *, calls: int = CALLS) -> RunTime:
    """Time `predict` on one noise image (1,3,size,size) in host memory, returning its map included."""
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))

    def call() -> float:
        start = time.perf_counter()
        predict(image)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        call()
    seconds = sorted(call() for _ in range(calls))
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    )
    return RunTime(size, statistics.median(seconds), seconds[0], seconds[-1], calls, name)


@cache
def paper_run_times() -> tuple[PaperRunTime, ...]:
    """Every run time of eval/papers.toml."""
    content = tomllib.loads(Path(__file__).with_name("papers.toml").read_text(encoding="utf-8"))
    return tuple(
        PaperRunTime(table["paper"], table["number"], row["model"], table["size"], row["seconds"], table["device"])
        for table in content["run_time"]
        for row in table["row"]
    )
