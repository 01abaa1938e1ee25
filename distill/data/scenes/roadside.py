"""Cars, trees, posts and houses, each made of a few convex solids at real-world size; arguments as in furniture."""

from __future__ import annotations

import math

import numpy as np

from distill.data.scenes.cast import block, cylinder, ellipsoid, turn
from distill.data.scenes.furniture import Place, at
from distill.data.scenes.stage import Stage


def car(stage: Stage, place: Place, yaw: float) -> None:
    """A parked car or van; its length is along its own z."""
    frame = turn(yaw)
    paint = stage.material("plain", base=stage.paint(vivid=0.5), contrast=0.05, gloss=0.9)
    glass = stage.material("plain", base=np.array([0.03, 0.04, 0.05]), contrast=0.3, gloss=1.0)
    dark = stage.material("plain", base=np.array([0.02, 0.02, 0.02]), contrast=0.3)
    van = stage.chance(0.25)
    wide, long, high = stage.uniform(0.82, 0.95), stage.uniform(1.9, 2.5), stage.uniform(0.62, 0.75)
    stage.part(frame, place, (0, 0.2 + high / 2, 0), (wide, high / 2, long), paint, top=(0.95, 0.97))
    cabin, roof = (long * 0.9, 0.5) if van else (long * stage.uniform(0.5, 0.62), stage.uniform(0.24, 0.34))
    back = 0.0 if van else stage.uniform(-0.35, 0.0)
    stage.part(frame, place, (0, 0.2 + high + roof, back), (wide * 0.93, roof, cabin), glass, top=(0.82, 0.7))
    stage.part(frame, place, (0, 0.2 + high + 2 * roof, back), (wide * 0.78, 0.02, cabin * 0.7), paint)
    light = stage.material("plain", base=np.array([0.9, 0.85, 0.7]), gloss=1.0)
    tail = stage.material("plain", base=np.array([0.6, 0.03, 0.02]), gloss=1.0)
    for sx in (-1, 1):
        for sz in (-1, 1):
            axle = at(place, frame, sx * (wide - 0.08), 0.32, sz * long * 0.62)
            stage.add(cylinder(axle, 0.32, 0.12, dark, axes=turn(yaw, 0, math.pi / 2)))
            lamp = light if sz > 0 else tail
            stage.part(frame, place, (sx * wide * 0.7, 0.2 + high * 0.65, sz * long * 0.985), (0.15, 0.07, 0.03), lamp)


def tree(stage: Stage, place: Place, yaw: float) -> None:
    """A broadleaf tree, a conifer or a bush."""
    x, y, z = place
    tint = np.array([0.1, 0.22, 0.05]) if stage.chance(0.75) else np.array([0.4, 0.22, 0.06])
    leaf = stage.material(
        "gravel", "grass", "noise", repeat=(0.7, 2.5), base=tint * stage.uniform(0.4, 1.6), contrast=0.9, bump=2.5
    )
    bark = stage.material(
        "noise", "planks", base=np.array([0.2, 0.14, 0.1]) * stage.uniform(0.4, 1.5), repeat=(0.3, 1.0)
    )
    high = stage.uniform(2.5, 11)
    kind = stage.rng.random()
    if kind < 0.25:
        stage.add(cylinder((x, y + high * 0.1, z), 0.03 * high, high * 0.1, bark))
        for k in range(3):
            layer = (high * (0.24 - 0.055 * k), high * 0.22, high * (0.24 - 0.055 * k))
            for spin in (0.0, math.pi / 4):
                stage.add(block((x, y + high * (0.36 + 0.2 * k), z), layer, leaf, axes=turn(yaw + spin), top=(0, 0)))
        return
    bush = kind < 0.4
    if bush:
        high = stage.uniform(0.6, 1.8)
    else:
        stage.add(cylinder((x, y + high * 0.25, z), stage.uniform(0.02, 0.035) * high, high * 0.25, bark))
    for _ in range(int(stage.rng.integers(5, 16))):
        a, r = stage.uniform(0, 7), stage.uniform(0, 0.24) * high
        low, top = (0.2, 0.7) if bush else (0.5, 0.85)
        centre = (x + r * math.cos(a), y + high * stage.uniform(low, top), z + r * math.sin(a))
        half = [high * stage.uniform(0.07, 0.2) * (1.5 if bush else 1.0) for _ in range(3)]
        stage.add(ellipsoid(centre, half, leaf, axes=turn(a, stage.uniform(-0.5, 0.5))))


def post(stage: Stage, place: Place, yaw: float) -> None:
    """A street lamp, traffic light or road sign."""
    x, y, z = place
    metal, high = stage.material("plain", contrast=0.1), stage.uniform(2.2, 6.5)
    stage.add(cylinder((x, y + high / 2, z), stage.uniform(0.035, 0.09), high / 2, metal))
    frame = turn(yaw)
    if high > 4:
        stage.part(frame, place, (0.5, high, 0), (0.7, 0.05, 0.08), metal)
    elif stage.chance(0.5):
        sign = stage.material("collage", "plain", repeat=(0.6, 0.8), wild=True)
        stage.part(frame, place, (0, high - 0.3, 0.06), (0.3, 0.3, 0.01), sign)
    else:
        stage.part(frame, place, (0, high - 0.4, 0), (0.14, 0.4, 0.14), stage.material("dots", repeat=(0.3, 0.5)))


def house(stage: Stage, place: Place, yaw: float, half: tuple[float, float, float]) -> None:
    """A building of these half sizes, with windows, a roof and sometimes a shop front or a door."""
    frame, floor = turn(yaw), stage.uniform(2.8, 3.6)
    pattern = "facade" if stage.chance(0.8) else str(stage.rng.choice(["bricks", "planks", "plain", "stripes"]))
    base_colour = np.array([0.5, 0.42, 0.34]) * stage.uniform(0.3, 1.6) if stage.chance(0.6) else None
    wall = stage.material(pattern, repeat=(floor * 3, floor * 5), contrast=0.6, base=base_colour)
    stage.part(frame, place, (0, half[1], 0), half, wall)
    roof = stage.material(
        "tiles", "bricks", "noise", "planks", repeat=(1.5, 4.0), base=stage.paint() * np.array([1, 0.8, 0.7])
    )
    if half[1] < 5 and stage.chance(0.7):
        high = stage.uniform(0.8, 2.2)
        stage.part(
            frame,
            place,
            (0, 2 * half[1] + high, 0),
            (half[0] + 0.3, high, half[2] + 0.3),
            roof,
            top=(0, 1) if stage.chance(0.6) else (0.2, 0.2),
        )
    elif stage.chance(0.6):
        stage.part(frame, place, (0, 2 * half[1] + 0.2, 0), (half[0] + 0.15, 0.25, half[2] + 0.15), roof)
    if stage.chance(0.6):
        base = stage.material("facade", "tiles", "bricks", "collage", repeat=(3.0, 6.0), wild=stage.chance(0.3))
        stage.part(frame, place, (0, floor / 2, 0), (half[0] + 0.05, floor / 2, half[2] + 0.05), base)
    if stage.chance(0.4):
        awning = stage.material("stripes", "plain", repeat=(1.0, 2.5), wild=True)
        stage.part(frame, place, (0, floor, half[2] + 0.5), (half[0] * 0.6, 0.12, 0.5), awning, top=(1, 0.3))
        stage.part(frame, place, (0, floor, -half[2] - 0.5), (half[0] * 0.6, 0.12, 0.5), awning, top=(1, 0.3))
