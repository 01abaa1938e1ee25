"""What this machine is, and has of what runs out first: shared memory, open files. Read at call time, never changed."""

from __future__ import annotations

import os
import platform
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


def processor() -> str:
    """The CPU's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return " ".join(next(named, platform.processor() or platform.machine()).split())


def device_name(device: str) -> str:
    """What a torch device is, for people: a card's name, or the CPU's with its threads."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device.startswith("cpu"):
        return f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{device} of {processor()}"


def software() -> str:
    """This project's version, and PyTorch's and Python's."""
    import torch

    import distill

    return f"distill {distill.__version__}, torch {torch.__version__}, Python {platform.python_version()}"


def usable_device(device: str) -> str:
    """The device that "auto" means, or `device`; ValueError where it cannot be used."""
    import torch

    on = _device() if device == "auto" else device
    try:
        torch.zeros(1, device=on).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch that was built without CUDA
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"device {on!r} cannot be used here: {reason}; give auto, cpu, cuda, cuda:1 or mps") from error
    return on


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
