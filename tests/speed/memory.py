"""Peak memory of a pass: of the GPU if there is one, else of this process (Linux)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


def used() -> float:
    """MiB in use now."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    return _status("VmRSS")


def forget_peak() -> None:
    """Reset the peak: `peak` is from now on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but not returned to the system would count
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Highest MiB in use since `forget_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {key}")
