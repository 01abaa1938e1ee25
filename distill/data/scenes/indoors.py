"""Rooms, corridors, halls and table tops: four walls around the origin, the floor at height 0.

All sizes are real-world sizes in metres, so that the depth learnt here transfers to photographs. The camera is placed
where people and robots carry cameras.
"""

from __future__ import annotations

import math

import numpy as np

from distill.data.scenes import furniture
from distill.data.scenes.cast import block, cylinder, ellipsoid, turn
from distill.data.scenes.roadside import car
from distill.data.scenes.stage import Light, Stage


def _shell(stage: Stage, half: tuple[float, float, float], *, plain: float = 0.6) -> None:
    """Add floor, ceiling and walls around the origin, floor at height 0."""
    hx, hy, hz = stage.bounds = half
    wall = stage.material(
        "plain", "noise", "stripes", "bricks", "tiles", "planks", "dots", repeat=(0.8, 3.0), contrast=0.15, wear=0.6
    )
    if stage.chance(plain):
        wall = stage.material("plain", "noise", repeat=(2, 6), base=0.3 + 0.6 * stage.paint(), contrast=0.05, wear=0.3)
    floor = stage.material(
        "planks", "tiles", "noise", "checker", "marble", "wood", "plaid", "gravel", repeat=(0.6, 3.0)
    )
    ceiling = stage.material(
        "plain", "tiles", "planks", "noise", repeat=(1.5, 4.0), base=0.5 + 0.4 * stage.paint(), contrast=0.04, wear=0.3
    )
    stage.add(
        block((0, hy, 0), half, wall, shell=True),
        block(
            (0, -0.1, 0),
            (hx + 1, 0.1, hz + 1),
            floor,
            casts=False,
            axes=turn(stage.rng.choice([0, math.pi / 2, 0.7])) if stage.chance(0.3) else None,
        ),
        block((0, 2 * hy + 0.09, 0), (hx + 1, 0.1, hz + 1), ceiling, casts=False),
    )
    if stage.chance(0.7):
        trim = stage.material("plain", base=0.2 + 0.7 * stage.paint(), contrast=0.1)
        for sx in (-1, 1):
            stage.add(
                block((sx * hx, 0.05, 0), (0.015, 0.05, hz), trim), block((0, 0.05, sx * hz), (hx, 0.05, 0.015), trim)
            )


def _wall_place(stage: Stage, hx: float, hz: float, inset: float) -> tuple[float, float, float]:
    """A random place along a wall (x, z), and the yaw that faces away from the wall."""
    side, along = int(stage.rng.integers(4)), stage.uniform(-0.8, 0.8)
    return [
        (-(hx - inset), along * hz, math.pi / 2),
        (hx - inset, along * hz, -math.pi / 2),
        (along * hx, -(hz - inset), 0.0),
        (along * hx, hz - inset, math.pi),
    ][side]


def _decorate(stage: Stage, half: tuple[float, float, float], count: int) -> None:
    """Add doors, windows, pictures, screens and wall shelves."""
    edge = stage.material("plain", "wood", contrast=0.2)
    for _ in range(count):
        x, z, yaw = _wall_place(stage, half[0], half[2], 0.0)
        kind = float(stage.rng.random())
        if kind < 0.15:
            _door(stage, (x, 0.0, z), yaw, edge)
        elif kind < 0.35:
            _window(stage, (x, min(1.5, half[1]), z), yaw, edge)
        elif kind < 0.75:
            _picture(stage, (x, min(stage.uniform(1.2, 1.8), 1.5 * half[1]), z), yaw, edge)
        else:
            _wall_shelf(stage, (x, min(stage.uniform(0.9, 1.7), 1.5 * half[1]), z), yaw)


def _door(stage: Stage, at: tuple[float, float, float], yaw: float, edge: int) -> None:
    frame, door = turn(yaw), stage.material("wood", "plain", "planks", repeat=(0.8, 2.0))
    stage.part(frame, at, (0, 1.02, 0), (0.45, 1.02, 0.03), door)
    stage.part(frame, at, (0, 1.05, 0), (0.52, 1.05, 0.015), edge)
    stage.add(ellipsoid(np.asarray(at) + np.array([0.36, 1.0, 0.07]) @ frame, (0.04,) * 3, edge))


def _window(stage: Stage, at: tuple[float, float, float], yaw: float, edge: int) -> None:
    frame, wide, tall = turn(yaw), stage.uniform(0.4, 1.2), stage.uniform(0.4, 0.7)
    view = stage.material(
        "collage",
        "noise",
        "plain",
        repeat=(2.0, 4.0),
        wild=stage.chance(0.2),
        glow=stage.uniform(0.3, 2.5),
        base=np.array([0.75, 0.85, 0.95]),
    )
    stage.part(frame, at, (0, 0, 0), (wide, tall, 0.01), view)
    for x, y, depth, half in [
        (0, tall, 0.02, (wide + 0.05, 0.04, 0.05)),
        (0, -tall, 0.03, (wide + 0.08, 0.03, 0.09)),
        (-wide, 0, 0.02, (0.04, tall, 0.05)),
        (wide, 0, 0.02, (0.04, tall, 0.05)),
        (0, 0, 0.02, (0.025, tall, 0.03)),
    ]:
        stage.part(frame, at, (x, y, depth), half, edge)
    if stage.chance(0.5):
        cloth = stage.material("stripes", "noise", "plain", repeat=(0.15, 0.6))
        for side in (-1, 1):
            stage.part(frame, at, (side * (wide + 0.1), -0.15, 0.1), (0.18, tall + 0.3, 0.05), cloth)


def _picture(stage: Stage, at: tuple[float, float, float], yaw: float, edge: int) -> None:
    frame, wide, tall = turn(yaw), stage.uniform(0.12, 0.7), stage.uniform(0.12, 0.6)
    lit = 1.2 if stage.chance(0.1) else 0.0
    size = (2 * wide, 2 * wide)
    picture = stage.material("collage", "print", "noise", repeat=size, tall=tall / wide, wild=True, glow=lit)
    stage.part(frame, at, (0, 0, 0), (wide, tall, 0.02), picture)
    if stage.chance(0.6):
        stage.part(frame, at, (0, 0, 0), (wide + 0.03, tall + 0.03, 0.015), edge)


def _wall_shelf(stage: Stage, at: tuple[float, float, float], yaw: float) -> None:
    frame, wide = turn(yaw), stage.uniform(0.3, 0.9)
    wood = stage.material("wood", "plain")
    cupboard = stage.chance(0.4)
    tall = stage.uniform(0.2, 0.4) if cupboard else 0.015
    stage.part(frame, at, (0, 0, 0.15), (wide, tall, 0.15), wood)
    for _ in range(0 if cupboard else int(stage.rng.integers(1, 6))):
        x, y, z = (np.asarray(at) + np.array([stage.uniform(-0.85, 0.85) * wide, 0.015, 0.14]) @ frame).tolist()
        furniture.small(stage, (x, y, z), stage.uniform(0.1, 0.3))


def _lamps(stage: Stage, half: tuple[float, float, float], count: int) -> None:
    """Add ceiling or standing lamps with their lights, and ambient light."""
    hx, hy, hz = half
    bright = stage.uniform(0.15, 0.55)
    stage.ambient = (stage.warmth(bright), stage.warmth(bright * stage.uniform(0.5, 0.9)))
    for _ in range(count):
        x, z = stage.uniform(-0.7, 0.7) * hx, stage.uniform(-0.7, 0.7) * hz
        y = 2 * hy - stage.uniform(0.12, 0.6)
        if stage.chance(0.25):
            y = min(stage.uniform(1.2, 1.9), 2 * hy - 0.3)
            stage.add(cylinder((x, y / 2 - 0.1, z), 0.02, y / 2 - 0.1, stage.material("plain")))
        bulb = stage.material("plain", base=np.array([0.95, 0.9, 0.8]), glow=3.0, contrast=0.05)
        stage.add(
            ellipsoid((x, y, z), (0.12, 0.09, 0.12), bulb, casts=False)
        )  # else the bulb would shadow its own light
        stage.lights.append(
            Light(place=(x, y, z), colour=stage.warmth(stage.uniform(0.5, 1.6)), reach=stage.uniform(1.2, 4.0))
        )


_INSETS: dict[furniture.Thing, float] = {
    furniture.shelf: 0.25,
    furniture.cabinet: 0.4,
    furniture.bed: 1.1,
    furniture.sofa: 0.55,
    furniture.counter: 0.35,
    furniture.desk: 0.4,
}


def _furnish(stage: Stage, hx: float, hz: float, count: int) -> None:
    """Add furniture along the walls and on the floor, as much as fits; sometimes a rug."""
    if stage.chance(0.4):
        rug = stage.material("plaid", "dots", "stripes", "noise", "collage", "blotches", repeat=(0.5, 2.5))
        spot = (stage.uniform(-0.4, 0.4) * hx, 0.0, stage.uniform(-0.4, 0.4) * hz)
        stage.part(turn(stage.uniform(-0.2, 0.2)), spot, (0, 0, 0), (0.45 * hx, 0.012, 0.4 * hz), rug)
    kinds = list(furniture.INDOOR.items())
    for _ in range(count):
        thing, radius = kinds[int(stage.rng.integers(len(kinds)))]
        if stage.chance(0.65):
            inset = _INSETS.get(thing, radius)
            x, z, yaw = _wall_place(stage, hx, hz, inset)
            yaw += float(stage.rng.normal(0, 0.05))
        else:
            x, z, yaw = stage.uniform(-0.8, 0.8) * hx, stage.uniform(-0.8, 0.8) * hz, stage.uniform(0, 7)
        if abs(x) + radius * 0.6 < hx and abs(z) + radius * 0.6 < hz and stage.free(x, z, radius):
            thing(stage, (x, 0.0, z), yaw)


def _indoor_camera(stage: Stage, half: tuple[float, float, float], *, back: float) -> None:
    """Place the camera near a wall, looking across the room."""
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
    _decorate(stage, half, int(stage.rng.integers(4, 16)))
    _lamps(stage, half, int(stage.rng.integers(1, 4)))
    _furnish(stage, half[0], half[2], int(stage.rng.integers(30, 120)))


def hall(stage: Stage) -> None:
    """A shop, warehouse, garage or lobby: large, with columns and rows of furniture."""
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
                stage.add(
                    cylinder((x, half[1], z), thick, half[1], column)
                    if round_
                    else block((x, half[1], z), (thick, half[1], thick), column)
                )
    stock = [
        furniture.shelf,
        furniture.crates,
        furniture.cabinet,
        furniture.crates,
        furniture.person,
        furniture.table,
        furniture.plant,
        car,
    ]
    kinds = [stock[int(k)] for k in stage.rng.integers(0, len(stock), 4)]
    for _ in range(int(stage.rng.integers(25, 70))):
        thing = kinds[int(stage.rng.integers(4))]
        x, z = stage.uniform(-0.9, 0.9) * half[0], stage.uniform(-0.9, 0.9) * half[2]
        if stage.free(x, z, 2.4 if thing is car else 0.9):
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
            stage.add(
                block((side * hx, 1.02, at), (0.03, 1.02, 0.43), door),
                block((side * hx, 1.06, at), (0.015, 1.06, 0.5), edge),
            )
            at += stage.uniform(1.6, 4.5)
    gap = stage.uniform(1.8, 4.0)
    for index, z in enumerate(np.arange(-hz + gap / 2, hz, gap)):
        stage.add(block((0, 2 * hy - 0.02, z), (0.25 * hx, 0.02, 0.3), lamp, casts=False))
        if index % max(1, int(hz / gap)) == 0 or stage.chance(0.1):
            stage.lights.append(
                Light(
                    place=(0.0, 2 * hy - 0.15, float(z)),
                    colour=stage.warmth(stage.uniform(0.4, 1.2)),
                    reach=stage.uniform(1.5, 4),
                )
            )
    stage.lights = stage.lights[:4]
    bright = stage.uniform(0.2, 0.6)
    stage.ambient = (stage.warmth(bright), stage.warmth(bright * 0.7))
    z = -hz * stage.uniform(0.3, 0.9)
    stage.taken.append((0.0, z, 0.8))
    stage.look(
        (stage.uniform(-0.4, 0.4) * hx, stage.uniform(0.6, 1.8), z),
        float(stage.rng.normal(0, 0.25)),
        float(stage.rng.normal(-0.06, 0.1)),
        fov=(50, 90),
    )
    _decorate(stage, half, int(stage.rng.integers(1, 8)))
    for _ in range(int(stage.rng.integers(1, 12))):
        thing = [
            furniture.crates,
            furniture.plant,
            furniture.person,
            furniture.clutter,
            furniture.chair,
            furniture.cabinet,
        ][int(stage.rng.integers(6))]
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
    stage.add(
        block((0, high - 0.03, 0), (long, 0.03, deep), top),
        block((0, high / 2 - 0.03, 0), (long * 0.8, high / 2 - 0.03, deep * 0.7), top),
    )
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
        if math.hypot(sx - x, sz - z) < 0.2 + size or any(
            math.hypot(sx - a, sz - b) < 0.45 * (size + c) for a, b, c in spots
        ):
            continue
        spots.append((sx, sz, size))
        furniture.small(stage, (sx, high, sz), size)
    _furnish(stage, half[0], half[2], 10)
