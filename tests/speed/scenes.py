"""Views per minute that distill.data.scenes renders, compiled and in torch: python tests/speed/scenes.py [COUNT]

And why no card renders: the share of a compiled view that its loops over pixels take, which is all that a card could
save, and the operators of a view in torch (without those that only look at a tensor otherwise), each a kernel there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.data import scenes
from distill.data.scenes import texture

SEED = scenes.TRAIN_SEEDS[0]


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(started: tuple[float, float]) -> tuple[float, float]:
    now = clock()
    return now[0] - started[0], now[1] - started[1]


class Operators(TorchDispatchMode):
    """Counts operators that compute: their result is no view of what they are given."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not views
        return func(*args, **(kwargs or {}))


def operators(count: int) -> float:
    """Operators of a view on torch's path, the mean of some."""
    scenes._path = lambda: scenes._light_up  # type: ignore[assignment]
    with Operators() as counted:
        for index in range(count):
            scenes.rendered(SEED + index)
    return counted.count / count


def loops(count: int) -> float:
    """The share of a compiled view's processor time that passes in the loops over its pixels."""
    from distill.data.scenes import fused  # wants numba

    inside = 0.0

    def timed(kernel: Any) -> Any:
        def call(*args: Any) -> None:
            nonlocal inside
            started = clock()
            kernel(*args)
            inside += since(started)[1]

        return call

    for name in ("first_hit", "shade", "sky"):
        setattr(fused, name, timed(getattr(fused, name)))
    scenes._path = lambda: fused.light_up  # type: ignore[assignment]
    started = clock()
    for index in range(count):
        scenes.rendered(SEED + index)
    return inside / since(started)[1]


def main(count: int) -> None:
    started = clock()
    texture.bank(range(texture.COUNT))
    print("texture bank: {:.2f} s wall, {:.2f} s CPU".format(*since(started)))
    chosen = scenes._path()
    paths = {"torch": scenes._light_up}
    if chosen is not scenes._light_up:
        started = clock()
        scenes.rendered(SEED)
        scenes.rendered(SEED, kind="street")
        spent = since(started)
        print("compiled, first two views (loaded where numba kept it): {:.2f} s wall, {:.2f} s CPU".format(*spent))
        paths["compiled"] = chosen
    views, each = {}, {}
    spent = dict.fromkeys(paths, (0.0, 0.0))
    for index in range(count):  # in turns, so that whatever else the machine does falls on both
        for name, path in paths.items():
            scenes._path = lambda path=path: path  # type: ignore[assignment]
            started = clock()
            views[name] = scenes.rendered(SEED + index)
            took = since(started)
            spent[name] = (spent[name][0] + took[0], spent[name][1] + took[1])
        for view in views.values():
            assert torch.equal(view.image, views["torch"].image) and torch.equal(view.depth, views["torch"].depth)
    for name, (wall, cpu) in spent.items():
        each[name] = cpu / count
        print(
            f"{name}: {count * 60 / wall:.0f} views of 224 x 224 a minute, {count * 60 / cpu:.0f} per minute of CPU "
            f"time ({wall / count:.3f} s wall, {cpu / count:.3f} s CPU each)"
        )
    if "compiled" in each:
        share = loops(count)
        print(
            f"compiled: {share:.0%} of a view are loops: without them it would be {1 / (1 - share):.1f} times as fast"
        )
        per_view = operators(min(count, 10))
        print(
            f"torch: {per_view:.0f} operators a view; a card would have to begin one every "
            f"{1e6 * each['compiled'] / per_view:.1f} us to be as fast as one core with compiled loops"
        )
        print(f"compiled is {each['torch'] / each['compiled']:.1f} times as fast in CPU time, with the same bits")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
