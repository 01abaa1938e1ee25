"""Additions of `variety = true`: clutter, thin structures, people, window frames, repeated texture, night, fog.

They are made after a layout is built and use a separate random generator, so that views without variety stay
bit-identical, and views with it keep their walls, furniture and camera. Each addition is drawn independently; most
views get two or three. Objects are placed where the camera can see them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from distill.data.scenes.cast import cylinder, turn
from distill.data.scenes.furniture import Place, clutter, person, small
from distill.data.scenes.stage import Light, Stage

_REPEATING = ("checker", "tiles", "bricks", "dots", "stripes", "plaid", "planks")


def vary(stage: Stage) -> None:
    """Add random things to a finished layout, drawn from the stage's generator."""
    outdoors = stage.sky is not None
    additions = {_clutter: 0.6, _thin: 0.5, _people: 0.45, _window_frame: 0.2, _repeated: 0.35, _fog: 0.2}
    for add, chance in additions.items():
        if stage.chance(chance):
            add(stage)
    if stage.chance(0.25):
        (_night if outdoors else _dim)(stage)


def _ahead(stage: Stage, near: float, far: float, *, wide: float = 0.6) -> Place | None:
    """A place on the floor `near` to `far` metres in front of the camera, inside the room; None if none is found."""
    assert stage.camera is not None
    x, _, z = stage.camera.position
    forward = stage.camera.axes[2]
    heading = math.atan2(float(forward[0]), float(forward[2]))
    for _ in range(8):
        distance = near * (far / near) ** stage.uniform(0, 1)
        angle = heading + math.atan(stage.uniform(-wide, wide))
        spot = x + distance * math.sin(angle), z + distance * math.cos(angle)
        if stage.bounds is None or (abs(spot[0]) < stage.bounds[0] - 0.2 and abs(spot[1]) < stage.bounds[2] - 0.2):
            return spot[0], 0.0, spot[1]
    return None


def _clutter(stage: Stage) -> None:
    """Small objects on the floor, some of them near."""
    for _ in range(int(stage.rng.integers(4, 20))):
        if (place := _ahead(stage, 0.7, 8.0, wide=0.9)) is None:
            continue
        if stage.chance(0.5):
            clutter(stage, place, stage.uniform(0, 7))
        else:
            small(stage, place, stage.uniform(0.08, 0.35))


def _people(stage: Stage) -> None:
    """People from talking distance on, where the floor is free."""
    for _ in range(int(stage.rng.integers(1, 6))):
        for _ in range(8):
            place = _ahead(stage, 1.2, 12.0 if stage.bounds is None else 5.0)
            if place is not None and stage.free(place[0], place[2], 0.25):
                person(stage, place, stage.uniform(0, 7))
                break


def _thin(stage: Stage) -> None:
    """Poles, a railing, a rack of bars or hanging cables: 4 to 40 mm thick."""
    metal = stage.material("plain", "stripes", contrast=0.15, gloss=stage.uniform(0.0, 0.8))
    for _ in range(int(stage.rng.integers(1, 4))):
        place = _ahead(stage, 0.9, 6.0)
        if place is None:
            continue
        kind, thick = stage.rng.random(), stage.uniform(0.004, 0.02)
        frame, wide = turn(stage.uniform(0, 7)), stage.uniform(0.3, 1.5)
        if kind < 0.35:
            _railing(stage, place, frame, wide, thick, metal)
        elif kind < 0.7:
            for _ in range(int(stage.rng.integers(1, 6))):
                lean = turn(stage.uniform(0, 7), stage.uniform(-0.3, 0.3))
                high = stage.uniform(0.3, 1.3)
                x, z = place[0] + stage.uniform(-0.5, 0.5), place[2] + stage.uniform(-0.5, 0.5)
                stage.add(cylinder((x, high, z), thick, high, metal, axes=lean))
        else:
            across = turn(stage.uniform(0, 7), 0.0, math.pi / 2)
            for _ in range(int(stage.rng.integers(1, 5))):
                height = stage.uniform(0.4, 2.4)
                stage.add(cylinder((place[0], height, place[2]), thick * 0.6, wide * 2, metal, axes=across))


def _railing(stage: Stage, place: Place, frame: np.ndarray, wide: float, thick: float, metal: int) -> None:
    high, gap = stage.uniform(0.6, 1.2), stage.uniform(0.08, 0.2)
    for offset in np.arange(-wide, wide + 1e-6, gap).tolist():
        stage.part(frame, place, (offset, high / 2, 0), (thick, high / 2, thick), metal)
    for height in (0.06, high):
        stage.part(frame, place, (0, height, 0), (wide, 0.015, 0.015), metal)


def _window_frame(stage: Stage) -> None:
    """A free-standing window frame without glass: bars with the view behind them."""
    place = _ahead(stage, 1.2, 4.0, wide=0.3)
    if place is None or stage.camera is None:
        return
    wood = stage.material("wood", "plain", contrast=0.15)
    to_camera = np.asarray(stage.camera.position) - np.asarray(place)
    frame = turn(math.atan2(float(to_camera[0]), float(to_camera[2])) + stage.uniform(-0.5, 0.5))
    wide, high, bar = stage.uniform(0.5, 1.5), stage.uniform(0.8, 1.2), stage.uniform(0.012, 0.035)
    columns, rows = int(stage.rng.integers(1, 5)), int(stage.rng.integers(1, 5))
    for column in range(columns + 1):
        stage.part(frame, place, ((2 * column / columns - 1) * wide, high, 0), (bar, high, bar), wood)
    for row in range(rows + 1):
        stage.part(frame, place, (0, 2 * high * row / rows, 0), (wide, bar, bar), wood)


def _repeated(stage: Stage) -> None:
    """Give some surfaces a frequently repeating pattern, which is ambiguous for stereo and for eyes."""
    for number in stage.rng.permutation(len(stage.materials))[: int(stage.rng.integers(1, 4))].tolist():
        repeating = stage.materials[stage.material(*_REPEATING, repeat=(0.15, 0.6), contrast=0.6)]
        stage.materials[number] = replace(repeating, glow=stage.materials[number].glow)


def _fog(stage: Stage) -> None:
    """Fog: a visibility of 6 to 40 metres."""
    sight = stage.uniform(12, 40) if stage.bounds is None else stage.uniform(6, 20)
    stage.haze = min(stage.haze, sight) if stage.haze else sight


def _night(stage: Stage) -> None:
    """The sun dimmed to a moon, a dark sky, and one to three lamps."""
    dark = stage.uniform(0.01, 0.08)
    stage.lights = [replace(sun, colour=_times(sun.colour, dark)) for sun in stage.lights]
    if stage.sky is not None:
        stage.sky = (_times(stage.sky[0], dark), _times(stage.sky[1], 0.5 * dark))
    stage.ambient = (_times(stage.ambient[0], dark), _times(stage.ambient[1], dark))
    for _ in range(int(stage.rng.integers(1, 4))):
        if (place := _ahead(stage, 2.0, 15.0, wide=0.9)) is not None:
            spot = (place[0], stage.uniform(2.0, 5.0), place[2])
            stage.lights.append(Light(place=spot, colour=stage.warmth(stage.uniform(0.8, 2.5)), reach=4.0))


def _dim(stage: Stage) -> None:
    """A dark room: less ambient light, and only one lamp."""
    share = stage.uniform(0.05, 0.4)
    stage.ambient = (_times(stage.ambient[0], share), _times(stage.ambient[1], share))
    stage.lights = stage.lights[:1]


def _times(colour: tuple[float, float, float], factor: float) -> tuple[float, float, float]:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor
