"""The host's part of a loss on a card, measured without a card: microseconds a call, and in which code they go.

    python -m tests.speed.host                    # ours, and a masked L1 in the same run
    python -m tests.speed.host --objective        # also the whole objective with nine patches per region
    python -m tests.speed.host --functions hybrid # also the functions that take the most of one row

On a card eager losses are bound by the host: Python, torch's dispatcher, autograd and Triton's launcher. All of that
runs here as on a card, except

    - CUDA's driver: a libcuda of a few lines, compiled here (it needs a C compiler), whose calls return at once. What
      the driver itself takes is absent: some microseconds a launch, more of a cooperative one.
    - torch's kernels and memory: tensors lie on the CPU and are tiny, so torch's operations take a CPU's allocator and
      short loops in place of the caching allocator and cudaLaunchKernel. A masked L1 has 15 kernels of torch, ours 3
      beside their own, so it lacks more than ours do.
    - autograd's thread: backward runs in the thread that asks, on a card in one of its own after a hand-over.
    - entering a device: `torch.cuda.device_of` does nothing for a tensor on the CPU.

The numbers say which code of ours costs how much, before and after a change, on one machine. They are no card's times,
and ratios to a masked L1 are not those of a card. Kernels are compiled for an H100 once (a minute, then from Triton's
cache) and never run, so all values are meaningless.

Columns: microseconds of processor time of forward with backward, the minimum over repeats of a mean over calls; of the
forward pass alone; both passes if our launches did nothing, and if Triton's did, so that differences are what our
launcher and Triton's take; the shares of a profile, which inflates many short calls: code in `distill`, in Triton, in
autograd with its C++, and all else, mostly torch's operations; calls of the driver: launches, and pointers looked up.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import pstats
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SOURCE = """
#include <stdint.h>
int launches, pointers;
int cuLaunchKernelEx(void *how, void *f, void **args, void **extra) { launches++; return 0; }
int cuLaunchKernel() { launches++; return 0; }
int cuPointerGetAttribute(void *data, int what, uint64_t p) { pointers++; *(uint64_t *)data = p; return 0; }
int cuCtxGetCurrent(void **context) { *context = &launches; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "no card"; return 0; }
"""
UNUSED = (
    "cuInit", "cuDeviceGet", "cuDeviceGetCount", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent",
    "cuCtxGetDevice", "cuModuleLoadData", "cuModuleGetFunction", "cuModuleUnload", "cuFuncGetAttribute",
    "cuFuncSetAttribute", "cuFuncSetCacheConfig", "cuStreamIsCapturing", "cuOccupancyMaxActiveClusters",
    "cuCtxGetLimit", "cuCtxSetLimit", "cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col", "cuDriverGetVersion",
)  # fmt: skip


def driver_of(folder: Path) -> ctypes.CDLL:
    """Loads a libcuda that does nothing for Triton's launcher; its counters are `launches` and `pointers`."""
    library = folder / "libcuda.so.1"
    text = SOURCE + "".join(f"int {name}() {{ return 0; }}\n" for name in UNUSED)
    (folder / "cuda.c").write_text(text)
    subprocess.run(["cc", "-w", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library,
                    folder / "cuda.c"], check=True)  # fmt: skip
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def card_of(folder: Path) -> tuple[Any, ctypes.CDLL]:
    """Triton's own driver of an H100, with its compiled launcher, above a libcuda that does nothing."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    counters = driver_of(folder)
    knobs.nvidia.libcuda_path = str(folder)
    knobs.cache.dir = str(Path(knobs.cache.dir) / "without_card")  # its launcher is linked with this libcuda

    class Card(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.utils.load_binary = lambda *given: (1, 1, 0, 0, 1024)
            self.utils.unload_module = lambda module: None
            self.utils.get_device_properties = lambda device: {"max_shared_mem": 227 * 1024}

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    return Card(), counters


@contextmanager
def pretended(folder: Path) -> Iterator[ctypes.CDLL]:
    """Inside, losses of tensors on the CPU take the way of a card's down to the driver; yields its counters."""
    import triton

    from distill.losses import fused

    card, counters = card_of(folder)
    triton.runtime.driver.set_active(card)
    with mock.patch.multiple(
        fused, has_kernels=lambda values: values.dtype == torch.float32, _trusted=lambda *given: True
    ):  # fmt: skip
        yield counters


Call = Callable[[], object]


def cases(images: int, side: int, objective: bool) -> dict[str, tuple[Call, Call]]:
    """The forward pass, and with the backward pass, by name."""
    from distill.losses.losses import compare, gradient_loss
    from distill.losses.objective import Objective
    from tests.speed.losses import labels_of, masked_l1

    pred = torch.rand(images, side, side, requires_grad=True)
    target, valid, weight = torch.rand(images, side, side), torch.rand(images, side, side) > 0.1, torch.rand_like(pred)

    def both() -> torch.Tensor:
        found = compare(pred, target, valid, "hybrid")
        return found.loss + 2.0 * gradient_loss(pred, target, valid, whole_image=found.whole_image)

    forward: dict[str, Callable[[], torch.Tensor]] = {
        "masked L1": lambda: masked_l1(pred, target, valid),
        "hybrid": lambda: compare(pred, target, valid, "hybrid").loss,
        "hybrid, trimmed": lambda: compare(pred, target, valid, "hybrid", trim_top=0.1).loss,
        "hybrid, weighted": lambda: compare(pred, target, valid, "hybrid", weight=weight).loss,
        "global": lambda: compare(pred, target, valid, "global").loss,
        "gradient": lambda: gradient_loss(pred, target, valid),
        "hybrid + gradient": both,
    }
    if objective:
        labels, learnt = labels_of(target, valid, 3), Objective()
        forward["objective"] = lambda: learnt(pred, labels)[0]
    return {name: (loss, lambda loss=loss: torch.autograd.grad(loss().mean(), pred)) for name, loss in forward.items()}


def microseconds(call: Call, calls: int, repeats: int) -> float:
    """Processor time of one call: the least mean of many short repeats, so that other load on the machine matters
    little.
    """
    for _ in range(5):
        call()
    best = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(calls):
            call()
        best = min(best, (time.thread_time() - start) / calls)
    return 1e6 * best


def without(what: str) -> Any:
    """Our launches do nothing, or Triton's."""
    from distill.core.launch import Launcher

    if what == "ours":
        return mock.patch.object(Launcher, "__call__", lambda self, *given: None)
    from triton.backends.nvidia.driver import CudaLauncher

    return mock.patch.object(CudaLauncher, "__call__", lambda self, *given: None)


def owner(file: str, function: str) -> str:
    """Whose code it is."""
    if "/distill/" in file:
        return "ours"
    if "/triton/" in file or "triton" in function or "cuda_utils" in function or "launch" in function:
        return "Triton"
    return "autograd" if "autograd" in file or "run_backward" in function or "of autograd" in function else "torch"


def profile(call: Call, calls: int) -> pstats.Stats:
    """A profile of this many calls."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        call()
    profiler.disable()
    return pstats.Stats(profiler)


def shares(stats: pstats.Stats) -> Counter[str]:
    """The share of each owner's code."""
    spent: Counter[str] = Counter()
    for (file, _, function), (_, _, own, _, _) in stats.stats.items():  # type: ignore[attr-defined]
        spent[owner(file, function)] += own
    total = sum(spent.values())
    return Counter({name: seconds / total for name, seconds in spent.items()})  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--side", type=int, default=16, help="small, so that a CPU's arithmetic takes no time")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=150)
    parser.add_argument("--objective", action="store_true")
    parser.add_argument("--functions", metavar="ROW", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, pretended(Path(folder)) as counters:
        names = (
            "both",
            "forward",
            "no ours",
            "no Triton",
            "ours",
            "Triton",
            "autograd",
            "torch",
            "launches",
            "looked up",
        )
        print(f"{'host, us a call':18}" + "".join(f"{name:>10}" for name in names))
        for name, (forward, call) in cases(given.images, given.side, given.objective).items():
            how = (given.calls, given.repeats)
            times = [microseconds(call, *how), microseconds(forward, *how)]
            for what in ("ours", "Triton"):
                with without(what):
                    times.append(microseconds(call, *how))
            counts = [ctypes.c_int.in_dll(counters, each) for each in ("launches", "pointers")]
            before = [count.value for count in counts]
            call()
            made = [count.value - b for count, b in zip(counts, before, strict=True)]
            stats = profile(call, 10 * given.calls)
            share = shares(stats)
            print(f"{name:18}" + "".join(f"{t:10.1f}" for t in times) + "".join(
                f"{100 * share[each]:9.0f}%" for each in ("ours", "Triton", "autograd", "torch")
            ) + "".join(f"{n:10d}" for n in made), flush=True)  # fmt: skip
            if given.functions == name:
                stats.sort_stats("tottime").print_stats(32)


if __name__ == "__main__":
    main()
