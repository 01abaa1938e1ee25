"""Ray-cast views with exact depth: rooms, corridors, halls, tables, streets and open country. No files.

`render(seed)` is a pure function: the same bits on every call, whatever the global generators, the number of threads or
who casts the rays: torch (`reference`), compiled loops (`fused`), which are several times faster and used where numba
is installed, or a GPU (`gpu`) inside `render_on(device)`. On a CPU it works in one thread: for speed, render in several
processes or threads. Colour is anti-aliased (pixel centre and its four corners, weights 1/2 and 1/8); depth is that of
the pixel's centre alone, so edges stay sharp. Training and the benchmark draw their seeds from disjoint ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.data.scenes.backends import render_on, take_picture
from distill.data.scenes.film import draw_film
from distill.data.scenes.indoors import corridor, hall, room, table
from distill.data.scenes.outdoors import country, street
from distill.data.scenes.stage import Stage
from distill.data.scenes.variety import vary

__all__ = [
    "BENCHMARK_SEEDS",
    "KINDS",
    "OUTDOORS",
    "TRAIN_SEEDS",
    "View",
    "cached_views",
    "kind_of",
    "render",
    "render_on",
]

_LAYOUTS: dict[str, tuple[Callable[[Stage], None], float]] = {
    "room": (room, 0.34),
    "corridor": (corridor, 0.08),
    "street": (street, 0.22),
    "country": (country, 0.16),
    "table": (table, 0.12),
    "hall": (hall, 0.08),
}
"""Who builds a kind of view, and its share of all views."""
KINDS = tuple(_LAYOUTS)
OUTDOORS = ("street", "country")
_STREAM = 7919
_VARIETY = 1
"""Of the second generator of a seed: what `variety` adds."""
TRAIN_SEEDS = range(1_000_000, 2_000_000_000)
BENCHMARK_SEEDS = range(0, 64)


@dataclass(frozen=True, slots=True)
class View:
    """What a camera saw.

    image: (3,H,W) float32 in [0,1]. depth: (H,W) float32 metres along the optical axis, 0 in the sky.
    valid: (H,W) bool, False in the sky. focal: the camera's, in pixels.
    """

    image: Tensor
    depth: Tensor
    valid: Tensor
    kind: str
    focal: float = 0.0


def kind_of(seed: int) -> str:
    """The kind of view that `render(seed)` gives, without rendering it."""
    return _draw_kind(np.random.default_rng([_STREAM, seed]))


def _draw_kind(rng: np.random.Generator) -> str:
    return str(rng.choice(KINDS, p=[share for _, share in _LAYOUTS.values()]))


_kept: dict[tuple[int, tuple[int, int], str | None, bool], View] | None = None


@contextmanager
def cached_views() -> Iterator[None]:
    """Inside it a view is rendered once and kept: 0.4 MB for 224 x 224, and what is asked again costs nothing."""
    global _kept
    before, _kept = _kept, {} if _kept is None else _kept
    try:
        yield
    finally:
        _kept = before


def render(seed: int, *, size: tuple[int, int] = (224, 224), kind: str | None = None, variety: bool = False) -> View:
    """As `render_uncached`, or what was kept of it (see `cached_views`); nobody may write into a view."""
    if _kept is None:
        return render_uncached(seed, size=size, kind=kind, variety=variety)
    place = (seed, size, kind, variety)
    if place not in _kept:
        _kept[place] = render_uncached(seed, size=size, kind=kind, variety=variety)
    return _kept[place]


def render_uncached(
    seed: int, *, size: tuple[int, int] = (224, 224), kind: str | None = None, variety: bool = False
) -> View:
    """The view of this seed, (height, width) = `size`; `kind` is drawn from the seed too unless it is given.

    variety: the same view with more in it, and sometimes by night or in fog (distill.data.scenes.variety).
    """
    if kind is not None and kind not in _LAYOUTS:
        raise LookupError(f"no kind of view is called {kind!r}; there are: {', '.join(_LAYOUTS)}")
    if min(size) < 1:
        raise ValueError(f"size must be (height, width) of at least one pixel, not {size}")
    rng = np.random.default_rng([_STREAM, seed])
    drawn = _draw_kind(rng)
    kind = drawn if kind is None else kind
    stage = Stage(rng=rng)
    _LAYOUTS[kind][0](stage)
    if variety:
        stage.rng = np.random.default_rng([_STREAM, seed, _VARIETY])
        vary(stage)
    image, depth = take_picture(stage, size, draw_film(rng, *size))
    valid = torch.isfinite(depth)
    assert stage.camera is not None
    focal = stage.camera.focal * size[1]
    return View(image, torch.where(valid, depth, 0.0).contiguous(), valid.contiguous(), kind, focal)
