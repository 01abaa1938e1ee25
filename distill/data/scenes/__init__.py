"""Ray-cast views with exact depth: rooms, corridors, halls, tables, streets and open country. No files.

`render(seed)` is a pure function: the same bits on every call, whatever the global generators, the number of threads or
the path: torch, which is the reference; compiled loops (distill.data.scenes.fused), which are several times faster and
used where numba is installed; a GPU (distill.data.scenes.gpu) inside `on(device)`. On a CPU it works in one thread: for
speed, render in several processes or threads. Colour is anti-aliased (pixel centre and its four corners, weights 1/2
and 1/8); depth is that of the pixel's centre alone, so edges stay sharp. Training and the benchmark draw their seeds
from disjoint ranges.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from threading import Lock, local

import numpy as np
import torch
from torch import Tensor

from distill.data.scenes import film, texture
from distill.data.scenes.cast import Surfaces, cast, clusters, root, shadow, surfaces
from distill.data.scenes.indoors import corridor, hall, room, table
from distill.data.scenes.outdoors import country, street
from distill.data.scenes.stage import Stage
from distill.data.scenes.variety import vary

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
def remembered() -> Iterator[None]:
    """Inside it a view is rendered once and kept: 0.4 MB for 224 x 224, and what is asked again costs nothing."""
    global _kept
    before, _kept = _kept, {} if _kept is None else _kept
    try:
        yield
    finally:
        _kept = before


def render(seed: int, *, size: tuple[int, int] = (224, 224), kind: str | None = None, variety: bool = False) -> View:
    """As `rendered`, or what was kept of it (see `remembered`); nobody may write into a view."""
    if _kept is None:
        return rendered(seed, size=size, kind=kind, variety=variety)
    place = (seed, size, kind, variety)
    if place not in _kept:
        _kept[place] = rendered(seed, size=size, kind=kind, variety=variety)
    return _kept[place]


def rendered(seed: int, *, size: tuple[int, int] = (224, 224), kind: str | None = None, variety: bool = False) -> View:
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
    image, depth = _taken(stage, size, film.load(rng, *size))
    valid = torch.isfinite(depth)
    assert stage.camera is not None
    focal = stage.camera.focal * size[1]
    return View(image, torch.where(valid, depth, 0.0).contiguous(), valid.contiguous(), kind, focal)


def _taken(stage: Stage, size: tuple[int, int], loaded: film.Film) -> tuple[Tensor, Tensor]:
    """Image (3,H,W) and depth (H,W), inf in the sky."""
    threads = torch.get_num_threads()
    # Thousands of small operations: a team of threads gains little, and where the cores are busy it loses everything.
    torch.set_num_threads(1)
    try:
        if _device is not None and _trusted(_device):
            try:
                return _on_gpu(stage, size, loaded, _device)
            except torch.OutOfMemoryError:
                pass  # the teacher needs it all; the CPU gives the same bits
        return _developed(*_path()(stage, size), loaded)
    finally:
        torch.set_num_threads(threads)


def _developed(depth: Tensor, colour: Tensor, loaded: film.Film) -> tuple[Tensor, Tensor]:
    """The picture and its depth, where what `_light_up` gives lies."""
    _, _, height, width = colour.shape
    centre, corner = colour[:, 1, : height - 1, : width - 1], colour[:, 0]
    around = corner[:, :-1, :-1] + corner[:, 1:, :-1] + corner[:, :-1, 1:] + corner[:, 1:, 1:]
    return film.develop(loaded, 0.5 * centre + 0.125 * around), depth[1, : height - 1, : width - 1]


_device: torch.device | None = None
_trials: dict[torch.device, bool] = {}
_trying = Lock()
_streams = local()


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Inside it this process renders on a GPU where `device` is one that can (distill.data.scenes.gpu).

    Its pictures are those of the CPU, to the bit: before the first one that is tried on two views, and where it is not
    so, or the GPU cannot, there is one warning and the CPU renders.
    """
    global _device
    before, _device = _device, device if device.type == "cuda" else None
    try:
        yield
    finally:
        _device = before


def _on_gpu(stage: Stage, size: tuple[int, int], loaded: film.Film, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `_taken`, on a stream of this thread's own: a teacher's work on the GPU is not waited for."""
    from distill.data.scenes import gpu  # wants Triton

    with _stream(device):
        image, depth = _developed(*gpu.light_up(stage, size, device), loaded)
        return image.cpu(), depth.cpu()


@contextmanager
def _stream(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        if not hasattr(_streams, str(device)):
            setattr(_streams, str(device), torch.cuda.Stream(device))
        with torch.cuda.stream(getattr(_streams, str(device))):
            yield


def _trusted(device: torch.device) -> bool:
    """Whether this device renders with the CPU's bits; tried once, while other threads wait."""
    with _trying:
        if device not in _trials:
            _trials[device] = _try(device)
    return _trials[device]


def _try(device: torch.device) -> bool:
    try:
        for kind in ("street", "table"):  # the sun, sky and haze; lamps and a room
            rng = np.random.default_rng([_STREAM, _VARIETY])
            stage = Stage(rng=rng)
            _LAYOUTS[kind][0](stage)
            vary(stage)
            loaded = film.load(rng, 40, 56)
            here = _developed(*_path()(stage, (40, 56)), loaded)
            if not all(map(torch.equal, _on_gpu(stage, (40, 56), loaded, device), here)):
                raise ValueError(f"its picture of a {kind} differs from the CPU's")
    except Exception as fault:  # noqa: BLE001  whatever a compiler or a driver raises, the CPU is there
        reason = " ".join(f"{type(fault).__name__}: {fault}".split())[:200]
        warnings.warn(f"{device} renders no scenes ({reason}): the CPU does, slower", stacklevel=2)
        return False
    return True


@cache
def _path() -> Callable[[Stage, tuple[int, int]], tuple[Tensor, Tensor]]:
    """Who casts the rays: compiled loops where numba is installed, torch where not. Both give the same bits."""
    if find_spec("numba") is None:
        return _light_up
    try:
        from distill.data.scenes.fused import light_up
    except (ImportError, KeyError) as error:  # numba refuses so a numpy newer than itself, and an option it lacks
        warnings.warn(f"numba does not load, so scenes render several times slower: {error}", stacklevel=2)
        return _light_up
    return light_up


def _light_up(stage: Stage, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Depth (2,H+1,W+1) and linear colour (3,2,H+1,W+1) on the corner and centre grids."""
    height, width = size
    camera = stage.camera
    assert camera is not None
    rays = camera.rays(height, width, corners=True)
    hits = cast(stage.solids, camera, rays)
    colour = torch.zeros(3, hits.depth.numel())
    empty = torch.nonzero(hits.surface.reshape(-1) < 0)[:, 0]
    if len(empty):
        colour[:, empty] = _sky(stage, [r.reshape(-1)[empty] for r in rays])
    solid = torch.nonzero(hits.surface.reshape(-1) >= 0)[:, 0]
    t = hits.depth.reshape(-1)[solid]
    ray = [r.reshape(-1)[solid] for r in rays]
    seen = _shade(stage, hits.surface.reshape(-1)[solid], t, ray, 1.0 / (camera.focal * width))
    if stage.haze:
        clear = (stage.haze / (stage.haze + t)) ** 2
        horizon = torch.tensor(stage.sky[0] if stage.sky else stage.ambient[0])[:, None]
        seen = seen * clear + horizon * (1 - clear)
    colour[:, solid] = seen
    return hits.depth, colour.reshape(3, *hits.depth.shape)


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _unit(a: list[Tensor]) -> list[Tensor]:
    length = root(_dot(a, a).clamp(min=1e-20))
    return [x / length for x in a]


def _surface_points(
    stage: Stage, surface: Surfaces, rows: Tensor, t: Tensor, ray: list[Tensor]
) -> tuple[list[Tensor], ...]:
    """World points, unit normals, and position and normal in the solid's own frame."""
    assert stage.camera is not None
    point = [stage.camera.position[i] + t * ray[i] for i in range(3)]
    flat = torch.cat(
        [surface.gradient.reshape(-1, 9), surface.constant, surface.centre, surface.axes.reshape(-1, 9)], dim=1
    )[rows].T
    away = [point[i] - flat[12 + i] for i in range(3)]
    normal = _unit([_dot(away, [flat[3 * i], flat[3 * i + 1], flat[3 * i + 2]]) + flat[9 + i] for i in range(3)])
    axes = [[flat[15 + 3 * i + j] for j in range(3)] for i in range(3)]
    return point, normal, [_dot(away, a) for a in axes], [_dot(normal, a) for a in axes]


def _shade(stage: Stage, rows: Tensor, t: Tensor, ray: list[Tensor], pixel: float) -> Tensor:
    """Linear colour (3,N) of the points at `t` along the rays."""
    surface = surfaces(stage.solids)
    point, normal, own, own_normal = _surface_points(stage, surface, rows, t, ray)
    material = surface.material[rows]
    patterns, numbers = texture.table(stage.materials)
    number = numbers[material]
    # Texture is laid along the axis that the surface faces most.
    x, y, z = (c.abs() for c in own_normal)
    on_x, on_y = (x > y) & (x > z), (y >= x) & (y > z)
    u = torch.where(on_x, own[2], own[0])
    v = torch.where(on_y, own[2], -own[1])
    facing = -_dot(_unit(ray), normal)
    albedo, texel = texture.paint(patterns[material], number, u, v, t * pixel / facing.clamp(min=0.12))
    bend_a, bend_b = (texel[:, 0] - 0.5) * number[:, 18], (texel[:, 1] - 0.5) * number[:, 18]
    bent = _unit([normal[0] + bend_a, normal[1] + bend_b, normal[2] + bend_a - bend_b])

    up, down = torch.tensor(stage.ambient[0])[:, None], torch.tensor(stage.ambient[1])[:, None]
    share = 0.5 + 0.5 * bent[1]
    # Near the floor less of the room is seen: a soft darkening where things stand.
    near_floor = (point[1].clamp(min=0.0) + 0.08) / (point[1].clamp(min=0.0) + 0.16)
    light = (up * share + down * (1 - share)) * torch.where(normal[1] < 0.7, near_floor, 1.0) * _corners(stage, point)
    shine = torch.zeros_like(light)
    lifted = [p + n * (1e-3 + 1e-3 * t) for p, n in zip(point, normal, strict=True)]
    groups = clusters(stage.solids)
    for lamp in stage.lights:
        if lamp.sun:
            towards = [torch.tensor(c) for c in lamp.place]
            power: Tensor = torch.tensor(1.0)
        else:
            away = [lamp.place[i] - point[i] for i in range(3)]
            square = _dot(away, away)
            towards, power = _unit(away), lamp.reach**2 / (lamp.reach**2 + square)
        slope = torch.where(_dot(normal, towards) > 0, _dot(bent, towards), 0.0)
        lit = torch.nonzero(slope > 0)[:, 0]
        hidden = shadow(groups, [p[lit] for p in lifted], lamp.place, sun=lamp.sun)
        strength = torch.zeros_like(t)
        strength[lit] = torch.where(hidden, 0.0, 1.0)
        strength = strength * power
        shade = torch.tensor(lamp.colour)[:, None]
        light = light + shade * (slope.clamp(min=0) * strength)
        half = _unit([towards[i] - r for i, r in enumerate(_unit(ray))])
        gleam = _dot(half, bent).clamp(min=0)
        for _ in range(5):
            gleam = gleam * gleam
        shine = shine + shade * (gleam * strength * number[:, 16] * 0.6)
    return albedo * (light + number[:, 17]) + shine


def _corners(stage: Stage, point: list[Tensor]) -> Tensor:
    """A soft darkening (N,) towards the walls, floor and ceiling of a room."""
    shade = torch.ones_like(point[0])
    if stage.bounds is not None:
        hx, hy, hz = stage.bounds
        for gap in (hx - point[0].abs(), hz - point[2].abs(), hy - (point[1] - hy).abs()):
            gap = gap.clamp(min=0)
            shade = shade * (gap + 0.25) / (gap + 0.45)
    return shade


def _sky(stage: Stage, ray: list[Tensor]) -> Tensor:
    """Colour (3,N) of rays that meet nothing."""
    if stage.sky is None:
        return torch.zeros(3, len(ray[0]))
    horizon, zenith = (torch.tensor(c)[:, None] for c in stage.sky)
    direction = _unit(ray)
    rise = direction[1].clamp(min=0)
    blue = rise * (2 - rise) * 0.9 + 0.1 * (rise > 0)
    colour = horizon * (1 - blue) + zenith * blue
    # Clouds lie on a plane far above.
    level = 1.0 / rise.clamp(min=0.02)
    noise = torch.full_like(rise, texture.cloud_pattern(stage.clouds)).long()
    cloud = texture.sample(
        noise, direction[0] * level * 0.15 + 0.3, direction[2] * level * 0.15 + 0.7, level * 0.002, smooth=False
    )[:, 0]
    cover = ((cloud - 1 + stage.clouds * 0.8) * 3).clamp(0, 1) * (rise * 8).clamp(0, 1)
    white = horizon * 0.4 + 0.55
    colour = colour * (1 - cover) + white * cover
    sun = stage.lights[0]
    glow = _dot(direction, [torch.tensor(c) for c in sun.place]).clamp(min=0)
    for _ in range(6):
        glow = glow * glow
    return colour + torch.tensor(sun.colour)[:, None] * glow
