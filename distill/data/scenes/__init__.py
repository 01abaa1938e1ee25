"""Ray-cast views with exact depth: rooms, corridors, halls, tables, streets and open country. No files are needed.

`render(seed)` is a pure function: it returns the same bits whatever the global random state, the number of threads and
the backend: torch (`reference`), compiled loops (`fused`), which are several times faster and used where numba is
installed, or a GPU (`gpu`) inside `render_on(device)`. On a CPU a view uses one thread: for speed, render in several
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
"""The function that builds each kind of view, and the kind's share of all views."""
KINDS = tuple(_LAYOUTS)
OUTDOORS = ("street", "country")
_STREAM = 7919
_VARIETY = 1
"""Seed suffix of the second generator, which draws what `variety` adds."""
TRAIN_SEEDS = range(1_000_000, 2_000_000_000)
BENCHMARK_SEEDS = range(0, 64)


@dataclass(frozen=True, slots=True)
class View:
    """One rendered view.

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


_cache: dict[tuple[int, tuple[int, int], str | None, bool], View] | None = None


@contextmanager
def cached_views() -> Iterator[None]:
    """Inside this context each view is rendered once and cached: 0.4 MB for 224 x 224."""
    global _cache
    outer, _cache = _cache, {} if _cache is None else _cache
    try:
        yield
    finally:
        _cache = outer


def render(seed: int, *, size: tuple[int, int] = (224, 224), kind: str | None = None, variety: bool = False) -> View:
    """Render as `render_uncached`, or return the cached view (see `cached_views`); callers must not modify a view."""
    views = _cache  # read once: another thread may leave `cached_views` meanwhile
    if views is None:
        return render_uncached(seed, size=size, kind=kind, variety=variety)
    key = (seed, size, kind, variety)
    if key not in views:
        views[key] = render_uncached(seed, size=size, kind=kind, variety=variety)
    return views[key]


def render_uncached(
    seed: int, *, size: tuple[int, int] = (224, 224), kind: str | None = None, variety: bool = False
) -> View:
    """Render the view of a seed, (height, width) = `size`; `kind` is drawn from the seed too unless it is given.

    variety: add objects to the same view, and sometimes night or fog (distill.data.scenes.variety).
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
