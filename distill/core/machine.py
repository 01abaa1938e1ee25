"""What this machine is, and has of what runs out first: shared memory, open files and disk. Read at call time."""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path

SHARED = Path("/dev/shm")  # where the processes that read hand batches over; 64 MB in a container, by default
LITTLE = 1 << 30
"""Bytes of shared memory below which a run of some size reads less ahead."""
PLENTY = 16 << 30
"""Bytes of shared memory above which nobody needs to know how large a batch is."""
ENOUGH_FILES = 4096
_OWN_FILES = 128  # of a process that reads: its tars, its pipes, its libraries


def shared_memory() -> int | None:
    """Free bytes of shared memory; None where the system has no such place."""
    try:
        return shutil.disk_usage(SHARED).free
    except OSError:
        return None


def has_shared_memory(size: int) -> bool:
    """Whether each of this machine's training processes may take so many bytes of it."""
    free = shared_memory()
    return free is not None and size * _processes() <= free


def _processes() -> int:
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def open_files() -> int | None:
    """How many files a process may hold open; None where the system does not say, or has no bound."""
    try:
        import resource
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def allow_open_files() -> None:
    """Lets this process hold as many files open as the system allows anybody without asking: a batch takes dozens."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def is_plentiful() -> bool:
    """Whether reading ahead takes nothing that could run out, whatever the batches."""
    memory, files = shared_memory(), open_files()
    return (memory is None or memory >= PLENTY) and (files is None or files >= ENOUGH_FILES)


def readers(workers: int, ahead: int, *, size: int, tensors: int) -> tuple[int, int, str]:
    """How many processes may read, how many batches each may have ready, and a line for people where it is fewer.

    workers, ahead: what is wanted. size, tensors: bytes of a batch and how many tensors it has, each an open file while
    it is handed over. The processes of one machine share its memory.
    """
    memory, files = shared_memory(), open_files()
    bounds = [] if memory is None else [(int(0.8 * memory / _processes()) // max(1, size), "memory")]
    bounds += [] if files is None else [((files - _OWN_FILES) // max(1, tensors), "files")]
    if not workers or not bounds:
        return workers, ahead, ""
    fits, scarce = min(bounds)
    fits -= 2  # one is being handed over, one is learnt from
    if fits >= workers * ahead:
        return workers, ahead, ""
    few, less = (workers, fits // workers) if fits >= workers else (max(0, fits), 1)
    free = f"{SHARED} has {(memory or 0) / 1e6:.0f} MB free" if scarce == "memory" else f"{files} files may be open"
    more = "docker run --shm-size=8g" if scarce == "memory" else "ulimit -n 4096"
    who = f"{few} of {workers} processes read, {less} ahead" if few else "the training process reads by itself, slower"
    line = f"{free}, a batch takes {size / 1e6:.0f} MB in {tensors} tensors: {who}, with the same result; {more} helps"
    return few, less, line


def free_disk(folder: Path) -> tuple[int, Path]:
    """Free bytes where `folder` is or will be, and the folder there that exists."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(place).free, place


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
