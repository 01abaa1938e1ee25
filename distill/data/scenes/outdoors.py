"""Streets and open country under a sun: camera near the origin, looking along +z, ground at height 0."""

from __future__ import annotations

import math

import numpy as np

from distill.data.scenes import roadside
from distill.data.scenes.cast import block, ellipsoid, ground, turn
from distill.data.scenes.furniture import crates, person, table
from distill.data.scenes.stage import Light, Stage


def _outdoors(stage: Stage) -> None:
    """Set up sun, sky, haze and ambient light."""
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
    asphalt = stage.material(
        "noise", "gravel", repeat=(1.5, 4), base=np.full(3, stage.uniform(0.06, 0.28)), contrast=0.25
    )
    paving = stage.material("tiles", "bricks", "noise", "gravel", "grass", repeat=(1.0, 3.0))
    stage.add(ground(asphalt))
    mark = stage.material("noise", repeat=(0.5, 1.0), base=np.array([0.7, 0.7, 0.65]), contrast=0.15)
    if stage.chance(0.75):
        step = stage.uniform(4, 9)
        for z in np.arange(-8, 90, step):
            stage.add(block((0, 0.002, z), (0.07, 0.004, step * 0.25), mark, casts=False))
    for side in (-1, 1):
        stage.add(
            block((side * (road + walk + 15), 0.06, 100), (walk / 2 + 15 + walk / 2, 0.06, 200), paving, casts=False)
        )
    wide = road + walk
    # The view of a driver on the road, or of a pedestrian on the pavement.
    driver = stage.chance(0.5)
    x = (
        stage.uniform(-0.6, 0.6) * road
        if driver
        else float(stage.rng.choice([-1, 1])) * (road + walk * stage.uniform(0.2, 0.7))
    )
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
                roadside.house(
                    stage, (side * (wide + depth + setback), 0.1, z + length), math.pi / 2, (length, height, depth)
                )
            elif stage.chance(0.8):
                roadside.tree(stage, (side * (wide + depth), 0.1, z + length), 0.0)
            z += 2 * length + (stage.uniform(0, 6) if stage.chance(0.3) else 0.0)
    _dress_street(stage, road, walk)


def _dress_street(stage: Stage, road: float, walk: float) -> None:
    for _ in range(int(stage.rng.integers(3, 16))):
        side = float(stage.rng.choice([-1, 1]))
        x, z = side * (road - stage.uniform(1.0, 1.3)), stage.uniform(-6, 60)
        if stage.chance(0.2):
            x = side * road * 0.4
        if stage.free(x, z, 2.6):
            roadside.car(stage, (x, 0.0, z), (0.0 if side > 0 else math.pi) + float(stage.rng.normal(0, 0.04)))
    kinds = [
        roadside.tree,
        roadside.post,
        person,
        roadside.post,
        person,
        roadside.tree,
        crates,
        table,
    ]
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
    grass = stage.material(
        "grass", "noise", "gravel", "blotches", repeat=(1.0, 5.0), base=green * stage.uniform(0.5, 1.7), contrast=0.6
    )
    stage.add(ground(grass, axes=turn(stage.uniform(0, 3))))
    height = stage.uniform(0.8, 2.2)
    stage.taken.append((0.0, 0.0, 2.5))
    pitch = float(stage.rng.normal(-0.05, 0.1))
    if stage.chance(0.15):
        height, pitch = stage.uniform(3, 15), -stage.uniform(0.1, 0.5)
    stage.look((0.0, height, 0.0), 0.0, pitch, fov=(48, 90))
    if stage.chance(0.5):
        path = stage.material("gravel", "noise", "tiles", repeat=(1.0, 3.0))
        stage.add(
            block(
                (stage.uniform(-2, 2), 0.0, 60),
                (stage.uniform(0.5, 2), 0.01, 90),
                path,
                casts=False,
                axes=turn(stage.uniform(-0.3, 0.3)),
            )
        )
    _hills(stage, green)
    _rocks(stage)
    for _ in range(int(stage.rng.integers(4, 45))):
        z = 3 + 90 * stage.rng.random() ** 1.5
        x = stage.uniform(-0.9, 0.9) * (z + 2)
        if stage.free(x, z, 1.5):
            roadside.tree(stage, (x, 0.0, z), stage.uniform(0, 3))
    for _ in range(int(stage.rng.integers(0, 4))):
        z = stage.uniform(14, 70)
        x = stage.uniform(-0.8, 0.8) * z
        if stage.free(x, z, 9.0):
            roadside.house(
                stage,
                (x, 0.0, z),
                stage.uniform(0, 3),
                (stage.uniform(3, 7), stage.uniform(1.5, 3.5), stage.uniform(3, 5)),
            )
    if stage.chance(0.4):
        _fence(stage)
    for _ in range(int(stage.rng.integers(0, 4))):
        z = stage.uniform(3, 25)
        x = stage.uniform(-0.6, 0.6) * z
        if stage.free(x, z, 2.6):
            (person if stage.chance(0.6) else roadside.car)(stage, (x, 0.0, z), stage.uniform(0, 7))


def _hills(stage: Stage, green: np.ndarray) -> None:
    for _ in range(int(stage.rng.integers(0, 9))):
        far = stage.uniform(15, 350)
        span = far * stage.uniform(0.15, 0.5)
        x, z = stage.uniform(-1, 1) * far, far + span
        hill = stage.material(
            "grass",
            "noise",
            "blotches",
            "gravel",
            repeat=(far / 30 + 1, far / 8 + 2),
            base=green * stage.uniform(0.5, 1.5),
            contrast=0.5,
        )
        stage.add(
            ellipsoid(
                (x, -span * 0.1, z),
                (span, span * stage.uniform(0.2, 0.6), span * stage.uniform(0.5, 0.9)),
                hill,
                axes=turn(stage.uniform(-1, 1)),
            )
        )


def _rocks(stage: Stage) -> None:
    stone = stage.material("noise", "marble", "gravel", repeat=(0.5, 3.0), contrast=0.6)
    for _ in range(int(stage.rng.integers(3, 25))):
        z = 1.5 + 50 * stage.rng.random() ** 2
        x, size = stage.uniform(-0.9, 0.9) * (z + 1), stage.uniform(0.1, 0.8) * (0.5 + z / 15)
        if stage.free(x, z, size):
            half = [size * stage.uniform(0.4, 1.0) for _ in range(3)]
            frame = turn(*stage.rng.uniform(-0.5, 3, 3))
            stage.add(
                ellipsoid((x, half[1] * 0.3, z), half, stone, axes=frame)
                if stage.chance(0.5)
                else block(
                    (x, half[1] * 0.3, z), half, stone, axes=frame, top=(stage.uniform(0.4, 1), stage.uniform(0.4, 1))
                )
            )


def _fence(stage: Stage) -> None:
    wood, frame = stage.material("wood", "planks", "plain", repeat=(0.5, 1.5)), turn(stage.uniform(-0.5, 0.5))
    at, step = (stage.uniform(-3, 3), 0.0, stage.uniform(4, 14)), stage.uniform(1.2, 2.5)
    for index in range(-8, 9):
        stage.part(frame, at, (index * step, 0.55, 0), (0.05, 0.55, 0.05), wood)
    for height in (0.45, 0.9):
        stage.part(frame, at, (0, height, 0.06), (8 * step, 0.05, 0.02), wood)
