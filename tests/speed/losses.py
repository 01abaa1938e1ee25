"""Cost of the losses against plain implementations, forward and backward; on a card also checks of their numbers.

    python -m tests.speed.losses                    # 8 maps of 560 x 560; on a CPU with torch's number of threads
    python -m tests.speed.losses --batch 4 --threads 1
    python -m tests.speed.losses --profile          # on a card: also the time of every kernel
    python -m tests.speed.losses --compile NAME     # on a card: NAME once, so that its kernels are in Triton's cache

    hybrid        distillation_loss(..., "hybrid")
    local, global the other normalizations
    gradient      gradient_loss(...)
    nanmedians    hybrid as in HDN's released code: a copy of prediction and label for each of the seven contexts, NaN
                  outside it, one nanmedian along the copies, autograd through everything
    plain global  median, mean deviation and L1 of the whole image with masked copies, autograd
    masked L1     the mean absolute difference, autograd

On a CPU each variant runs in a separate process: memory is the process's peak above its use before the first call.
Time is the minimum of several calls, after a warm-up; variants alternate, so that other load on the machine affects all
of them.

On a card more rows follow: options of hybrid, hybrid and gradient loss with shared statistics, the objective with nine
patches per image, the log's statistics, and the torch code that the kernels replace. Columns: the card's time in eager
mode and replayed from a CUDA graph (medians), the sum of its kernels, the host's launch time, peak memory. Then what
each launch costs the host; and the numbers: the kernels' and the torch code's against the torch code in float64, and
whether two runs gave the same bits. Kernels that fail raise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from distill.core import launch
from distill.core.crops import sample_boxes
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Labels
from distill.losses import fused
from distill.losses.losses import compare, distillation_loss, gradient_loss
from distill.losses.objective import Objective
from distill.training.trainlog import map_statistics

LEVELS = (4, 2, 1)


def example(batch: int, size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth labels with edges, a tenth of their pixels invalid, and a prediction with small errors."""
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
    "gradient": gradient_loss,
    "nanmedians": nanmedians,
    "plain global": plain_global,
    "masked L1": masked_l1,
}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(name: str, batch: int, size: int, threads: int) -> None:
    """One variant, in its own process: runs and times it once per input line."""
    if threads:
        torch.set_num_threads(threads)
    # Exclude autograd's threads and first allocations from the variant's memory.
    torch.ones(8, requires_grad=True).square().sum().backward()
    loss, (pred, target, valid) = VARIANTS[name], example(batch, size, "cpu")

    def once() -> float:
        pred.grad = None
        start = time.perf_counter()
        loss(pred, target, valid).mean().backward()
        return time.perf_counter() - start

    before = peak_mb()
    once()
    print(json.dumps(peak_mb() - before), flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()), flush=True)


Case = Callable[[], object]
WARM = 5
NO_GRAPH = ("nanmedians", "plain global", "objective")


@contextlib.contextmanager
def by_torch() -> Iterator[None]:
    """Inside, the torch code is used instead of the kernels."""
    original, fused.has_kernels = fused.has_kernels, lambda values: False
    yield
    fused.has_kernels = original


def labels_of(target: Tensor, valid: Tensor, patches: int) -> Labels:
    """The maps as labels of regions, with patches x patches overlapping patches of 0.4 of the side, cut from them."""
    starts = [i * (1 - 0.4) / max(patches - 1, 1) for i in range(patches)]
    boxes = torch.tensor([[top, left, top + 0.4, left + 0.4] for top in starts for left in starts])
    boxes = boxes.to(target).expand(len(target), -1, -1).contiguous()
    patch_values, _ = sample_boxes(target, boxes, target.shape[-1])
    inside, _ = sample_boxes(valid.float(), boxes, target.shape[-1])
    kind = Kind.AFFINE_DISPARITY
    local = DepthMap(patch_values.flatten(0, 1), inside.flatten(0, 1) > 0.5, kind)
    return Labels(DepthMap(target, valid, kind), local, boxes)


def card_cases(pred: Tensor, target: Tensor, valid: Tensor) -> dict[str, Case]:
    """The calls to time on a card, by name; each is a forward and a backward pass."""
    maps, weight = (target, valid), torch.rand_like(target)
    labels = labels_of(target, valid, 3)

    def differentiated(loss: Callable[..., Tensor]) -> Case:
        return lambda: torch.autograd.grad(loss(pred, *maps).mean(), pred)

    def shared(p: Tensor, t: Tensor, v: Tensor) -> Tensor:
        comparison = compare(p, t, v, "hybrid")
        return comparison.loss + 2.0 * gradient_loss(p, t, v, whole_image=comparison.whole_image)

    def torch_code(loss: Callable[..., Tensor]) -> Case:
        def call() -> None:
            with by_torch():
                differentiated(loss)()

        return call

    def for_the_log() -> object:
        return map_statistics(pred), map_statistics(target, valid)

    cases = {name: differentiated(loss) for name, loss in VARIANTS.items()}
    card_only = {
        "hybrid, trimmed": lambda p, t, v: distillation_loss(p, t, v, "hybrid", trim_top=0.1),
        "hybrid, weighted": lambda p, t, v: distillation_loss(p, t, v, "hybrid", weight=weight),
        "hybrid, label only": lambda p, t, v: distillation_loss(p, t, v, "hybrid", label_only=True),
        "hybrid + gradient": shared,
        "objective": lambda p, t, v: Objective()(p, labels)[0],
    }
    cases |= {name: differentiated(loss) for name, loss in card_only.items()} | {"log": for_the_log}
    return cases | {f"{n}, by torch": torch_code(VARIANTS[n]) for n in ("hybrid", "gradient")}


def card_time(call: Case, repeats: int = 60) -> tuple[float, float, float]:
    """Median milliseconds of the card and of the host for one call, and peak memory above that in use before, in MB."""
    for _ in range(WARM):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    memory_before = torch.cuda.memory_allocated()
    marks, host = [], []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun = time.perf_counter()
        first.record()
        call()
        last.record()
        host.append((time.perf_counter() - begun) * 1e3)
        marks.append((first, last))
    torch.cuda.synchronize()
    card = statistics.median(first.elapsed_time(last) for first, last in marks)
    return card, statistics.median(host), (torch.cuda.max_memory_allocated() - memory_before) / 2**20


def graph_time(call: Case, repeats: int = 60) -> float:
    """Median milliseconds of one replay from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return card_time(graph.replay, repeats)[0]


def kernel_time(call: Case, calls: int = 5) -> float:
    """Milliseconds that the card's kernels take in one call, without the gaps between them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / calls / 1e3


def host_times(call: Case, calls: int = 60) -> str:
    """Microseconds of the host in one call: in each kernel's launches, and in all."""
    spent: Counter[str] = Counter()
    launched = launch.Launcher.__call__

    def timed(self: launch.Launcher, *given: Any) -> None:
        start = time.perf_counter()
        launched(self, *given)
        spent[self.kernel.__name__] += time.perf_counter() - start

    launch.Launcher.__call__ = timed  # type: ignore[method-assign]
    try:
        _, host, _ = card_time(call, calls)
    finally:
        launch.Launcher.__call__ = launched  # type: ignore[method-assign]
    each = ", ".join(f"{name} {1e6 * seconds / (calls + WARM):.0f}" for name, seconds in spent.items())
    return f"launches: {each}; all {1e3 * host:.0f}"


def card_numbers(pred: Tensor, target: Tensor, valid: Tensor) -> None:
    """Prints the errors of the kernels and of the torch code against float64, and whether two runs are bit-equal."""
    weight = torch.rand_like(target)
    options = [{}, {"trim_top": 0.1}, {"label_only": True}, {"weight": weight}]
    losses = {
        f"{name} {' '.join(o)}": lambda p, t, v, name=name, o=o: distillation_loss(p, t, v, name, **o)
        for name in ("hybrid", "local", "global")
        for o in options
    }
    losses |= {"gradient": gradient_loss, "gradient raw": functools.partial(gradient_loss, normalize=False)}
    print(f"\n{'against float64':24}{'loss':>11}{'gradient':>11}   torch: {'loss':>11}{'gradient':>11}   two runs")
    for name, loss in losses.items():

        def run(dtype: torch.dtype, loss: Callable[..., Tensor] = loss) -> tuple[Tensor, Tensor]:
            x = pred.detach().to(dtype).requires_grad_()
            values = loss(x, target.to(dtype), valid)
            return values.detach().double(), torch.autograd.grad(values.sum(), x)[0].double()

        truth, ours, again = run(torch.float64), run(torch.float32), run(torch.float32)
        with by_torch():
            plain = run(torch.float32)
        errors = [float((a - b).norm() / b.norm()) for out in (ours, plain) for a, b in zip(out, truth, strict=True)]
        same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        print(f"{name:24}{errors[0]:11.1e}{errors[1]:11.1e}          {errors[2]:11.1e}{errors[3]:11.1e}   "
              f"{'equal bits' if same else 'DIFFER'}")  # fmt: skip


def on_card(given: argparse.Namespace) -> None:
    """All measurements on a card, in one process."""
    fused.raise_faults = True
    maps = example(given.batch, given.size, "cuda")
    cases = card_cases(*maps)
    if given.compile:
        cases[given.compile]()
        torch.cuda.synchronize()
        return
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {given.batch} maps of {given.size} x {given.size}"
    )
    rows = {
        name: card_time(call, 12 if "torch" in name or name == "nanmedians" else 60) for name, call in cases.items()
    }
    print(f"{'':20}{'ms':>8}{'graph':>8}{'kernels':>8}{'host':>8}{'MB':>8}   x masked L1, of nanmedians")
    for name, (card, host, memory) in rows.items():
        graph = math.nan if "torch" in name or name in NO_GRAPH else graph_time(cases[name])
        ratios = f"{card / rows['masked L1'][0]:8.2f} x   1/{rows['nanmedians'][0] / card:.1f}"
        print(
            f"{name:20}{card:8.3f}{graph:8.3f}{kernel_time(cases[name]):8.3f}{host:8.3f}{memory:8.1f}   {ratios}",
            flush=True,
        )
    print("\nthe host, us a call")
    for name in ("masked L1", "global", "hybrid", "gradient", "hybrid + gradient", "objective"):
        print(f"{name:20}{host_times(cases[name])}", flush=True)
    card_numbers(*maps)
    if given.profile:
        for name in ("hybrid", "gradient", "hybrid, trimmed"):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(10):
                    cases[name]()
                torch.cuda.synchronize()
            print(f"\n{name}")
            for event in sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:16]:
                each, times = event.self_device_time_total / 10, event.count / 10
                print(f"{each:9.1f} us a call, {times:4.1f} launches   {event.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=560)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0: as it likes")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="on a card: the time of every kernel")
    parser.add_argument("--compile", metavar="NAME", help="on a card: run this row once and nothing else")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.batch, args.size, args.threads)
        return
    if torch.cuda.is_available():
        on_card(args)
        return
    common = ["--batch", str(args.batch), "--size", str(args.size), "--threads", str(args.threads)]
    workers, memory, seconds = {}, {}, {name: torch.inf for name in VARIANTS}
    for name in VARIANTS:
        command = [sys.executable, "-m", "tests.speed.losses", "--serve", name, *common]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert worker.stdin and worker.stdout
        workers[name], memory[name] = worker, json.loads(worker.stdout.readline())
    for _ in range(args.repeats):
        for name, worker in workers.items():
            assert worker.stdin and worker.stdout
            worker.stdin.write("\n")
            worker.stdin.flush()
            seconds[name] = min(seconds[name], json.loads(worker.stdout.readline()))
    for worker in workers.values():
        assert worker.stdin
        worker.stdin.close()
        worker.wait()
    threads = args.threads or torch.get_num_threads()
    print(f"cpu, {threads} threads, {args.batch} maps of {args.size} x {args.size}, forward and backward")
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
