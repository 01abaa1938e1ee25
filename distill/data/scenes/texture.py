"""Surface textures: a bank of tileable grey patterns with mipmaps, coloured by four-colour ramps.

Patterns are generated on first use, each from its own seed, as two channels: a ramp position and a fine detail. A
material combines a pattern, a scale and four colours, so a few dozen patterns give many surfaces. Mipmaps prevent
aliasing of distant texture. Per-pixel code uses no sin, exp or pow: their last bits depend on how a loop is split over
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np
import torch
from torch import Tensor

SIZE = 256
_DRAWING = Lock()
LEVELS = 9
OFFSETS = tuple(sum((SIZE >> k) ** 2 for k in range(level)) for level in range(LEVELS))
STRIDE = sum((SIZE >> k) ** 2 for k in range(LEVELS))
"""OFFSETS: texels before each mip level of a pattern. STRIDE: texels of a whole pattern."""

_Drawn = tuple[np.ndarray, np.ndarray]
_GRID = (np.arange(SIZE) + 0.5) / SIZE
_V, _U = np.meshgrid(_GRID, _GRID, indexing="ij")


def _cloud(rng: np.random.Generator, slope: float, *, stretch: float = 1.0) -> np.ndarray:
    """Tileable noise with spectrum 1/f^slope, half equalized to a uniform distribution over [0,1]."""
    fy = np.fft.fftfreq(SIZE)[:, None] * SIZE
    fx = np.fft.fftfreq(SIZE)[None, :] * SIZE * stretch
    radius = np.sqrt(fx * fx + fy * fy)
    radius[0, 0] = np.inf
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIZE, SIZE))) / np.maximum(radius, 1.0) ** slope).real
    ranks = np.empty(SIZE * SIZE)
    ranks[np.argsort(field, axis=None, kind="stable")] = np.linspace(0, 1, SIZE * SIZE)
    return 0.5 * ranks.reshape(SIZE, SIZE) + 0.5 * np.clip(0.5 + field / field.std() / 5, 0, 1)


def _cells(rng: np.random.Generator, rows: int, columns: int, *, shift: float = 0.0) -> tuple[np.ndarray, ...]:
    """Position inside the cells of a grid (two maps in [0,1]) and a random tone per cell; odd rows are shifted."""
    row = np.floor(_V * rows).astype(int)
    u = _U * columns + shift * (row % 2)
    tone = rng.random((rows, columns))[row, np.floor(u).astype(int) % columns]
    return u % 1.0, (_V * rows) % 1.0, tone


def _inside(u: np.ndarray, v: np.ndarray, margin_u: float, margin_v: float) -> np.ndarray:
    return ((u > margin_u) & (u < 1 - margin_u) & (v > margin_v) & (v < 1 - margin_v)).astype(float)


def _plain(rng: np.random.Generator) -> _Drawn:
    return 0.35 + 0.3 * _cloud(rng, 1.5), _cloud(rng, 0.5)


def _noise(rng: np.random.Generator) -> _Drawn:
    return _cloud(rng, rng.uniform(0.8, 2.2)), _cloud(rng, rng.uniform(0.2, 1.0))


def _blotches(rng: np.random.Generator) -> _Drawn:
    field = _cloud(rng, rng.uniform(1.3, 2.2))
    return np.floor(field * 4) / 3.2, _cloud(rng, 0.8)


def _grass(rng: np.random.Generator) -> _Drawn:
    return 0.6 * _cloud(rng, 0.4, stretch=0.5) + 0.4 * _cloud(rng, 1.6), _cloud(rng, 0.1)


def _gravel(rng: np.random.Generator) -> _Drawn:
    count = int(rng.integers(150, 900))
    points, tones = rng.random((count, 2)), rng.random(count)
    best, second = np.full((SIZE, SIZE), 9.0), np.full((SIZE, SIZE), 9.0)
    tone = np.zeros((SIZE, SIZE))
    for (x, y), t in zip(points, tones, strict=True):
        dx, dy = np.abs(_U - x), np.abs(_V - y)
        distance = np.minimum(dx, 1 - dx) ** 2 + np.minimum(dy, 1 - dy) ** 2
        closer = distance < best
        second = np.where(closer, best, np.minimum(second, distance))
        tone = np.where(closer, t, tone)
        best = np.where(closer, distance, best)
    edge = np.clip((np.sqrt(second) - np.sqrt(best)) * 60, 0, 1)
    return edge * (0.35 + 0.65 * tone), 0.5 * _cloud(rng, 0.7) + 0.5 * edge


def _checker(rng: np.random.Generator) -> _Drawn:
    count = int(rng.choice([2, 4, 8, 16]))
    board = (np.floor(_U * count) + np.floor(_V * count)) % 2
    return 0.08 + 0.84 * board, 0.5 * _cloud(rng, 1.2) + 0.25


def _bricks(rng: np.random.Generator) -> _Drawn:
    rows = int(rng.choice([8, 12, 16]))
    u, v, tone = _cells(rng, rows, rows // 2, shift=0.5)
    brick = _inside(u, v, 0.03, 0.07)
    return brick * (0.4 + 0.6 * tone), 0.6 * _cloud(rng, 0.8) + 0.4 * brick


def _tiles(rng: np.random.Generator) -> _Drawn:
    count = int(rng.choice([4, 6, 8]))
    u, v, tone = _cells(rng, count, count)
    joint = rng.uniform(0.015, 0.05)
    tile = _inside(u, v, joint, joint)
    return tile * (0.6 + 0.4 * tone * rng.random()), 0.4 * _cloud(rng, 1.4) + 0.3 + 0.2 * tile


def _stripes(rng: np.random.Generator) -> _Drawn:
    edges = np.sort(rng.random(int(rng.integers(6, 24))))
    tones = rng.random(len(edges) + 1)
    tones[-1] = tones[0]
    return tones[np.searchsorted(edges, _U)], _cloud(rng, 0.8)


def _plaid(rng: np.random.Generator) -> _Drawn:
    first, second = _stripes(rng)[0], _stripes(rng)[0].T
    return (first + second) / 2, _cloud(rng, 0.2)


def _planks(rng: np.random.Generator) -> _Drawn:
    count = int(rng.choice([3, 5, 8]))
    u, v, tone = _cells(rng, int(rng.choice([1, 2, 3])), count)
    grain = _cloud(rng, 1.1, stretch=0.12)
    gap = _inside(u, v, 0.02, 0.004)
    return gap * np.clip(0.25 + 0.4 * tone + 0.5 * (grain - 0.5), 0, 1), 0.7 * grain + 0.3 * gap


def _wood(rng: np.random.Generator) -> _Drawn:
    warp = _cloud(rng, 2.0, stretch=0.3)
    rings = np.abs(((_U * 3 + warp * rng.uniform(2, 6)) % 1.0) * 2 - 1)
    return 0.2 + 0.6 * rings, _cloud(rng, 0.9, stretch=0.1)


def _marble(rng: np.random.Generator) -> _Drawn:
    vein = np.abs(((_U + _V) % 1.0 * 2 + 3 * _cloud(rng, 1.8)) % 1.0 * 2 - 1)
    return np.sqrt(vein), _cloud(rng, 1.0)


def _dots(rng: np.random.Generator) -> _Drawn:
    count = int(rng.choice([6, 10, 16]))
    u, v, tone = _cells(rng, count, count, shift=0.5)
    dot = ((u - 0.5) ** 2 + (v - 0.5) ** 2 < rng.uniform(0.04, 0.12)).astype(float)
    return dot * (0.5 + 0.5 * tone), _cloud(rng, 0.8)


def _facade(rng: np.random.Generator) -> _Drawn:
    """Rows of windows: ramp 0 is glass, the middle frames, 1 the wall."""
    rows, columns = int(rng.choice([3, 4, 6])), int(rng.choice([3, 4, 6, 8]))
    u, v, tone = _cells(rng, rows, columns)
    mu, mv = rng.uniform(0.1, 0.32), rng.uniform(0.12, 0.3)
    frame, glass = _inside(u, v, mu, mv), _inside(u, v, mu + 0.035, mv + 0.035)
    cross = 1 - ((np.abs(u - 0.5) < 0.02) | (np.abs(v - 0.42) < 0.015)).astype(float) * float(rng.random() < 0.6)
    wall = 0.85 + 0.15 * _cloud(rng, 1.2)
    ramp = np.where(frame > 0, np.where(glass * cross > 0, 0.18 * tone + 0.1 * (1 - v), 0.6), wall)
    return ramp, 0.5 * _cloud(rng, 0.8) + 0.25


def _collage(rng: np.random.Generator) -> _Drawn:
    picture = 0.2 * rng.random() + _V * rng.random() * 0.6
    for _ in range(int(rng.integers(4, 16))):
        x, y, w, h = rng.random(2).tolist() + (rng.random(2) ** 2 * 0.35 + 0.03).tolist()
        du, dv = np.abs(_U - x) / w, np.abs(_V - y) / h
        shape = (du * du + dv * dv < 1) if rng.random() < 0.5 else (np.maximum(du, dv) < 1)
        if rng.random() < 0.25:
            shape = du + dv < 1
        picture = np.where(shape, rng.random() + 0.15 * (_cloud(rng, 1.8) - 0.5), picture)
    border = _inside(_U, _V, 0.04, 0.04) if rng.random() < 0.6 else 1.0
    return np.clip(picture * border, 0, 1), _cloud(rng, 1.2)


def _print(rng: np.random.Generator) -> _Drawn:
    """Lines that resemble text."""
    rows, columns = int(rng.choice([16, 24, 32])), 64
    u, v, tone = _cells(rng, rows, columns)
    words = rng.random((rows, columns))[np.floor(_V * rows).astype(int), np.floor(_U * columns).astype(int)]
    ink = (words > 0.25) & (v > 0.25) & (v < 0.72) & (u < 0.55 + 0.5 * tone) & (_inside(_U, _V, 0.08, 0.06) > 0)
    return np.where(ink, 0.05, 0.95), _cloud(rng, 1.4)


def _spines(rng: np.random.Generator) -> _Drawn:
    """Books on a shelf, or bottles: upright bars of random height and tone."""
    widths = rng.uniform(0.4, 1.6, int(rng.integers(10, 28)))
    edges = np.cumsum(widths) / widths.sum()
    index = np.minimum(np.searchsorted(edges, _U), len(widths) - 1)
    tall, tone = rng.uniform(0.0, 0.3, len(widths))[index], rng.random(len(widths))[index]
    left = np.concatenate([[0.0], edges[:-1]])[index]
    seam = (_U - left) < 0.006
    label = (np.abs(_V - 0.45) < 0.12) & (rng.random(len(widths))[index] > 0.5)
    ramp = np.where(label, 1 - tone, tone)
    return np.where((_V < tall) | seam, 0.02, 0.1 + 0.9 * ramp), _cloud(rng, 1.0)


_DRAW: dict[str, tuple[Callable[[np.random.Generator], _Drawn], int]] = {
    "plain": (_plain, 3),
    "noise": (_noise, 6),
    "blotches": (_blotches, 3),
    "grass": (_grass, 3),
    "gravel": (_gravel, 3),
    "checker": (_checker, 3),
    "bricks": (_bricks, 4),
    "tiles": (_tiles, 4),
    "stripes": (_stripes, 4),
    "plaid": (_plaid, 2),
    "planks": (_planks, 4),
    "wood": (_wood, 4),
    "marble": (_marble, 2),
    "dots": (_dots, 2),
    "facade": (_facade, 8),
    "collage": (_collage, 8),
    "print": (_print, 2),
    "spines": (_spines, 4),
}
COUNT = sum(count for _, count in _DRAW.values())
"""Number of patterns in the bank."""
_FIRST = {name: sum(count for _, count in list(_DRAW.values())[:i]) for i, name in enumerate(_DRAW)}


def pattern(rng: np.random.Generator, *names: str) -> int:
    """The index of a random pattern of one of these names."""
    name = names[int(rng.integers(len(names)))]
    return _FIRST[name] + int(rng.integers(_DRAW[name][1]))


STAINS = _FIRST["noise"]
"""Index of the pattern of stains."""


def cloud_pattern(cover: float) -> int:
    """The index of the cloud pattern for a cover of the sky in [0,1]."""
    return _FIRST["noise"] + int(cover * 97) % _DRAW["noise"][1]


@lru_cache(maxsize=1)
def _bank() -> np.ndarray:
    """(patterns * texels, 2) float32: each pattern's mipmaps, level after level, rows from the top; see `bank`.

    An array, because a tensor created in inference mode could not be updated outside of it.
    """
    return np.zeros((COUNT * STRIDE, 2), dtype=np.float32)


_drawn: set[int] = set()


def bank(patterns: Iterable[int]) -> np.ndarray:
    """(all patterns * STRIDE, 2) float32, ramp position and detail, in which at least `patterns` are generated.

    Missing ones are generated now: all patterns together take seconds, and a view needs a dozen.
    """
    with _DRAWING:  # one thread generates, the others wait
        texels = _bank()
        for number in sorted({*patterns} - _drawn):
            name = next(name for name in reversed(_FIRST) if _FIRST[name] <= number)
            level = np.stack(_DRAW[name][0](np.random.default_rng([20240229, number])), axis=-1)
            level = np.round(np.clip(level, 0, 1) * 255) / 255
            for k, offset in enumerate(OFFSETS):
                start = number * STRIDE + offset
                texels[start : start + (SIZE >> k) ** 2] = level.reshape(-1, 2)
                level = (level[::2, ::2] + level[1::2, ::2] + level[::2, 1::2] + level[1::2, 1::2]) / 4
            _drawn.add(number)
    return texels


def _lookup(base: Tensor, level: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Bilinear texels (N,2) of one mip level per point."""
    texels = torch.from_numpy(_bank())
    size = torch.tensor([SIZE >> k for k in range(LEVELS)])[level]
    start = base + torch.tensor(OFFSETS)[level]
    x, y = u * size - 0.5, v * size - 0.5
    x0, y0 = x.floor(), y.floor()
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]
    mask = size - 1
    left, top = x0.long() & mask, y0.long() & mask
    right, bottom = (left + 1) & mask, (top + 1) & mask
    top, bottom = start + top * size, start + bottom * size
    upper = texels.index_select(0, top + left) * (1 - fx) + texels.index_select(0, top + right) * fx
    lower = texels.index_select(0, bottom + left) * (1 - fx) + texels.index_select(0, bottom + right) * fx
    return upper * (1 - fy) + lower * fy


def sample(patterns: Tensor, u: Tensor, v: Tensor, footprint: Tensor, *, smooth: bool = True) -> Tensor:
    """Ramp position and detail, (N,2), at (u, v) in repeats; footprint: repeats that one pixel covers.

    smooth: interpolate between two mip levels; otherwise only the finer one is read, at half the cost.
    """
    bank(patterns.bincount().nonzero()[:, 0].tolist())
    mantissa, exponent = torch.frexp((footprint * SIZE).clamp(1.0, 2.0 ** (LEVELS - 1)))
    level = (exponent - 1) + (2 * mantissa - 1)
    low = level.floor().long().clamp(0, LEVELS - 1)
    base = patterns * STRIDE
    if not smooth:
        return _lookup(base, low, u, v)
    high = (low + 1).clamp(max=LEVELS - 1)
    mix = (level - low)[:, None]
    return _lookup(base, low, u, v) * (1 - mix) + _lookup(base, high, u, v) * mix


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """A pattern with colours. repeat: metres per repeat (vertically times `tall`). colours: (4,3) linear RGB.

    detail, stains: strengths of fine and coarse brightness changes. gloss: highlight strength. glow: emitted light.
    bump: how strongly the pattern perturbs the shading normal.
    """

    pattern: int
    repeat: float
    colours: np.ndarray
    tall: float = 1.0
    detail: float = 0.3
    stains: float = 0.2
    gloss: float = 0.0
    glow: float = 0.0
    bump: float = 0.0


def table(materials: Sequence[Material]) -> tuple[Tensor, Tensor]:
    """Patterns (M,) int64, and numbers (M,19).

    The numbers: twelve colours, repeats per metre across and up, detail, stains, gloss, glow, bump.
    """
    rows = [
        [
            *m.colours.reshape(-1).tolist(),
            1 / m.repeat,
            1 / (m.repeat * m.tall),
            m.detail,
            m.stains,
            m.gloss,
            m.glow,
            m.bump,
        ]
        for m in materials
    ]
    return torch.tensor([m.pattern for m in materials]), torch.tensor(rows, dtype=torch.float32)


def paint(patterns: Tensor, numbers: Tensor, u: Tensor, v: Tensor, footprint: Tensor) -> tuple[Tensor, Tensor]:
    """Albedo (3,N) and texels (N,2) at surface points (u, v) in metres.

    patterns, numbers: rows of `table`, one per point.
    """
    rate, rise = numbers[:, 12], numbers[:, 13]
    u, v, footprint = u * rate + 0.5, v * rise + 0.5, footprint * torch.maximum(rate, rise)
    texel = sample(patterns, u, v, footprint)
    ramp, detail = texel[:, 0] * 3, texel[:, 1]
    weights = [(1 - (ramp - k).abs()).clamp(min=0) for k in range(4)]
    albedo = weights[0] * numbers[:, 0:3].T
    for k in (1, 2, 3):
        albedo = albedo + weights[k] * numbers[:, 3 * k : 3 * k + 3].T
    stain_pattern = torch.full_like(patterns, STAINS)
    coarse = sample(stain_pattern, u * 0.23 + 0.37, v * 0.23 + 0.11, footprint * 0.23, smooth=False)[:, 0]
    light = (1 + numbers[:, 14] * (detail - 0.5)) * (1 + numbers[:, 15] * (coarse - 0.5))
    return albedo * light, texel
