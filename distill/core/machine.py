"""What this machine has of what runs out first: shared memory and open files. Read at call time; nothing is changed."""

from __future__ import annotations

import shutil
from pathlib import Path

SHARED = Path("/dev/shm")  # where the processes that read hand batches over; 64 MB in a container, by default
LITTLE, SCARCE = 1 << 30, 1 << 28
"""Bytes of shared memory below which little is read ahead, and below which no other process reads at all."""


def shared_memory() -> int | None:
    """Free bytes of shared memory; None where the system has no such place."""
    try:
        return shutil.disk_usage(SHARED).free
    except OSError:
        return None


def open_files() -> int | None:
    """How many files a process may hold open; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def readers(workers: int) -> tuple[int, str]:
    """How many processes may read, of `workers` that are wanted, and a line for people where it is fewer."""
    free = shared_memory()
    if not workers or free is None or free >= SCARCE:
        return workers, ""
    return 0, (
        f"{SHARED} has {free / 1e6:.0f} MB free, too few for train.workers = {workers}: the training process reads by "
        "itself, slower, with the same result; give the container more (docker run --shm-size=8g)"
    )
