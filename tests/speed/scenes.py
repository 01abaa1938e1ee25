"""Views per minute that distill.data.scenes renders: python tests/speed/scenes.py [COUNT] [--size 224 224]

In torch, by compiled loops, and on a GPU if there is one, alternately, and checks that the bits are equal; then with 1,
2, 4, ... threads of one process, as in labelling. For compiled views also the share of time in the loops over pixels,
which is the part that a GPU takes over.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from distill.data import scenes
from distill.data.scenes import backends, reference, texture

SEED = scenes.TRAIN_SEEDS[0]
CHOSEN = backends.cpu_path()


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(started: tuple[float, float]) -> tuple[float, float]:
    now = clock()
    return now[0] - started[0], now[1] - started[1]


def by(path: str) -> AbstractContextManager[None]:
    """A context in which this path renders; a GPU that fails or gives different bits raises."""
    backends.cpu_path = lambda: reference.light_up if path == "torch" else CHOSEN  # type: ignore[assignment]
    if path != "gpu":
        return nullcontext()
    device = torch.device("cuda", torch.cuda.current_device())
    backends._trials[device] = True
    return scenes.render_on(device)


def loops(count: int, size: tuple[int, int]) -> float:
    """The share of a compiled view's processor time that is spent in the loops over its pixels."""
    from distill.data.scenes import fused  # needs numba

    inside, kernels = 0.0, {name: getattr(fused, name) for name in ("first_hit", "shade", "sky")}

    def timed(kernel: Any) -> Any:
        def call(*args: Any) -> None:
            nonlocal inside
            started = clock()
            kernel(*args)
            inside += since(started)[1]

        return call

    for name, kernel in kernels.items():
        setattr(fused, name, timed(kernel))
    with by("compiled"):
        started = clock()
        for index in range(count):
            scenes.render_uncached(SEED + index, size=size)
    for name, kernel in kernels.items():
        setattr(fused, name, kernel)
    return inside / since(started)[1]


def in_turns(paths: list[str], count: int, size: tuple[int, int]) -> dict[str, float]:
    """Processor seconds per view by path; prints them with the wall seconds."""
    views: dict[str, scenes.View] = {}
    spent = dict.fromkeys(paths, (0.0, 0.0))
    for index in range(count):  # alternately, so that other load on the machine affects all
        for path in paths:
            with by(path):
                started = clock()
                views[path] = scenes.render_uncached(SEED + index, size=size)
                took = since(started)
            spent[path] = (spent[path][0] + took[0], spent[path][1] + took[1])
        for path, view in views.items():
            for name in ("image", "depth"):
                assert torch.equal(getattr(view, name), getattr(views[paths[0]], name)), (path, name, SEED + index)
    for path, (wall, cpu) in spent.items():
        print(
            f"{path}: {count * 60 / wall:.0f} views a minute ({wall / count:.3f} s wall, {cpu / count:.3f} s CPU each)"
        )
    return {path: cpu / count for path, (_, cpu) in spent.items()}


def together(path: str, count: int, size: tuple[int, int]) -> None:
    """Prints views per minute by number of threads."""
    cores, threads, results = os.cpu_count() or 1, 1, []
    while threads <= min(16, cores):
        with by(path), ThreadPoolExecutor(threads) as pool:
            started = clock()
            list(pool.map(lambda seed: scenes.render_uncached(seed, size=size), range(SEED, SEED + count * threads)))
            wall, cpu = since(started)
        results.append(f"{threads}: {count * threads * 60 / wall:.0f} ({cpu / count / threads:.3f} s CPU each)")
        threads *= 2
    print(f"{path}, views a minute by threads: {', '.join(results)}")


def main(count: int, size: tuple[int, int]) -> None:
    started = clock()
    texture.bank(range(texture.COUNT))
    print("texture bank: {:.2f} s wall, {:.2f} s CPU".format(*since(started)))
    paths = ["torch"] + (["compiled"] if CHOSEN is not reference.light_up else [])
    if torch.cuda.is_available():
        paths.append("gpu")
        print(torch.cuda.get_device_name())
    for path in paths[1:]:
        with by(path):
            started = clock()
            for kind in ("room", "street"):
                scenes.render_uncached(SEED, size=size, kind=kind)
        print(
            "{}, first two views (loaded where it was kept): {:.2f} s wall, {:.2f} s CPU".format(path, *since(started))
        )
    print(f"views of {size[0]} x {size[1]}")
    each = in_turns(paths, count, size)
    if "compiled" in each:
        print(f"compiled is {each['torch'] / each['compiled']:.1f} times as fast in CPU time, with the same bits")
        share = loops(count, size)
        print(
            f"compiled: {share:.0%} of a view are loops; without them it would be {1 / (1 - share):.1f} times as fast"
        )
    if "gpu" in each:
        print(f"the GPU leaves {each['gpu'] / each[paths[-2]]:.0%} of the CPU time of {paths[-2]}, with the same bits")
    for path in paths[1:]:
        together(path, count, size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=30)
    parser.add_argument("--size", nargs=2, type=int, default=(224, 224), metavar=("HEIGHT", "WIDTH"))
    args = parser.parse_args()
    main(args.count, tuple(args.size))
