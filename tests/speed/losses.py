"""What the hybrid loss costs beside the plain ways: seconds and peak memory of a forward and backward pass.

    python -m tests.speed.losses                    # 8 maps of 560 x 560, in as many threads as torch takes
    python -m tests.speed.losses --batch 4 --threads 1

    hybrid        distillation_loss(..., "hybrid")
    local, global the other normalizations
    nanmedians    hybrid as HDN's released code goes about it: a copy of prediction and label for each of the seven
                  contexts, NaN outside it, one nanmedian along the copies, autograd through everything
    plain global  median, mean deviation and L1 of the whole image with masked copies, autograd
    masked L1     the mean absolute difference, autograd

Each variant runs in a process of its own: the memory is the process's peak above what it held before the first call.
Time is the least of several calls, after one that warms up. Variants take turns, so that whatever else the machine
does falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from distill.losses.losses import distillation_loss

LEVELS = (4, 2, 1)


def example(batch: int, size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth labels with edges and a tenth of their pixels invalid, and a student that is nearly right."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 1, 24, 24, generator=draw)
    target = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")[:, 0]
    target = target + 0.02 * torch.rand(target.shape, generator=draw)
    pred = target + 0.1 * torch.randn(target.shape, generator=draw)
    valid = torch.rand(target.shape, generator=draw) > 0.1
    return pred.to(device).requires_grad_(), target.to(device), valid.to(device)


def nanmedians(pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Hybrid with a masked copy per context."""
    blank = torch.full_like(target, torch.nan)
    low = torch.where(valid, target, torch.inf).flatten(1).amin(1)[:, None, None]
    high = torch.where(valid, target, -torch.inf).flatten(1).amax(1)[:, None, None]
    masks = []
    for level in LEVELS:
        for k in range(level):
            a, b = low + (high - low) * k / level, low + (high - low) * (k + 1) / level
            masks.append(valid & (target >= a) & (target < b))
    inside = torch.stack(masks)

    def normalized(values: Tensor) -> Tensor:
        copies = torch.where(inside, values[None].expand(len(masks), *values.shape), blank[None])
        median = copies.flatten(2).nanmedian(2).values.nan_to_num()
        centred = torch.where(inside, values[None] - median[..., None, None], 0.0)
        scale = centred.abs().sum((-2, -1)) / (inside.sum((-2, -1)) + 1)
        return centred / (scale + 1e-6)[..., None, None]

    difference = (normalized(pred) - normalized(target)).abs()
    each = torch.where(inside, difference, 0.0).sum(0) / inside.sum(0).clamp(min=1)
    return each.sum((-2, -1)) / valid.sum((-2, -1))


def plain_global(pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """One context, by copies."""

    def normalized(values: Tensor) -> Tensor:
        median = torch.where(valid, values, torch.nan).flatten(1).nanmedian(1).values
        centred = values - median[:, None, None]
        scale = torch.where(valid, centred.abs(), 0.0).sum((-2, -1)) / valid.sum((-2, -1))
        return centred / scale[:, None, None]

    return torch.where(valid, (normalized(pred) - normalized(target)).abs(), 0.0).sum((-2, -1)) / valid.sum((-2, -1))


def masked_l1(pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, (pred - target).abs(), 0.0).sum((-2, -1)) / valid.sum((-2, -1))


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "hybrid": lambda p, t, v: distillation_loss(p, t, v, "hybrid"),
    "local": lambda p, t, v: distillation_loss(p, t, v, "local"),
    "global": lambda p, t, v: distillation_loss(p, t, v, "global"),
    "nanmedians": nanmedians,
    "plain global": plain_global,
    "masked L1": masked_l1,
}


def peak_mb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(name: str, batch: int, size: int, threads: int, device: str) -> None:
    """One variant, in its own process: times itself whenever a line comes in."""
    if threads:
        torch.set_num_threads(threads)
    # Autograd's threads and first allocations belong to no variant.
    torch.ones(8, requires_grad=True).square().sum().backward()
    loss, (pred, target, valid) = VARIANTS[name], example(batch, size, device)

    def once() -> float:
        pred.grad = None
        start = time.perf_counter()
        loss(pred, target, valid).mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    before = peak_mb(device)
    once()
    print(json.dumps(peak_mb(device) - before), flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=560)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0: as it likes")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.serve:
        serve(given.serve, given.batch, given.size, given.threads, device)
        return
    common = ["--batch", str(given.batch), "--size", str(given.size), "--threads", str(given.threads)]
    workers, memory, seconds = {}, {}, {name: torch.inf for name in VARIANTS}
    for name in VARIANTS:
        command = [sys.executable, "-m", "tests.speed.losses", "--serve", name, *common]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert worker.stdin and worker.stdout
        workers[name], memory[name] = worker, json.loads(worker.stdout.readline())
    for _ in range(given.repeats):
        for name, worker in workers.items():
            assert worker.stdin and worker.stdout
            worker.stdin.write("\n")
            worker.stdin.flush()
            seconds[name] = min(seconds[name], json.loads(worker.stdout.readline()))
    for worker in workers.values():
        assert worker.stdin
        worker.stdin.close()
        worker.wait()
    threads = given.threads or torch.get_num_threads()
    print(f"{device}, {threads} threads, {given.batch} maps of {given.size} x {given.size}, forward and backward")
    for name in VARIANTS:
        print(
            f"{name:14} {seconds[name] * 1e3:8.1f} ms  {memory[name]:7.1f} MB   "
            f"time: 1/{seconds['nanmedians'] / seconds[name]:.1f} of nanmedians, "
            f"{seconds[name] / seconds['plain global']:.2f} x plain global, "
            f"{seconds[name] / seconds['masked L1']:.2f} x masked L1;  "
            f"memory: {memory[name] / memory['nanmedians']:.3f} of nanmedians"
        )


if __name__ == "__main__":
    main()
