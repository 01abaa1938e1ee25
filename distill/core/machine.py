"""Facts about this machine and its scarce resources (shared memory, open files, disk), read at call time."""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY_DIR = Path("/dev/shm")  # through which workers hand over batches; 64 MB in a container by default
LOW_MEMORY = 1 << 30
"""Bytes of shared memory below which larger runs prefetch less."""
AMPLE_MEMORY = 16 << 30
"""Bytes of shared memory above which the size of a batch does not matter."""
ENOUGH_FILES = 4096
_OWN_FILES = 128  # files that a worker opens itself: tars, pipes, libraries


def shared_memory() -> int | None:
    """Free bytes of shared memory; None where the system has none."""
    try:
        return shutil.disk_usage(SHARED_MEMORY_DIR).free
    except OSError:
        return None


def has_shared_memory(size: int) -> bool:
    """Whether each training process of this machine may take `size` bytes of shared memory."""
    free = shared_memory()
    return free is not None and size * _processes() <= free


def _processes() -> int:
    return max(1, from_launcher("LOCAL_WORLD_SIZE", 1))


def from_launcher(name: str, otherwise: int) -> int:
    """A number of the environment that a launcher gives its processes; ValueError names the variable.

    Empty, as scripts leave it, and -1, as older launchers write it, count as not set.
    """
    text = os.environ.get(name, "").strip()
    if text in ("", "-1"):
        return otherwise
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} must be a number, as launchers set it, not {text!r}")
    return int(text)


def open_files() -> int | None:
    """The number of files a process may hold open; None where the system does not say or has no limit."""
    try:
        import resource
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def allow_open_files() -> None:
    """Raise this process's limit of open files to what the system allows without privileges: a batch takes dozens."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def is_plentiful() -> bool:
    """Whether prefetching cannot exhaust shared memory or open files, whatever the size of the batches."""
    memory, files = shared_memory(), open_files()
    return (memory is None or memory >= AMPLE_MEMORY) and (files is None or files >= ENOUGH_FILES)


def readers(workers: int, ahead: int, *, size: int, tensors: int) -> tuple[int, int, str]:
    """Return how many workers may run, how many batches each may prefetch, and a log line if that is fewer.

    workers, ahead: the requested numbers. size, tensors: bytes of a batch and its number of tensors, each an open file
    while it is handed over. The processes of one machine share its memory.
    """
    memory, files = shared_memory(), open_files()
    bounds: list[tuple[int, str, str]] = []  # batches that fit, what there is, what helps
    if files is not None:
        fits = (files - _OWN_FILES) // max(1, tensors)
        bounds.append((fits, f"{files} files may be open", "ulimit -n 4096"))
    if memory is not None:
        fits = int(0.8 * memory / _processes()) // max(1, size)
        bounds.append((fits, f"{SHARED_MEMORY_DIR} has {memory / 1e6:.0f} MB free", "docker run --shm-size=8g"))
    if not workers or not bounds:
        return workers, ahead, ""
    fits, free, tip = min(bounds, key=lambda bound: bound[0])
    fits -= 2  # one is being handed over, one is trained on
    if fits >= workers * ahead:
        return workers, ahead, ""
    max_workers, max_ahead = (workers, fits // workers) if fits >= workers else (max(0, fits), 1)
    note = (
        f"{max_workers} of {workers} processes read, {max_ahead} ahead"
        if max_workers
        else "the training process reads by itself, slower"
    )
    line = f"{free}, a batch takes {size / 1e6:.0f} MB in {tensors} tensors: {note}, with the same result; {tip} helps"
    return max_workers, max_ahead, line


def free_disk(folder: Path) -> tuple[int, Path]:
    """Return the free bytes where `folder` is or will be, and its nearest existing folder."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(existing).free, existing


def processor() -> str:
    """The CPU's name, as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return " ".join(next(models, platform.processor() or platform.machine()).split())


def device_name(device: str) -> str:
    """A readable name of a torch device: the GPU's name, or the CPU's with its threads."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device.startswith("cpu"):
        return f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{device} of {processor()}"


def software() -> str:
    """The versions of this project, PyTorch and Python."""
    import torch

    import distill

    return f"distill {distill.__version__}, torch {torch.__version__}, Python {platform.python_version()}"


def usable_device(device: str) -> str:
    """Return the device that "auto" selects, or `device`; raises ValueError if it cannot be used."""
    import torch

    chosen = best_device() if device == "auto" else device
    try:
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch that was built without CUDA
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"device {chosen!r} cannot be used here: {reason}; give auto, cpu, cuda, cuda:1 or mps"
        ) from error
    return chosen


def best_device() -> str:
    """The device that "auto" selects: CUDA, then Apple's GPU, then the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
