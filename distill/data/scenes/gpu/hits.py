"""The first hit of each ray: `cast.cast`, one tile of rays per program."""

from __future__ import annotations

import triton
import triton.language as tl

from distill.data.scenes.cast import FAR as _FAR
from distill.data.scenes.cast import NEAR as _NEAR
from distill.data.scenes.gpu.slots import (
    CAMERA,
    EYE,
    FIRST,
    HEIGHT,
    OUTSIDE,
    PIXEL,
    PLANES,
    QUADRIC,
    ROUND,
    SHELL,
    SOLIDS,
    SURFACE,
    WIDTH,
    WINDOWS,
)

NEAR, FAR = tl.constexpr(_NEAR), tl.constexpr(_FAR)
INF, TINY = tl.constexpr(float("inf")), tl.constexpr(1e-20)


@triton.jit
def tile_of(integers, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column of each ray of this program, and its first row and column."""
    across = tl.cdiv(tl.load(integers + WIDTH) + 1, COLUMNS)
    top, left = tl.program_id(0) // across * ROWS, tl.program_id(0) % across * COLUMNS
    lane = tl.arange(0, ROWS * COLUMNS)
    return top + lane // COLUMNS, left + lane % COLUMNS, top, left


@triton.jit
def rays_of(integers, floats, row, column):
    """World directions (x, y, z) of the rays, as `Camera.rays`; program axis 1: 0 for corners, 1 for centres."""
    height, width = tl.load(integers + HEIGHT).to(tl.float32), tl.load(integers + WIDTH).to(tl.float32)
    camera = floats + tl.load(integers + CAMERA)
    shift = tl.program_id(1).to(tl.float32) * 0.5
    scale = tl.load(camera + PIXEL)
    right = ((column.to(tl.float32) + shift) - width * 0.5) * scale
    up = (height * 0.5 - (row.to(tl.float32) + shift)) * scale
    x = right * tl.load(camera) + up * tl.load(camera + 3) + tl.load(camera + 6)
    y = right * tl.load(camera + 1) + up * tl.load(camera + 4) + tl.load(camera + 7)
    z = right * tl.load(camera + 2) + up * tl.load(camera + 5) + tl.load(camera + 8)
    return x, y, z


@triton.jit
def turned(m, x, y, z):
    """A 3 x 3 matrix in memory times a vector."""
    dx = tl.load(m) * x + tl.load(m + 1) * y + tl.load(m + 2) * z
    dy = tl.load(m + 3) * x + tl.load(m + 4) * y + tl.load(m + 5) * z
    dz = tl.load(m + 6) * x + tl.load(m + 7) * y + tl.load(m + 8) * z
    return dx, dy, dz


@triton.jit
def chord(ox, oy, oz, dx, dy, dz, squared):
    """Where a line enters and leaves the unit sphere, in a quadric's frame; enter > leave means a miss."""
    nearest = tl.div_rn(-(ox * dx + oy * dy + oz * dz), squared)
    ex, ey, ez = ox + nearest * dx, oy + nearest * dy, oz + nearest * dz
    over = 1.0 - (ex * ex + ey * ey + ez * ez)
    reach = tl.sqrt_rn(tl.div_rn(tl.where(over > 0.0, over, 0.0), squared))
    reach = tl.where(over > 0.0, reach, -INF)
    return nearest - reach, nearest + reach


@triton.jit
def seen_from(quadric, eye, x, y, z):
    """Where rays (x, y, z) from one point enter and leave a quadric; eye: pointer to the point in its frame."""
    dx, dy, dz = turned(quadric, x, y, z)
    squared = dx * dx + dy * dy + dz * dz
    squared = tl.where(squared > TINY, squared, TINY)
    return chord(tl.load(eye), tl.load(eye + 1), tl.load(eye + 2), dx, dy, dz, squared)


@triton.jit
def first_hit(integers, floats, depth, surface, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Fills depth (2,H+1,W+1), inf for sky, and surface (2,H+1,W+1) int32, -1 for sky. Grid: (tiles, 2)."""
    row, column, top, left = tile_of(integers, ROWS, COLUMNS)
    x, y, z = rays_of(integers, floats, row, column)
    deep = tl.full([ROWS * COLUMNS], INF, tl.float32)
    seen = tl.full([ROWS * COLUMNS], -1, tl.int32)
    firsts, outsides = integers + tl.load(integers + FIRST), integers + tl.load(integers + OUTSIDE)
    shells, rounds = integers + tl.load(integers + SHELL), integers + tl.load(integers + ROUND)
    windows, surfaces = integers + tl.load(integers + WINDOWS), integers + tl.load(integers + SURFACE)
    planes, eyes = floats + tl.load(integers + PLANES), floats + tl.load(integers + EYE)
    quadrics = floats + tl.load(integers + QUADRIC)
    for p in range(tl.load(integers + SOLIDS)):
        high, low = tl.load(windows + 4 * p), tl.load(windows + 4 * p + 1)
        west, east = tl.load(windows + 4 * p + 2), tl.load(windows + 4 * p + 3)
        if (high < top + ROWS) & (low > top) & (west < left + COLUMNS) & (east > left):
            shell = tl.load(shells + p)
            begin, end = tl.load(firsts + p), tl.load(firsts + p + 1)
            enter = tl.full([ROWS * COLUMNS], -INF, tl.float32)
            leave = tl.full([ROWS * COLUMNS], INF, tl.float32)
            face = tl.full([ROWS * COLUMNS], 0, tl.int32)
            for k in range(begin, end):
                plane = planes + 4 * k
                slope = x * tl.load(plane) + y * tl.load(plane + 1) + z * tl.load(plane + 2)
                at = tl.div_rn(1.0, slope) * tl.load(plane + 3)
                if tl.load(outsides + k) != 0:
                    at = tl.where(slope < 0.0, at, INF)
                    face = tl.where((at > enter) & (shell == 0), k - begin, face)
                    enter = tl.where(at > enter, at, enter)
                else:
                    at = tl.where(slope > 0.0, at, INF)
                    face = tl.where((at < leave) & (shell != 0), k - begin, face)
                    leave = tl.where(at < leave, at, leave)
            if tl.load(rounds + p) != 0:
                into, out = seen_from(quadrics + 9 * p, eyes + 3 * p, x, y, z)
                face = tl.where(into > enter, end - begin, face)
                enter = tl.where(into > enter, into, enter)
                leave = tl.where(out < leave, out, leave)
            reached = tl.where(shell != 0, leave, enter)
            near = (enter <= leave) & (reached > NEAR) & (reached < deep)
            near = near & (row >= high) & (row < low) & (column >= west) & (column < east)
            deep = tl.where(near, reached, deep)
            seen = tl.where(near, face + tl.load(surfaces + p), seen)
    sky = deep > FAR
    height, width = tl.load(integers + HEIGHT), tl.load(integers + WIDTH)
    place = (tl.program_id(1) * (height + 1) + row) * (width + 1) + column
    inside = (row <= height) & (column <= width)
    tl.store(depth + place, tl.where(sky, INF, deep), mask=inside)
    tl.store(surface + place, tl.where(sky, -1, seen), mask=inside)
