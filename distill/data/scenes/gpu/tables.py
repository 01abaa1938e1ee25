"""A stage as two arrays for the kernels: int32 with a header (`slots`), and float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distill.data.scenes.cast import Camera
from distill.data.scenes.gpu import slots
from distill.data.scenes.packed import (
    Air,
    Casters,
    Lamps,
    Looks,
    Solids,
    pack_air,
    pack_lamps,
    pack_looks,
    pack_solids,
)
from distill.data.scenes.stage import Stage

_Tables = Mapping[Any, np.ndarray]
"""Tables by the `slots` word that holds their offset."""


def _joined(tables: _Tables, header: np.ndarray, dtype: type[np.generic], *, start: int = 0) -> np.ndarray:
    """Concatenate the tables, and write their offsets, counted from `start`, to the header."""
    for slot, table in tables.items():
        header[slot.value] = start
        start += table.size
    return np.concatenate([table.reshape(-1).astype(dtype) for table in tables.values()])


def _integers(solids: Solids, casters: Casters, lamps: Lamps, looks: Looks, air: Air) -> _Tables:
    return {
        slots.WINDOWS: solids.windows,
        slots.FIRST: solids.first,
        slots.SURFACE: solids.surface,
        slots.SHELL: solids.shell,
        slots.ROUND: solids.round,
        slots.OUTSIDE: solids.outside,
        slots.GROUP: casters.group,
        slots.CASTER_FIRST: casters.first,
        slots.CASTER_ROUND: casters.round,
        slots.SUN: lamps.sun,
        slots.LAMP_OUTSIDE: lamps.outside,
        slots.MATERIAL: looks.material,
        slots.PATTERN: looks.pattern * air.stride,
    }


def _floats(camera: Camera, solids: Solids, casters: Casters, lamps: Lamps, looks: Looks, air: Air) -> _Tables:
    room = air.bounds if len(air.bounds) else np.zeros((1, 3))
    light = (air.ambient, air.horizon, air.zenith, room, np.array([air.haze, air.clouds]))
    return {
        slots.CAMERA: np.array([*camera.axes.reshape(-1), *camera.position, air.pixel]),
        slots.AIR: np.concatenate([numbers.reshape(-1) for numbers in light]),
        slots.PLANES: solids.planes,
        slots.QUADRIC: solids.quadric,
        slots.EYE: solids.eye,
        slots.CASTER_QUADRIC: casters.quadric,
        slots.CASTER_CENTRE: casters.centre,
        slots.PLACE: lamps.place,
        slots.COLOUR: lamps.colour,
        slots.REACH: lamps.reach,
        slots.AXES: lamps.axes,
        slots.SPHERES: lamps.spheres,
        slots.MEMBERS: lamps.members,
        slots.LAMP_PLANES: lamps.planes,
        slots.SLOPE: lamps.slope,
        slots.LAMP_EYE: lamps.eye,
        slots.SQUARED: lamps.squared,
        slots.SURFACES: looks.surface,
        slots.NUMBERS: looks.numbers,
    }


def tables_of(stage: Stage, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Integers, floats, and the patterns needed in the bank, of a stage seen on height x width = `size`."""
    camera, (height, width) = stage.camera, size
    assert camera is not None
    solids = pack_solids(stage.solids, camera, height, width)
    casters, lamps = pack_lamps(stage)
    looks, air = pack_looks(stage), pack_air(stage, 1.0 / (camera.focal * width))
    counts = {
        slots.HEIGHT: height,
        slots.WIDTH: width,
        slots.SOLIDS: len(solids.windows),
        slots.LAMPS: len(lamps.sun),
        slots.CLUSTERS: len(casters.group) - 1,
        slots.CASTERS: len(casters.round),
        slots.EDGES: lamps.planes.shape[1],
        slots.SKY: stage.sky is not None,
        slots.ROOM: len(air.bounds),
        slots.CLOUDS: air.cloud_pattern * air.stride,
        slots.STAINS: air.stain_pattern * air.stride,
    }
    header = np.zeros(slots.HEADER, np.int32)
    for slot, count in counts.items():
        header[slot.value] = count
    integers = _joined(_integers(solids, casters, lamps, looks, air), header, np.int32, start=len(header))
    floats = _joined(_floats(camera, solids, casters, lamps, looks, air), header, np.float32)
    patterns = sorted({*looks.pattern.tolist(), air.stain_pattern, air.cloud_pattern})
    return np.concatenate([header, integers]), floats, patterns
