"""Where things stand: rooms, corridors, halls, tables, streets and open country, drawn from one random generator.

All sizes are metres and those of the real world, so that the depth a network learns here is worth something
outside. The camera stands where people, cars and robots carry cameras.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from distill.scenes import things
from distill.scenes.cast import block, cylinder, ellipsoid, ground, turn
from distill.scenes.stage import Light, Stage


def _warmth(stage: Stage, power: float) -> tuple[float, float, float]:
    warm = stage.uniform(-0.25, 0.6)
    return power * (1 + 0.35 * warm), power, power * (1 - 0.5 * warm)


def _shell(stage: Stage, half: tuple[float, float, float], *, plain: float = 0.6) -> None:
    """Floor, ceiling and walls around the origin, floor at 0."""
    hx, hy, hz = half
    wall = stage.material("plain", "noise", "stripes", "bricks", "tiles", "planks", "dots", repeat=(0.8, 3.0), contrast=0.15)
    if stage.chance(plain):
        wall = stage.material("plain", "noise", repeat=(2, 6), base=0.35 + 0.6 * stage.paint(), contrast=0.08)
    floor = stage.material("planks", "tiles", "noise", "checker", "marble", "wood", "plaid", "gravel", repeat=(0.6, 3.0))
    ceiling = stage.material("plain", "tiles", "planks", "noise", repeat=(1.5, 4.0), base=0.5 + 0.4 * stage.paint(), contrast=0.06)
    stage.add(
        block((0, hy, 0), half, wall, shell=True),
        block((0, -0.1, 0), (hx + 1, 0.1, hz + 1), floor, casts=False, axes=turn(stage.rng.choice([0, math.pi / 2, 0.7]))
              if stage.chance(0.3) else None),
        block((0, 2 * hy + 0.09, 0), (hx + 1, 0.1, hz + 1), ceiling, casts=False),
    )
    if stage.chance(0.7):
        trim = stage.material("plain", base=0.2 + 0.7 * stage.paint(), contrast=0.1)
        for sx in (-1, 1):
            stage.add(block((sx * hx, 0.05, 0), (0.015, 0.05, hz), trim), block((0, 0.05, sx * hz), (hx, 0.05, 0.015), trim))


def _wall_place(stage: Stage, hx: float, hz: float, inset: float) -> tuple[float, float, float]:
    """A spot along a wall (x, z) and the yaw that looks away from it."""
    side, along = int(stage.rng.integers(4)), stage.uniform(-0.8, 0.8)
    return [
        (-(hx - inset), along * hz, math.pi / 2), (hx - inset, along * hz, -math.pi / 2),
        (along * hx, -(hz - inset), 0.0), (along * hx, hz - inset, math.pi),
    ][side]


def _decorate(stage: Stage, half: tuple[float, float, float], count: int) -> None:
    """Doors, windows, pictures and screens, flat on the walls."""
    hx, hy, hz = half
    for _ in range(count):
        x, z, yaw = _wall_place(stage, hx, hz, 0.0)
        frame, what = turn(yaw), stage.rng.random()
        edge = stage.material("plain", "wood", contrast=0.2)
        if what < 0.2:
            door = stage.material("wood", "plain", "planks", repeat=(0.8, 2.0))
            stage.part(frame, (x, 0, z), (0, 1.02, 0), (0.45, 1.02, 0.03), door)
            stage.part(frame, (x, 0, z), (0, 1.05, 0), (0.52, 1.05, 0.015), edge)
            stage.add(ellipsoid(np.array([x, 1.0, z]) + np.array([0.36, 0, 0.07]) @ frame, (0.04,) * 3, edge))
        elif what < 0.45:
            wide, tall, middle = stage.uniform(0.4, 1.2), stage.uniform(0.4, 0.7), min(1.5, hy)
            view = stage.material("collage", "noise", "plain", repeat=(2.0, 4.0), wild=stage.chance(0.4), glow=stage.uniform(0.3, 2.5),
                                  base=np.array([0.75, 0.85, 0.95]))
            stage.part(frame, (x, middle, z), (0, 0, 0), (wide, tall, 0.01), view)
            for offset, size in [((0, tall, 0.02), (wide + 0.05, 0.04, 0.05)), ((0, -tall, 0.03), (wide + 0.08, 0.03, 0.09)),
                                 ((-wide, 0, 0.02), (0.04, tall, 0.05)), ((wide, 0, 0.02), (0.04, tall, 0.05)),
                                 ((0, 0, 0.02), (0.025, tall, 0.03))]:
                stage.part(frame, (x, middle, z), offset, size, edge)
            if stage.chance(0.4):
                cloth = stage.material("stripes", "noise", "plain", repeat=(0.15, 0.6))
                for side in (-1, 1):
                    stage.part(frame, (x, middle, z), (side * (wide + 0.1), -0.15, 0.1), (0.18, tall + 0.3, 0.05), cloth)
        else:
            wide, tall = stage.uniform(0.15, 0.7), stage.uniform(0.15, 0.6)
            picture = stage.material("collage", "print", "noise", "plain", repeat=(2 * wide, 2 * wide), tall=tall / wide, wild=True,
                                     glow=1.2 if stage.chance(0.1) else 0.0)
            at = (x, min(stage.uniform(1.2, 1.8), 1.5 * hy), z)
            stage.part(frame, at, (0, 0, 0), (wide, tall, 0.02), picture)
            if stage.chance(0.6):
                stage.part(frame, at, (0, 0, 0), (wide + 0.03, tall + 0.03, 0.015), edge)


def _lamps(stage: Stage, half: tuple[float, float, float], count: int) -> None:
    """Ceiling or standing lamps with their light, and the soft light of everything else."""
    hx, hy, hz = half
    bright = stage.uniform(0.15, 0.55)
    stage.ambient = (_warmth(stage, bright), _warmth(stage, bright * stage.uniform(0.5, 0.9)))
    for _ in range(count):
        x, z = stage.uniform(-0.7, 0.7) * hx, stage.uniform(-0.7, 0.7) * hz
        y = 2 * hy - stage.uniform(0.12, 0.6)
        if stage.chance(0.25):
            y = min(stage.uniform(1.2, 1.9), 2 * hy - 0.3)
            stage.add(cylinder((x, y / 2 - 0.1, z), 0.02, y / 2 - 0.1, stage.material("plain")))
        bulb = stage.material("plain", base=np.array([0.95, 0.9, 0.8]), glow=3.0, contrast=0.05)
        shade = ellipsoid((x, y, z), (0.12, 0.09, 0.12), bulb)
        # The bulb must not stand in its own light.
        stage.add(type(shade)(**{**{f: getattr(shade, f) for f in shade.__dataclass_fields__}, "casts": False}))
        stage.lights.append(Light(place=(x, y, z), colour=_warmth(stage, stage.uniform(0.5, 1.6)), reach=stage.uniform(1.2, 4.0)))


def _furnish(stage: Stage, hx: float, hz: float, count: int) -> None:
    kinds = list(things.INDOOR.items())
    for _ in range(count):
        thing, radius = kinds[int(stage.rng.integers(len(kinds)))]
        if stage.chance(0.65):
            inset = {things.shelf: 0.25, things.cabinet: 0.4, things.bed: 1.1, things.sofa: 0.55}.get(thing, radius)
            x, z, yaw = _wall_place(stage, hx, hz, inset)
            yaw += float(stage.rng.normal(0, 0.05))
        else:
            x, z, yaw = stage.uniform(-0.8, 0.8) * hx, stage.uniform(-0.8, 0.8) * hz, stage.uniform(0, 7)
        if abs(x) + radius * 0.6 < hx and abs(z) + radius * 0.6 < hz and stage.free(x, z, radius):
            thing(stage, (x, 0.0, z), yaw)


def _indoor_camera(stage: Stage, half: tuple[float, float, float], *, back: float) -> None:
    """A camera near the edge, looking across."""
    hx, hy, hz = half
    angle = stage.uniform(0, 2 * math.pi)
    x, z = math.sin(angle) * hx * back, math.cos(angle) * hz * back
    height = min(stage.uniform(0.5, 1.9), 2 * hy - 0.3)
    aim_x, aim_z = stage.uniform(-0.6, 0.6) * hx, stage.uniform(-0.6, 0.6) * hz
    yaw = math.atan2(aim_x - x, aim_z - z)
    pitch = float(np.clip(stage.rng.normal(-0.12, 0.16), -0.7, 0.4))
    stage.taken.append((x, z, 0.7))
    stage.look((x, height, z), yaw, pitch, fov=(48, 92))


def room(stage: Stage) -> None:
    """A furnished room."""
    half = (stage.uniform(1.3, 4.0), stage.uniform(1.15, 1.7), stage.uniform(1.3, 4.5))
    _shell(stage, half)
    _indoor_camera(stage, half, back=stage.uniform(0.6, 0.88))
    _decorate(stage, half, int(stage.rng.integers(3, 10)))
    _lamps(stage, half, int(stage.rng.integers(1, 4)))
    _furnish(stage, half[0], half[2], int(stage.rng.integers(10, 30)))


def hall(stage: Stage) -> None:
    """A shop, warehouse, garage or lobby: large, with columns and rows of things."""
    half = (stage.uniform(4, 14), stage.uniform(1.5, 4.0), stage.uniform(6, 22))
    _shell(stage, half, plain=0.4)
    _indoor_camera(stage, half, back=stage.uniform(0.5, 0.9))
    _lamps(stage, half, int(stage.rng.integers(2, 5)))
    _decorate(stage, half, int(stage.rng.integers(4, 12)))
    column = stage.material("plain", "noise", "tiles", "stripes", "marble", repeat=(0.5, 2.0))
    pitch, thick, round_ = stage.uniform(3, 6), stage.uniform(0.12, 0.4), stage.chance(0.5)
    for x in np.arange(-half[0] + pitch, half[0] - 1, pitch):
        for z in np.arange(-half[2] + pitch, half[2] - 1, pitch):
            if stage.chance(0.8) and stage.free(float(x), float(z), thick * 1.5):
                stage.add(cylinder((x, half[1], z), thick, half[1], column) if round_
                          else block((x, half[1], z), (thick, half[1], thick), column))
    stock = [things.shelf, things.crates, things.cabinet, things.crates, things.person, things.table, things.plant, things.car]
    kinds = [stock[int(k)] for k in stage.rng.integers(0, len(stock), 4)]
    for _ in range(int(stage.rng.integers(15, 45))):
        thing = kinds[int(stage.rng.integers(4))]
        x, z = stage.uniform(-0.9, 0.9) * half[0], stage.uniform(-0.9, 0.9) * half[2]
        if stage.free(x, z, 2.4 if thing is things.car else 0.9):
            thing(stage, (x, 0.0, z), float(stage.rng.choice([0, math.pi / 2, math.pi, -math.pi / 2])))


def corridor(stage: Stage) -> None:
    """A passage with doors, lamps and the odd obstacle."""
    half = (stage.uniform(0.7, 1.6), stage.uniform(1.1, 1.6), stage.uniform(4, 20))
    _shell(stage, half)
    hx, hy, hz = half
    door = stage.material("wood", "plain", "planks", repeat=(0.8, 2.0))
    edge = stage.material("plain", contrast=0.1)
    lamp = stage.material("plain", base=np.array([0.95, 0.93, 0.9]), glow=stage.uniform(1.0, 3.0), contrast=0.03)
    for side in (-1, 1):
        at = -hz + stage.uniform(0.5, 2)
        while at < hz:
            stage.add(block((side * hx, 1.02, at), (0.03, 1.02, 0.43), door), block((side * hx, 1.06, at), (0.015, 1.06, 0.5), edge))
            at += stage.uniform(1.6, 4.5)
    gap = stage.uniform(1.8, 4.0)
    for index, z in enumerate(np.arange(-hz + gap / 2, hz, gap)):
        stage.add(block((0, 2 * hy - 0.02, z), (0.25 * hx, 0.02, 0.3), lamp, casts=False))
        if index % max(1, int(hz / gap)) == 0 or stage.chance(0.1):
            stage.lights.append(Light(place=(0.0, 2 * hy - 0.15, float(z)), colour=_warmth(stage, stage.uniform(0.4, 1.2)), reach=stage.uniform(1.5, 4)))
    stage.lights = stage.lights[:4]
    bright = stage.uniform(0.2, 0.6)
    stage.ambient = (_warmth(stage, bright), _warmth(stage, bright * 0.7))
    z = -hz * stage.uniform(0.3, 0.9)
    stage.taken.append((0.0, z, 0.8))
    stage.look((stage.uniform(-0.4, 0.4) * hx, stage.uniform(0.6, 1.8), z), float(stage.rng.normal(0, 0.25)),
               float(stage.rng.normal(-0.06, 0.1)), fov=(50, 90))
    _decorate(stage, half, int(stage.rng.integers(1, 8)))
    for _ in range(int(stage.rng.integers(1, 12))):
        thing = [things.crates, things.plant, things.person, things.clutter, things.chair, things.cabinet][int(stage.rng.integers(6))]
        x, z = float(stage.rng.choice([-1, 1])) * (hx - 0.35), stage.uniform(-0.9, 0.9) * hz
        if stage.free(x, z, 0.45):
            thing(stage, (x, 0.0, z), math.pi / 2 if x < 0 else -math.pi / 2)


def table(stage: Stage) -> None:
    """Small things on a table top, close up, with a room behind."""
    half = (stage.uniform(1.4, 3.5), stage.uniform(1.15, 1.6), stage.uniform(1.4, 3.5))
    _shell(stage, half)
    _decorate(stage, half, int(stage.rng.integers(2, 8)))
    _lamps(stage, half, int(stage.rng.integers(1, 3)))
    high, long, deep = stage.uniform(0.4, 0.95), stage.uniform(0.45, 0.95), stage.uniform(0.35, 0.7)
    top = stage.material("wood", "planks", "plain", "marble", "tiles", "noise", "plaid", "checker", repeat=(0.3, 1.5))
    stage.add(block((0, high - 0.03, 0), (long, 0.03, deep), top), block((0, high / 2 - 0.03, 0), (long * 0.8, high / 2 - 0.03, deep * 0.7), top))
    stage.taken.append((0.0, 0.0, max(long, deep) + 0.3))
    angle, distance = stage.uniform(0, 2 * math.pi), stage.uniform(0.6, 1.3)
    x, z = math.sin(angle) * min(distance, half[0] - 0.2), math.cos(angle) * min(distance, half[2] - 0.2)
    height = high + stage.uniform(0.15, 0.75)
    down = -math.atan2(height - high, math.hypot(x, z)) + stage.uniform(-0.15, 0.25)
    stage.look((x, height, z), math.atan2(-x, -z) + stage.uniform(-0.25, 0.25), down, fov=(45, 80))
    stage.taken.append((x, z, 0.5))
    spots: list[tuple[float, float, float]] = []
    for _ in range(int(stage.rng.integers(6, 30))):
        size = stage.uniform(0.05, 0.28)
        sx, sz = stage.uniform(-0.85, 0.85) * long, stage.uniform(-0.85, 0.85) * deep
        if math.hypot(sx - x, sz - z) < 0.2 + size or any(math.hypot(sx - a, sz - b) < 0.45 * (size + c) for a, b, c in spots):
            continue
        spots.append((sx, sz, size))
        things.small(stage, (sx, high, sz), size)
    _furnish(stage, half[0], half[2], 10)


def _outdoors(stage: Stage) -> None:
    """Sun, sky, haze and the light that they give."""
    blue = np.array([0.18, 0.36, 0.78]) * stage.uniform(0.5, 1.3)
    horizon = np.array([0.7, 0.78, 0.88]) * stage.uniform(0.6, 1.1)
    height, overcast = stage.uniform(0.12, 1.3), stage.chance(0.3)
    sun = np.array([1.0, 0.93, 0.82]) * stage.uniform(1.2, 2.6)
    if height < 0.35:
        sun, horizon = sun * np.array([1.0, 0.72, 0.45]), horizon * np.array([1.15, 0.9, 0.72])
    if overcast:
        grey = stage.uniform(0.4, 0.9)
        blue, horizon, sun = np.array([grey] * 3) * 0.85, np.array([grey] * 3), sun * stage.uniform(0.0, 0.2)
    direction = stage.uniform(0, 2 * math.pi)
    place = (math.cos(height) * math.sin(direction), math.sin(height), math.cos(height) * math.cos(direction))
    stage.lights.append(Light(place=place, colour=tuple(sun.tolist()), sun=True))
    stage.sky = (tuple(horizon.tolist()), tuple(blue.tolist()))
    stage.clouds = 0.0 if stage.chance(0.25) else stage.uniform(0.1, 1.0)
    fill = (0.3 * blue + 0.35 * horizon) * stage.uniform(0.7, 1.2) * (1.6 if overcast else 1.0)
    stage.ambient = (tuple(fill.tolist()), tuple((0.45 * fill).tolist()))
    stage.haze = 0.0 if stage.chance(0.4) else stage.uniform(40, 600)


def street(stage: Stage) -> None:
    """A road between houses, with cars, trees, posts and people."""
    _outdoors(stage)
    road, walk, wide = stage.uniform(2.8, 6.5), stage.uniform(1.2, 4.0), 0.0
    asphalt = stage.material("noise", "gravel", repeat=(1.5, 4), base=np.full(3, stage.uniform(0.06, 0.28)), contrast=0.25)
    paving = stage.material("tiles", "bricks", "noise", "gravel", "grass", repeat=(1.0, 3.0))
    stage.add(ground(asphalt))
    mark = stage.material("noise", repeat=(0.5, 1.0), base=np.array([0.7, 0.7, 0.65]), contrast=0.15)
    if stage.chance(0.75):
        step = stage.uniform(4, 9)
        for z in np.arange(-8, 90, step):
            stage.add(block((0, 0.002, z), (0.07, 0.004, step * 0.25), mark, casts=False))
    for side in (-1, 1):
        stage.add(block((side * (road + walk + 15), 0.06, 100), (walk / 2 + 15 + walk / 2, 0.06, 200), paving, casts=False))
    wide = road + walk
    # On the road as a driver sees it, or on the pavement as a walker does.
    driver = stage.chance(0.5)
    x = stage.uniform(-0.6, 0.6) * road if driver else float(stage.rng.choice([-1, 1])) * (road + walk * stage.uniform(0.2, 0.7))
    yaw = float(stage.rng.normal(0, 0.15 if driver else 0.45)) - (0 if driver else math.copysign(0.25, x))
    stage.look((x, stage.uniform(1.2, 2.2), 0.0), yaw, float(stage.rng.normal(-0.03, 0.08)), fov=(50, 90))
    stage.taken.append((x, 0.0, 2.6))
    for side in (-1, 1):
        z = -14.0
        while z < 110:
            length, depth = stage.uniform(3, 11), stage.uniform(3, 8)
            height = stage.uniform(2.5, 5) if stage.chance(0.4) else stage.uniform(5, 16)
            setback = stage.uniform(0, 1.5)
            if stage.chance(0.88):
                things.house(stage, (side * (wide + depth + setback), 0.1, z + length), math.pi / 2, (length, height, depth))
            elif stage.chance(0.8):
                things.tree(stage, (side * (wide + depth), 0.1, z + length), 0.0)
            z += 2 * length + (stage.uniform(0, 6) if stage.chance(0.3) else 0.0)
    _dress_street(stage, road, walk)


def _dress_street(stage: Stage, road: float, walk: float) -> None:
    for _ in range(int(stage.rng.integers(3, 16))):
        side = float(stage.rng.choice([-1, 1]))
        x, z = side * (road - stage.uniform(1.0, 1.3)), stage.uniform(-6, 60) ** 1.0
        if stage.chance(0.2):
            x = side * road * 0.4
        if stage.free(x, z, 2.6):
            things.car(stage, (x, 0.0, z), (0.0 if side > 0 else math.pi) + float(stage.rng.normal(0, 0.04)))
    kinds = [things.tree, things.post, things.person, things.post, things.person, things.tree, things.crates, things.table]
    for _ in range(int(stage.rng.integers(6, 30))):
        thing = kinds[int(stage.rng.integers(len(kinds)))]
        side = float(stage.rng.choice([-1, 1]))
        x, z = side * (road + stage.uniform(0.15, 0.85) * walk), stage.uniform(-4, 50)
        if stage.free(x, z, 0.6):
            thing(stage, (x, 0.12, z), 0.0 if side > 0 else math.pi)


def country(stage: Stage) -> None:
    """Fields, hills, rocks, trees, a fence, a path, a house or two."""
    _outdoors(stage)
    green = np.array([0.16, 0.24, 0.06]) if stage.chance(0.65) else np.array([0.4, 0.32, 0.2])
    grass = stage.material("grass", "noise", "gravel", "blotches", repeat=(1.0, 5.0), base=green * stage.uniform(0.5, 1.7), contrast=0.6)
    stage.add(ground(grass, axes=turn(stage.uniform(0, 3))))
    height = stage.uniform(0.8, 2.2)
    stage.taken.append((0.0, 0.0, 2.5))
    pitch = float(stage.rng.normal(-0.05, 0.1))
    if stage.chance(0.15):
        height, pitch = stage.uniform(3, 15), -stage.uniform(0.1, 0.5)
    stage.look((0.0, height, 0.0), 0.0, pitch, fov=(48, 90))
    if stage.chance(0.5):
        path = stage.material("gravel", "noise", "tiles", repeat=(1.0, 3.0))
        stage.add(block((stage.uniform(-2, 2), 0.0, 60), (stage.uniform(0.5, 2), 0.01, 90), path, casts=False, axes=turn(stage.uniform(-0.3, 0.3))))
    for _ in range(int(stage.rng.integers(0, 9))):
        far = stage.uniform(15, 350)
        span = far * stage.uniform(0.15, 0.5)
        x, z = stage.uniform(-1, 1) * far, far + span
        hill = stage.material("grass", "noise", "blotches", "gravel", repeat=(far / 30 + 1, far / 8 + 2), base=green * stage.uniform(0.5, 1.5), contrast=0.5)
        stage.add(ellipsoid((x, -span * 0.1, z), (span, span * stage.uniform(0.2, 0.6), span * stage.uniform(0.5, 0.9)), hill, axes=turn(stage.uniform(-1, 1))))
    stone = stage.material("noise", "marble", "gravel", repeat=(0.5, 3.0), contrast=0.6)
    for _ in range(int(stage.rng.integers(3, 25))):
        z = 1.5 + 50 * stage.rng.random() ** 2
        x, size = stage.uniform(-0.9, 0.9) * (z + 1), stage.uniform(0.1, 0.8) * (0.5 + z / 15)
        if stage.free(x, z, size):
            half = [size * stage.uniform(0.4, 1.0) for _ in range(3)]
            frame = turn(*stage.rng.uniform(-0.5, 3, 3))
            stage.add(ellipsoid((x, half[1] * 0.3, z), half, stone, axes=frame) if stage.chance(0.5)
                      else block((x, half[1] * 0.3, z), half, stone, axes=frame, top=(stage.uniform(0.4, 1), stage.uniform(0.4, 1))))
    for _ in range(int(stage.rng.integers(4, 45))):
        z = 3 + 90 * stage.rng.random() ** 1.5
        x = stage.uniform(-0.9, 0.9) * (z + 2)
        if stage.free(x, z, 1.5):
            things.tree(stage, (x, 0.0, z), stage.uniform(0, 3))
    for _ in range(int(stage.rng.integers(0, 4))):
        z = stage.uniform(14, 70)
        x = stage.uniform(-0.8, 0.8) * z
        if stage.free(x, z, 9.0):
            things.house(stage, (x, 0.0, z), stage.uniform(0, 3), (stage.uniform(3, 7), stage.uniform(1.5, 3.5), stage.uniform(3, 5)))
    if stage.chance(0.4):
        _fence(stage)
    for _ in range(int(stage.rng.integers(0, 4))):
        z = stage.uniform(3, 25)
        x = stage.uniform(-0.6, 0.6) * z
        if stage.free(x, z, 2.6):
            (things.person if stage.chance(0.6) else things.car)(stage, (x, 0.0, z), stage.uniform(0, 7))


def _fence(stage: Stage) -> None:
    wood, frame = stage.material("wood", "planks", "plain", repeat=(0.5, 1.5)), turn(stage.uniform(-0.5, 0.5))
    at, step = (stage.uniform(-3, 3), 0.0, stage.uniform(4, 14)), stage.uniform(1.2, 2.5)
    for index in range(-8, 9):
        stage.part(frame, at, (index * step, 0.55, 0), (0.05, 0.55, 0.05), wood)
    for height in (0.45, 0.9):
        stage.part(frame, at, (0, height, 0.06), (8 * step, 0.05, 0.02), wood)


KINDS: dict[str, Callable[[Stage], None]] = {
    "room": room, "corridor": corridor, "street": street, "country": country, "table": table, "hall": hall,
}
