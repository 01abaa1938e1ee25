"""A view under construction: its solids, materials, lights and camera."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from distill.data.scenes.cast import Camera, Solid, block, turn
from distill.data.scenes.texture import Material, pattern

_Colour = tuple[float, float, float]
_THIRDS = np.array([0.0, 4.0, 2.0])


def _between(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """np.clip, without its checks, which take longer than clipping four numbers."""
    return np.minimum(np.maximum(values, low), high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Light:
    """A lamp at `place` (sun: the unit direction towards it). reach: metres at which a lamp has half its power."""

    place: tuple[float, float, float]
    colour: _Colour
    reach: float = 3.0
    sun: bool = False


@dataclass(slots=True, kw_only=True)
class Stage:
    """A view under construction: solids, materials, lights, camera.

    ambient: light from above and below. sky: horizon and zenith. haze: visibility in metres, 0 for clear air.
    bounds: half sizes of a room around (0, height, 0). taken: occupied discs of floor (x, z, radius).
    """

    rng: np.random.Generator
    solids: list[Solid] = field(default_factory=list)
    materials: list[Material] = field(default_factory=list)
    lights: list[Light] = field(default_factory=list)
    camera: Camera | None = None
    ambient: tuple[_Colour, _Colour] = ((0.3, 0.3, 0.3), (0.2, 0.2, 0.2))
    sky: tuple[_Colour, _Colour] | None = None
    clouds: float = 0.0
    haze: float = 0.0
    bounds: tuple[float, float, float] | None = None
    taken: list[tuple[float, float, float]] = field(default_factory=list)

    def uniform(self, low: float, high: float) -> float:
        """The result of `rng.uniform` as a plain float, without its checks, which take most of its time."""
        return low + (high - low) * self.rng.random()

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self.rng.random() < probability)

    def material(
        self,
        *patterns: str,
        repeat: tuple[float, float] = (0.5, 2.0),
        base: np.ndarray | None = None,
        contrast: float = 0.35,
        tall: float = 1.0,
        gloss: float = 0.0,
        glow: float = 0.0,
        wild: bool = False,
        bump: float = 0.0,
        wear: float = 1.0,
    ) -> int:
        """Adds a material and returns its index: a base colour with shades of it along the ramp.

        wild: four unrelated colours instead. wear: scales detail and stains.
        """
        base = self.paint() if base is None else base
        if wild:
            colours = np.stack([self.paint(vivid=0.6) for _ in range(4)])
        else:
            shades = 1 + contrast * np.sort(-1.0 + 2.0 * self.rng.random(4))
            tints = 0.92 + (1.08 - 0.92) * self.rng.random((4, 3))
            colours = base * _between(shades, 0.05, 2.0)[:, None] * tints
            if self.chance(0.25):
                colours[0] = self.paint() * 0.7
        self.materials.append(
            Material(
                pattern=pattern(self.rng, *patterns),
                repeat=self.uniform(*repeat),
                colours=_between(colours, 0.01, 0.95),
                tall=tall,
                detail=self.uniform(0.05, 0.6) * wear,
                stains=self.uniform(0.0, 0.5) * wear,
                gloss=gloss if gloss else (self.uniform(0.1, 0.6) if self.chance(0.2) else 0.0),
                glow=glow,
                bump=bump if bump else (self.uniform(0.1, 0.5) if self.chance(0.3) else 0.0),
            )
        )
        return len(self.materials) - 1

    def paint(self, *, vivid: float | None = None) -> np.ndarray:
        """A linear RGB colour: mostly muted, now and then vivid, light or dark."""
        value = self.uniform(0.2, 0.95) ** 1.8
        # Most man-made things have warm, muted colours: wood, stone, cloth, paint.
        hue = self.rng.normal(0.08, 0.06) % 1.0 if self.chance(0.55) else self.rng.random()
        saturation = self.rng.random() ** (1.0 if self.chance(0.15 if vivid is None else vivid) else 2.5) * 0.9
        ramp = np.abs((hue * 6 + _THIRDS) % 6 - 3) - 1
        return value * (1 - saturation * (1 - _between(ramp, 0, 1)))

    def warmth(self, power: float) -> _Colour:
        """White light of this power, with a random colour temperature between a bulb and a cloudy day."""
        warm = self.uniform(-0.25, 0.6)
        return power * (1 + 0.35 * warm), power, power * (1 - 0.5 * warm)

    def free(self, x: float, z: float, radius: float) -> bool:
        """Claims a disc of floor; returns False where it overlaps a taken one."""
        if any((x - a) ** 2 + (z - b) ** 2 < (radius + r) ** 2 for a, b, r in self.taken):
            return False
        self.taken.append((x, z, radius))
        return True

    def add(self, *solids: Solid) -> None:
        """Adds solids."""
        self.solids.extend(solids)

    def part(
        self,
        frame: np.ndarray,
        at: tuple[float, float, float],
        offset: tuple[float, float, float],
        half: tuple[float, float, float],
        material: int,
        *,
        top: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Adds a block of a larger object: `offset` in the object's own frame, whose origin is `at`."""
        self.add(block(np.asarray(at) + np.asarray(offset) @ frame, half, material, axes=frame, top=top))

    def look(self, position: tuple[float, float, float], yaw: float, pitch: float, *, fov: tuple[float, float]) -> None:
        """Sets the camera; positive pitch looks up; the roll is random, mostly small."""
        roll = self.rng.normal(0, 0.02) if self.chance(0.85) else self.rng.normal(0, 0.15)
        axes = turn(yaw, pitch, float(roll))
        angle = math.radians(self.uniform(*fov))
        self.camera = Camera(position=position, axes=axes, focal=0.5 / math.tan(angle / 2))
