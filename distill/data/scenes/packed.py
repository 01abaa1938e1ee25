"""Conversion of a stage to flat arrays for compiled loops (`fused`) and a GPU's kernels (`gpu`).

They hold the same numbers that the torch path computes with. What it computes once per solid in double precision
(the side of a plane that a lamp is on, a lamp's position in the frame of an ellipsoid) is computed here in double
precision too, in the same order, and rounded to float32 where torch rounds: in the first operation with a float32
tensor. P solids, K planes, S surfaces, L lamps; C solids that cast shadows, in G clusters, with Q planes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distill.data.scenes import texture
from distill.data.scenes.cast import Camera, Cluster, Solid, across, clusters, surfaces, windows
from distill.data.scenes.stage import Light, Stage


class Solids(NamedTuple):
    """Solids as seen from the camera, for the first hit.

    windows: (P,4) int64, as `cast.windows`. first: (P+1,) int64 index of each solid's first plane. surface: (P,) int64
    index of its first surface. shell, round: (P,) bool; round: has a quadric. planes: (K,4) float32 normal and depth of
    the camera below the plane. outside: (K,) bool. quadric: (P,3,3), eye: (P,3) float32 camera in the quadric's frame.
    """

    windows: np.ndarray
    first: np.ndarray
    surface: np.ndarray
    shell: np.ndarray
    round: np.ndarray
    planes: np.ndarray
    outside: np.ndarray
    quadric: np.ndarray
    eye: np.ndarray


class Casters(NamedTuple):
    """The solids that cast shadows, cluster by cluster.

    group: (G+1,) int64 index of each cluster's first member. first: (C+1,) int64 index of each caster's first plane.
    round: (C,) bool. quadric: (C,3,3), centre: (C,3) float32.
    """

    group: np.ndarray
    first: np.ndarray
    round: np.ndarray
    quadric: np.ndarray
    centre: np.ndarray


class Lamps(NamedTuple):
    """The lights, and the casters as each light sees them.

    sun: (L,) bool. place, colour: (L,3). reach: (L,) squared. axes: (L,2,3) perpendicular to the sun's light. spheres:
    (L,4,G) and members: (L,C,4) bounding cones of clusters and casters: direction and cosine (sun: two coordinates,
    squared radius, unused). planes: (L,Q,4) normal and depth of the lamp below the plane (sun: normal and offset).
    slope: (L,Q) of the sun's rays on each plane. outside: (L,Q) bool. eye: (L,C,3) the lamp (sun: its direction) in the
    quadric's frame. squared: (L,C) squared length of the direction there. All float32 except the bools.
    """

    sun: np.ndarray
    place: np.ndarray
    colour: np.ndarray
    reach: np.ndarray
    axes: np.ndarray
    spheres: np.ndarray
    members: np.ndarray
    planes: np.ndarray
    slope: np.ndarray
    outside: np.ndarray
    eye: np.ndarray
    squared: np.ndarray


class Looks(NamedTuple):
    """surface: (S,24) float32: gradient, constant, centre, axes. material: (S,) int64. pattern, numbers: as
    `texture.table`. bank: (texels,2) float32. levels: (9,2) int64: size and offset of each mip level.
    """

    surface: np.ndarray
    material: np.ndarray
    pattern: np.ndarray
    numbers: np.ndarray
    bank: np.ndarray
    levels: np.ndarray


class Air(NamedTuple):
    """ambient: (2,3) from above and below. bounds: (1,3) of a room, or (0,3). haze: metres or 0. horizon, zenith: (3,).

    clouds: their cover. cloud_pattern, stain_pattern, stride: positions in the bank. pixel: its size at 1 m.
    All float32 except the positions.
    """

    ambient: np.ndarray
    bounds: np.ndarray
    haze: np.float32
    horizon: np.ndarray
    zenith: np.ndarray
    clouds: np.float32
    cloud_pattern: int
    stain_pattern: int
    stride: int
    pixel: np.float32


def _float32(values: object) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32)


def _offsets(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))]).astype(np.int64)


_Number = np.ndarray | np.float64


def _weighted(rows: np.ndarray, x: _Number, y: _Number, z: _Number) -> np.ndarray:
    """Dot product of rows (...,3) with a point, summed from the left as Python and torch do."""
    return rows[..., 0] * x + rows[..., 1] * y + rows[..., 2] * z


class _Shapes(NamedTuple):
    """first: (P+1,) plane offsets. planes: (K,4). round: (P,). quadric: (P,3,3), 0 if none. centre: (P,3)."""

    first: np.ndarray
    planes: np.ndarray
    round: np.ndarray
    quadric: np.ndarray
    centre: np.ndarray


def _shapes(solids: Sequence[Solid]) -> _Shapes:
    none = np.zeros((3, 3))
    return _Shapes(
        first=_offsets([len(s.planes) for s in solids]),
        planes=np.array([plane for s in solids for plane in s.planes], dtype=np.float64).reshape(-1, 4),
        round=np.array([s.quadric is not None for s in solids], dtype=np.bool_),
        quadric=np.array([none if s.quadric is None else s.quadric for s in solids]).reshape(-1, 3, 3),
        centre=np.array([s.centre for s in solids], dtype=np.float64).reshape(-1, 3),
    )


def _below(shapes: _Shapes, eye: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The distance of a point below each plane (K,), and its position in each quadric's frame (P,3)."""
    x, y, z = (np.float64(e) for e in eye)
    height = shapes.planes[:, 3] - _weighted(shapes.planes, x, y, z)
    away = np.asarray(eye, dtype=np.float64) - shapes.centre
    return height, _weighted(shapes.quadric, *(away[:, None, j] for j in range(3)))


def pack_solids(solids: Sequence[Solid], camera: Camera, height: int, width: int) -> Solids:
    """The solids of a stage as the camera sees them on a grid of height x width pixels."""
    shapes = _shapes(solids)
    below, eye = _below(shapes, camera.position)
    return Solids(
        windows=windows(solids, camera, height, width),
        first=shapes.first,
        surface=_offsets([len(s.planes) + (s.quadric is not None) for s in solids])[:-1],
        shell=np.array([s.shell for s in solids], dtype=np.bool_),
        round=shapes.round,
        planes=_float32(np.column_stack([shapes.planes[:, :3], below])),
        outside=below < 0,
        quadric=_float32(shapes.quadric),
        eye=_float32(eye),
    )


def _bounds(lamp: Light, groups: Sequence[Cluster], axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(G,4) and (C,4): the numbers of `cast.shadow`'s sphere test, for clusters and for their members."""
    balls = [(group.middle, group.radius) for group in groups]
    balls += [(middle, radius) for group in groups for _, middle, radius in group.solids]
    if lamp.sun:
        rows = [(*(axes @ middle).tolist(), radius**2, 0.0) for middle, radius in balls]
    else:
        light, rows = np.asarray(lamp.place), []
        for middle, radius in balls:
            away = middle - light
            gap = math.sqrt(away.dot(away))
            cosine = math.sqrt(1 - (radius / gap) ** 2) if gap > radius else -2.0
            rows.append((*(away / max(gap, 1e-9)).tolist(), cosine))
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    return table[: len(groups)], table[len(groups) :]


def pack_lamps(stage: Stage) -> tuple[Casters, Lamps]:
    """The lights of a stage and the solids that can shadow them."""
    lights = stage.lights or [Light(place=(0.0, 1.0, 0.0), colour=(0.0, 0.0, 0.0), sun=True)]  # tables need a row
    groups = clusters(stage.solids)
    shapes = _shapes([solid for group in groups for solid, _, _ in group.solids])
    casters = Casters(
        group=_offsets([len(group.solids) for group in groups]),
        first=shapes.first,
        round=shapes.round,
        quadric=_float32(shapes.quadric),
        centre=_float32(shapes.centre),
    )
    per_lamp: list[tuple[np.ndarray, ...]] = []
    for lamp in lights:
        axes = across(lamp.place) if lamp.sun else np.zeros((2, 3))
        spheres, members = _bounds(lamp, groups, axes)
        x, y, z = (np.float64(c) for c in lamp.place)
        slope = _weighted(shapes.planes, x, y, z)
        below, eye = _below(shapes, lamp.place)
        if lamp.sun:
            eye = _weighted(shapes.quadric, x, y, z)
        squared = np.maximum(_float32(_weighted(eye, eye[:, 0], eye[:, 1], eye[:, 2])), np.float32(1e-20))
        fourth = shapes.planes[:, 3] if lamp.sun else below
        planes = np.column_stack([shapes.planes[:, :3], fourth])
        steep = np.where(slope == 0, 1e-30, slope)
        outside = slope < 0 if lamp.sun else below < 0
        per_lamp.append((axes, spheres.T, members, planes, steep, outside, eye, squared))
    axes_, spheres_, members_, planes_, slope_, outside_, eye_, squared_ = (
        np.array(column) for column in zip(*per_lamp, strict=True)
    )
    lamps = Lamps(
        sun=np.array([lamp.sun for lamp in lights], dtype=np.bool_),
        place=_float32([lamp.place for lamp in lights]),
        colour=_float32([lamp.colour for lamp in lights]),
        reach=_float32([lamp.reach**2 for lamp in lights]),
        axes=_float32(axes_),
        spheres=_float32(spheres_),
        members=_float32(members_),
        planes=_float32(planes_),
        slope=_float32(slope_),
        outside=outside_,
        eye=_float32(eye_),
        squared=_float32(squared_),
    )
    return casters, lamps


_LEVELS = np.array(list(zip((texture.SIZE >> k for k in range(texture.LEVELS)), texture.OFFSETS, strict=True)))


def pack_looks(stage: Stage) -> Looks:
    """The appearance of the surfaces of a stage."""
    table = surfaces(stage.solids)
    parts = (table.gradient.reshape(-1, 9), table.constant, table.centre, table.axes.reshape(-1, 9))
    patterns, numbers = texture.table(stage.materials)
    drawn = texture.bank([*patterns.tolist(), texture.STAINS, texture.cloud_pattern(stage.clouds)])
    return Looks(
        surface=np.concatenate([part.numpy() for part in parts], axis=1),
        material=table.material.numpy(),
        pattern=patterns.numpy(),
        numbers=numbers.numpy(),
        bank=drawn,
        levels=_LEVELS,
    )


def pack_air(stage: Stage, pixel: float) -> Air:
    """Ambient light, haze and sky of a stage; pixel: metres across one pixel at 1 m distance."""
    horizon, zenith = stage.sky if stage.sky else (stage.ambient[0], (0.0, 0.0, 0.0))
    return Air(
        ambient=_float32(stage.ambient),
        bounds=_float32([] if stage.bounds is None else [stage.bounds]).reshape(-1, 3),
        haze=np.float32(stage.haze),
        horizon=_float32(horizon),
        zenith=_float32(zenith),
        clouds=np.float32(stage.clouds * 0.8),
        cloud_pattern=texture.cloud_pattern(stage.clouds),
        stain_pattern=texture.STAINS,
        stride=texture.STRIDE,
        pixel=np.float32(pixel),
    )
