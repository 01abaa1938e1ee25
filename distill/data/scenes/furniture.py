"""Furniture, small objects, plants and people, each made of a few convex solids at real-world size.

Every function takes the stage, a place on the floor (x, height, z) and a yaw, and adds the object's solids.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from distill.data.scenes.cast import cylinder, ellipsoid, turn
from distill.data.scenes.stage import Stage

Place = tuple[float, float, float]


def at(place: Place, frame: np.ndarray, x: float, y: float, z: float) -> Place:
    """The world position of a point in an object's own frame."""
    east, up, north = (np.asarray(place) + np.array([x, y, z]) @ frame).tolist()
    return east, up, north


def _wooden(stage: Stage) -> int:
    base = np.array([0.42, 0.25, 0.12]) * stage.uniform(0.25, 1.6) if stage.chance(0.6) else None
    return stage.material("wood", "planks", "plain", "noise", repeat=(0.4, 1.5), base=base)


def _cloth(stage: Stage) -> int:
    return stage.material("noise", "plain", "plaid", "stripes", "dots", "blotches", "checker", repeat=(0.2, 1.0))


def small(stage: Stage, place: Place, scale: float) -> None:
    """A small object about `scale` high: box, ball, cup, bottle, book pile, pyramid or egg."""
    kind, (x, y, z) = int(stage.rng.integers(7)), place
    frame = turn(stage.uniform(0, 7))
    stuff = stage.material(
        "plain",
        "noise",
        "collage",
        "print",
        "stripes",
        "dots",
        "checker",
        "blotches",
        "marble",
        repeat=(0.5 * scale, 2.5 * scale),
        wild=stage.chance(0.35),
        gloss=stage.uniform(0, 0.7),
    )
    if kind == 0:
        half = (stage.uniform(0.2, 0.6) * scale, stage.uniform(0.2, 0.6) * scale, stage.uniform(0.2, 0.6) * scale)
        stage.part(frame, place, (0, half[1], 0), half, stuff)
    elif kind == 1:
        stage.add(ellipsoid((x, y + scale / 2, z), (scale / 2,) * 3, stuff, axes=turn(*stage.rng.uniform(0, 6, 3))))
    elif kind == 2:
        height = stage.uniform(0.3, 0.6) * scale
        stage.add(cylinder((x, y + height, z), stage.uniform(0.2, 0.45) * scale, height, stuff))
    elif kind == 3:
        radius = stage.uniform(0.12, 0.22) * scale
        stage.add(
            cylinder((x, y + 0.35 * scale, z), radius, 0.35 * scale, stuff),
            ellipsoid((x, y + 0.7 * scale, z), (radius, radius, radius), stuff),
            cylinder((x, y + 0.85 * scale, z), radius * 0.35, 0.2 * scale, stuff),
        )
    elif kind == 4:
        height = 0.0
        for _ in range(int(stage.rng.integers(1, 6))):
            thick = stage.uniform(0.05, 0.12) * scale
            cover = stage.material("plain", "print", "noise", "stripes", repeat=(0.3 * scale, scale))
            half = (stage.uniform(0.3, 0.5) * scale, thick, stage.uniform(0.4, 0.65) * scale)
            stage.part(turn(stage.uniform(-0.4, 0.4)) @ frame, place, (0, height + thick, 0), half, cover)
            height += 2 * thick
    elif kind == 5:
        stage.part(
            frame,
            place,
            (0, scale / 2, 0),
            (0.4 * scale, scale / 2, 0.4 * scale),
            stuff,
            top=(stage.uniform(0, 0.8), stage.uniform(0, 0.8)),
        )
    else:
        half = (stage.uniform(0.2, 0.5) * scale, stage.uniform(0.3, 0.5) * scale, stage.uniform(0.2, 0.5) * scale)
        stage.add(ellipsoid((x, y + half[1], z), half, stuff, axes=frame))


def table(stage: Stage, place: Place, yaw: float) -> None:
    """A table with small objects on it."""
    frame, wood = turn(yaw), _wooden(stage)
    long, deep, high = stage.uniform(0.4, 1.0), stage.uniform(0.3, 0.5), stage.uniform(0.45, 0.8)
    stage.part(frame, place, (0, high - 0.02, 0), (long, 0.02, deep), wood)
    if stage.chance(0.25):
        stage.add(
            cylinder(at(place, frame, 0, high / 2, 0), 0.05, high / 2, wood),
            cylinder(at(place, frame, 0, 0.02, 0), 0.25, 0.02, wood),
        )
    else:
        for sx in (-1, 1):
            for sz in (-1, 1):
                stage.part(
                    frame, place, (sx * (long - 0.05), high / 2, sz * (deep - 0.05)), (0.03, high / 2, 0.03), wood
                )
    for _ in range(int(stage.rng.integers(0, 5))):
        spot = at(place, frame, stage.uniform(-0.8, 0.8) * long, high, stage.uniform(-0.7, 0.7) * deep)
        small(stage, spot, stage.uniform(0.08, 0.3))


def chair(stage: Stage, place: Place, yaw: float) -> None:
    """A chair with a back, or a stool."""
    frame, wood = turn(yaw), _wooden(stage)
    seat = _cloth(stage) if stage.chance(0.5) else wood
    wide, high = stage.uniform(0.19, 0.26), stage.uniform(0.42, 0.5)
    stage.part(frame, place, (0, high, 0), (wide, 0.03, wide), seat)
    for sx in (-1, 1):
        for sz in (-1, 1):
            stage.part(frame, place, (sx * (wide - 0.02), high / 2, sz * (wide - 0.02)), (0.018, high / 2, 0.018), wood)
    if stage.chance(0.85):
        stage.part(frame, place, (0, high + 0.3, -wide), (wide, stage.uniform(0.1, 0.25), 0.02), seat)
        for sx in (-1, 1):
            stage.part(frame, place, (sx * (wide - 0.02), high + 0.2, -wide), (0.018, 0.25, 0.018), wood)


def sofa(stage: Stage, place: Place, yaw: float) -> None:
    """A sofa or armchair with cushions."""
    frame, cloth = turn(yaw), _cloth(stage)
    wide = stage.uniform(0.4, 1.1)
    stage.part(frame, place, (0, 0.22, 0), (wide, 0.2, 0.4), cloth)
    stage.part(frame, place, (0, 0.55, -0.34), (wide, 0.32, 0.1), cloth, top=(1.0, 0.6))
    for side in (-1, 1):
        stage.part(frame, place, (side * wide, 0.33, 0), (0.09, 0.3, 0.4), cloth)
    for _ in range(int(stage.rng.integers(0, 4))):
        spot = at(place, frame, stage.uniform(-0.8, 0.8) * wide, 0.55, -0.12)
        stage.add(ellipsoid(spot, (0.2, 0.18, 0.08), _cloth(stage), axes=turn(yaw, -0.4)))


def bed(stage: Stage, place: Place, yaw: float) -> None:
    """A bed with pillows and a blanket."""
    frame, wide = turn(yaw), stage.uniform(0.45, 0.95)
    stage.part(frame, place, (0, 0.16, 0), (wide, 0.15, 1.0), _wooden(stage))
    stage.part(frame, place, (0, 0.4, 0.05), (wide - 0.02, 0.12, 0.97), _cloth(stage), top=(0.96, 0.97))
    stage.part(frame, place, (0, 0.42, 0.35), (wide + 0.01, 0.12, 0.66), _cloth(stage), top=(0.97, 0.98))
    stage.part(frame, place, (0, 0.5, -1.02), (wide + 0.03, stage.uniform(0.4, 0.7), 0.03), _wooden(stage))
    for side in (-0.5, 0.5):
        stage.add(
            ellipsoid(at(place, frame, side * wide, 0.57, -0.7), (0.36 * wide, 0.1, 0.22), _cloth(stage), axes=frame)
        )


def shelf(stage: Stage, place: Place, yaw: float) -> None:
    """A bookcase: boards with books or objects on them."""
    frame, wood = turn(yaw), _wooden(stage)
    wide, high, deep = stage.uniform(0.3, 0.8), stage.uniform(0.8, 2.1), stage.uniform(0.13, 0.22)
    boards = max(2, int(high / stage.uniform(0.28, 0.45)))
    gap = high / boards
    for side in (-1, 1):
        stage.part(frame, place, (side * wide, high / 2, 0), (0.015, high / 2, deep), wood)
    stage.part(frame, place, (0, high / 2, -deep), (wide, high / 2, 0.01), wood)
    for row in range(boards + 1):
        stage.part(frame, place, (0, row * gap + 0.01, 0), (wide, 0.012, deep), wood)
    for row in range(boards):
        if stage.chance(0.65):
            books = stage.material("spines", repeat=(2 * wide, 2 * wide), wild=True, tall=gap / (2 * wide))
            fill = stage.uniform(0.4, 1.0) * wide * 0.96
            stage.part(
                frame,
                place,
                (stage.uniform(-1, 1) * (0.97 * wide - fill), row * gap + gap * 0.43, -0.02),
                (fill, gap * 0.4, deep * 0.7),
                books,
            )
        else:
            spot = at(place, frame, stage.uniform(-0.6, 0.6) * wide, row * gap + 0.02, 0)
            small(stage, spot, gap * stage.uniform(0.4, 0.75))


def cabinet(stage: Stage, place: Place, yaw: float) -> None:
    """A cupboard, fridge or chest of drawers, with fronts and handles."""
    frame, wood = turn(yaw), _wooden(stage)
    wide, high, deep = stage.uniform(0.25, 0.7), stage.uniform(0.35, 1.05), stage.uniform(0.2, 0.35)
    stage.part(frame, place, (0, high, 0), (wide, high, deep), wood)
    rows, metal = int(stage.rng.integers(1, 5)), stage.material("plain", gloss=0.8)
    for row in range(rows):
        middle = (row + 0.5) * 2 * high / rows
        stage.part(frame, place, (0, middle, deep), (wide * 0.95, 0.92 * high / rows, 0.012), wood)
        stage.part(frame, place, (0, middle, deep + 0.03), (min(0.12, wide / 2), 0.01, 0.012), metal)
    if stage.chance(0.5):
        spot = at(place, frame, stage.uniform(-0.5, 0.5) * wide, 2 * high, 0)
        small(stage, spot, stage.uniform(0.15, 0.4))


def counter(stage: Stage, place: Place, yaw: float) -> None:
    """A kitchen counter or sideboard: doors, a worktop and objects on it."""
    frame, front = turn(yaw), _wooden(stage)
    wide, high = stage.uniform(0.5, 1.4), stage.uniform(0.35, 0.47)
    stage.part(frame, place, (0, high, -0.02), (wide, high, 0.28), front)
    stage.part(frame, place, (0, 2 * high, 0), (wide, 0.02, 0.31), stage.material("marble", "plain", "wood", "noise"))
    doors, metal = max(1, int(wide / 0.3)), stage.material("plain", gloss=0.8)
    for door in range(doors):
        middle = (2 * door + 1 - doors) * wide / doors
        stage.part(frame, place, (middle, high, 0.26), (wide / doors * 0.93, high * 0.9, 0.012), front)
        stage.part(frame, place, (middle + wide / doors * 0.7, high * 1.4, 0.285), (0.01, 0.07, 0.012), metal)
    for _ in range(int(stage.rng.integers(1, 7))):
        spot = at(place, frame, stage.uniform(-0.9, 0.9) * wide, 2 * high + 0.02, stage.uniform(-0.15, 0.15))
        small(stage, spot, stage.uniform(0.1, 0.35))


def desk(stage: Stage, place: Place, yaw: float) -> None:
    """A desk with a screen, a keyboard, papers and a chair."""
    frame, wood, dark = turn(yaw), _wooden(stage), stage.material("plain", base=np.full(3, stage.uniform(0.02, 0.2)))
    wide = stage.uniform(0.5, 0.9)
    stage.part(frame, place, (0, 0.72, 0), (wide, 0.02, 0.35), wood)
    for side in (-1, 1):
        stage.part(frame, place, (side * (wide - 0.03), 0.36, 0), (0.03, 0.36, 0.32), wood)
    across = stage.uniform(0.2, 0.33)
    aside = stage.uniform(-0.5, 0.5) * wide
    screen = stage.material("collage", "print", "plain", repeat=(0.6, 0.9), wild=True, glow=stage.uniform(0, 1.5))
    stage.part(frame, place, (aside, 0.98, -0.1), (across, 0.18, 0.02), dark)
    stage.part(frame, place, (aside, 0.98, -0.085), (across - 0.02, 0.165, 0.01), screen)
    stage.part(frame, place, (aside, 0.78, -0.12), (0.03, 0.06, 0.02), dark)
    stage.part(frame, place, (aside, 0.75, 0.15), (0.21, 0.012, 0.07), dark)
    for _ in range(int(stage.rng.integers(0, 5))):
        spot = at(place, frame, stage.uniform(-0.9, 0.9) * wide, 0.74, stage.uniform(-0.25, 0.28))
        small(stage, spot, stage.uniform(0.06, 0.25))
    if stage.chance(0.7):
        chair(stage, at(place, frame, stage.uniform(-0.2, 0.2), 0, 0.55), yaw + math.pi + stage.uniform(-0.6, 0.6))


def plant(stage: Stage, place: Place, yaw: float) -> None:
    """A pot with leaves."""
    x, y, z = place
    high = stage.uniform(0.15, 0.4)
    stage.add(cylinder((x, y + high / 2, z), high * 0.5, high / 2, stage.material("plain", "stripes", "noise")))
    leaf = stage.material(
        "gravel",
        "grass",
        "noise",
        repeat=(0.15, 0.6),
        base=np.array([0.12, 0.3, 0.07]) * stage.uniform(0.4, 1.5),
        contrast=0.8,
    )
    for _ in range(int(stage.rng.integers(3, 9))):
        a, r = stage.uniform(0, 7), stage.uniform(0.0, 0.9) * high
        centre = (x + r * math.cos(a), y + high * stage.uniform(1.3, 2.8), z + r * math.sin(a))
        half = (high * stage.uniform(0.1, 0.5), high * stage.uniform(0.1, 0.7), high * stage.uniform(0.1, 0.5))
        stage.add(ellipsoid(centre, half, leaf, axes=turn(a, stage.uniform(-0.6, 0.6))))


def crates(stage: Stage, place: Place, yaw: float) -> None:
    """A stack of boxes."""
    height = 0.0
    for _ in range(int(stage.rng.integers(1, 4))):
        half = (stage.uniform(0.12, 0.4), stage.uniform(0.1, 0.3), stage.uniform(0.12, 0.4))
        stuff = stage.material("plain", "planks", "print", "noise", "collage", repeat=(0.3, 1.0))
        stage.part(turn(yaw + stage.uniform(-0.4, 0.4)), place, (0, height + half[1], 0), half, stuff)
        height += 2 * half[1]


def clutter(stage: Stage, place: Place, yaw: float) -> None:
    """One object on the floor: ball, bin, bag."""
    small(stage, place, stage.uniform(0.2, 0.6))


def person(stage: Stage, place: Place, yaw: float) -> None:
    """A standing person."""
    x, y, z = place
    frame, size = turn(yaw), stage.uniform(0.85, 1.08)
    skin = stage.material("plain", base=np.array([0.6, 0.4, 0.3]) * stage.uniform(0.25, 1.3), contrast=0.1)
    shirt, trousers = _cloth(stage), _cloth(stage)
    for side in (-1, 1):
        stride = stage.uniform(-0.25, 0.25)
        leg = turn(yaw, stride)
        stage.add(
            cylinder(at(place, frame, side * 0.1, 0.42 * size, stride * 0.3), 0.085, 0.42 * size, trousers, axes=leg)
        )
        arm = turn(yaw, stage.uniform(-0.4, 0.4), side * 0.1)
        stage.add(
            ellipsoid(at(place, frame, side * 0.27 * size, 1.1 * size, 0), (0.06, 0.34 * size, 0.07), shirt, axes=arm)
        )
    stage.add(
        ellipsoid((x, y + 1.13 * size, z), (0.22 * size, 0.36 * size, 0.14 * size), shirt, axes=frame),
        ellipsoid((x, y + 1.6 * size, z), (0.09, 0.13, 0.11), skin, axes=frame),
        ellipsoid(
            at(place, frame, 0, 1.65 * size, -0.02),
            (0.1, 0.11, 0.11),
            stage.material("noise", contrast=0.2),
            axes=frame,
        ),
    )


Thing = Callable[[Stage, Place, float], None]

INDOOR: dict[Thing, float] = {
    table: 0.75,
    chair: 0.32,
    sofa: 0.75,
    bed: 1.15,
    shelf: 0.45,
    cabinet: 0.45,
    counter: 0.65,
    desk: 0.75,
    plant: 0.3,
    crates: 0.4,
    clutter: 0.25,
    person: 0.3,
}
"""Objects for a room, with the radius of floor that each needs."""
