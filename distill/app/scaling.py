"""What more GPUs in one machine would bring, from a probe on one: either the GPUs or the CPU cores are the bottleneck.

A GPU has a rate of its own; reading, cutting and encoding run on the CPU. With n GPUs the rate is the smaller of
n / (GPU seconds) and cores / (CPU seconds) per sample: an upper bound, which ignores waiting, disk and network.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence

from distill.core.crop_settings import CropSettings
from distill.core.findings import Finding
from distill.data.sources import Photo
from distill.labelling.jobs import prepare
from distill.shards.codec import Sample, decode_sample, encode_sample

GPUS = (1, 2, 4, 8)


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def labelling_seconds(photo: Photo, sample: Sample, crops: CropSettings, codec: str) -> float:
    """CPU seconds of a sample besides the teachers: cutting and encoding, the photo being decoded already."""
    return _processor_seconds(lambda: (prepare(photo, crops=crops), encode_sample(sample, codec=codec)))


def reading_seconds(sample: Sample, codec: str, teachers: Sequence[str]) -> float:
    """CPU seconds that training spends on reading a sample from its shard."""
    members = {name.removeprefix(f"{sample.key}."): data for name, data in encode_sample(sample, codec=codec)}
    return _processor_seconds(lambda: decode_sample(members, where="probe", teachers=teachers[:1], coded=True))


def rates(card: float, processor: float, cores: int) -> list[tuple[int, float, bool]]:
    """(GPUs, samples/s, whether the cores are the bottleneck) of GPUS, from the GPU and CPU seconds per sample."""
    by_cores = cores / processor if processor > 0 else math.inf
    return [(n, min(n / card, by_cores), by_cores < n / card) for n in GPUS]


def finding(what: str, card: float, processor: float, cores: int, codec: str) -> Finding:
    """One line of doctor: the rate on 1, 2, 4 and 8 GPUs, and from which number on the cores are the bottleneck.

    card, processor: GPU and CPU seconds per sample. cores: of this machine. codec: the labels'.
    """
    table_rows = rates(card, processor, cores)
    table = ", ".join(f"{n}: {rate:.1f}" for n, rate, _ in table_rows)
    line = f"{what}, most samples/s by number of GPUs here: {table}"
    line += f" (a sample takes {card * 1e3:.0f} ms of a GPU and {processor * 1e3:.0f} ms of {cores} cores)"
    short = next((n for n, _, starved in table_rows if starved), None)
    if short is None:
        return Finding("ok", line)
    needed_cores = math.ceil(short / card * processor)
    if short > 1:
        return Finding("ok", f"{line}; with {short} GPUs or more the cores are the bottleneck")
    cheaper = "" if codec == "zst" else ', and labels.codec = "zst" needs fewer'
    return Finding(
        "warn", f"{line}; the cores are the bottleneck from 1 GPU on", f"{needed_cores} cores keep 1 busy{cheaper}"
    )
