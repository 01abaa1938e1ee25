"""Ray casting: convex solids, one camera, closed-form depth.

Every solid is an intersection of half-spaces and at most one unit quadric |M (p - c)|^2 <= 1 (ellipsoid, cylinder), so
a ray intersects it in one interval and depth needs only + - * / sqrt: bit-identical on any number of threads. Camera
rays have unit length along the optical axis, so the ray parameter is the perpendicular depth.

World axes: x right, y up, z forward, metres. Shapes: V sample grid (any shape), K planes, P solids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

NEAR, FAR = 0.05, 1000.0
"""Metres. Surfaces beyond FAR count as sky."""

_Vector = tuple[float, float, float]
Vector = Sequence[float] | np.ndarray
_Component = Tensor | float
_EYE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
_SIGNS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
_FLAT = np.zeros((3, 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Solid:
    """A convex solid.

    planes: outward (nx, ny, nz, offset) with n.p <= offset inside. quadric: M (3,3) or None.
    centre, axes: the solid's own frame, also of its texture; rows of `axes` are its x, y, z. corners: (8,3) bounding
    box, or None if unbounded. shell: seen from inside (a room). casts: whether it casts a shadow.
    """

    planes: tuple[tuple[float, float, float, float], ...]
    quadric: np.ndarray | None
    centre: _Vector
    axes: np.ndarray
    corners: np.ndarray | None
    material: int
    shell: bool = False
    casts: bool = True


def turn(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """(3,3) whose rows are the x, y, z axes of a frame turned by angles in radians: yaw about y, then pitch, roll."""
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (math.cos, math.sin))
    about_y = np.array([[cy, 0.0, -sy], [0.0, 1.0, 0.0], [sy, 0.0, cy]])
    about_x = np.array([[1.0, 0.0, 0.0], [0.0, cp, -sp], [0.0, sp, cp]])
    about_z = np.array([[cr, sr, 0.0], [-sr, cr, 0.0], [0.0, 0.0, 1.0]])
    return about_z @ about_x @ about_y


def _around(centre: Vector, half: Vector, axes: np.ndarray) -> np.ndarray:
    return np.asarray(centre) + (_SIGNS * np.asarray(half)) @ axes


def _world_planes(local: np.ndarray, centre: Vector, axes: np.ndarray) -> tuple:
    normals = local[:, :3] @ axes
    length = np.sqrt(np.add.reduce(normals * normals, axis=1))  # bit-identical to np.linalg.norm, faster
    planes = np.empty((len(local), 4))
    np.divide(normals, length[:, None], out=planes[:, :3])
    np.divide(local[:, 3] + normals @ np.asarray(centre), length, out=planes[:, 3])
    return tuple(map(tuple, planes.tolist()))


def block(
    centre: Vector,
    half: Vector,
    material: int,
    *,
    axes: np.ndarray | None = None,
    top: tuple[float, float] = (1.0, 1.0),
    shell: bool = False,
    casts: bool = True,
) -> Solid:
    """A box; `top` shrinks its upper face along its own x and z: (0, 1) is a gable roof, (0, 0) a pyramid."""
    axes = np.array(_EYE) if axes is None else axes
    hx, hy, hz = half
    tilt_x, tilt_z = hx * (1 - top[0]) / 2, hz * (1 - top[1]) / 2
    local = np.array(
        [
            [hy, tilt_x, 0, hy * (hx - tilt_x)],
            [-hy, tilt_x, 0, hy * (hx - tilt_x)],
            [0, tilt_z, hy, hy * (hz - tilt_z)],
            [0, tilt_z, -hy, hy * (hz - tilt_z)],
            [0, 1, 0, hy],
            [0, -1, 0, hy],
        ]
    )
    return Solid(
        planes=_world_planes(local, centre, axes),
        quadric=None,
        centre=(float(centre[0]), float(centre[1]), float(centre[2])),
        axes=axes,
        corners=_around(centre, half, axes),
        material=material,
        shell=shell,
        casts=casts and not shell,
    )


def ellipsoid(
    centre: Vector, half: Vector, material: int, *, axes: np.ndarray | None = None, casts: bool = True
) -> Solid:
    """An ellipsoid with half-axes `half`; a sphere where they are equal."""
    axes = np.array(_EYE) if axes is None else axes
    quadric = axes / np.asarray(half, dtype=np.float64)[:, None]
    point = (float(centre[0]), float(centre[1]), float(centre[2]))
    return Solid(
        planes=(),
        quadric=quadric,
        centre=point,
        axes=axes,
        corners=_around(centre, half, axes),
        material=material,
        casts=casts,
    )


def cylinder(
    centre: Vector, radius: float, half_height: float, material: int, *, axes: np.ndarray | None = None
) -> Solid:
    """A capped cylinder along its own y axis."""
    axes = np.array(_EYE) if axes is None else axes
    quadric = axes / radius
    quadric[1] = 0.0
    caps = np.array([[0, 1, 0, half_height], [0, -1, 0, half_height]], dtype=np.float64)
    return Solid(
        planes=_world_planes(caps, centre, axes),
        quadric=quadric,
        centre=(float(centre[0]), float(centre[1]), float(centre[2])),
        axes=axes,
        corners=_around(centre, (radius, half_height, radius), axes),
        material=material,
    )


def ground(material: int, *, height: float = 0.0, axes: np.ndarray | None = None) -> Solid:
    """Everything below `height`."""
    return Solid(
        planes=((0.0, 1.0, 0.0, height),),
        quadric=None,
        centre=(0.0, height, 0.0),
        axes=np.array(_EYE) if axes is None else axes,
        corners=None,
        material=material,
        casts=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """A pinhole. `axes` rows are right, up, forward; `focal` is in units of image width."""

    position: _Vector
    axes: np.ndarray
    focal: float

    def rays(self, height: int, width: int, *, corners: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """World directions (x, y, z) with length 1 along the optical axis, each (2, H+1, W+1) float32.

        [0] are pixel corners, [1] pixel centres with one spare row and column; `corners=False` gives [1] alone.
        """
        shift = torch.tensor([0.0, 0.5])[:, None] if corners else torch.tensor([[0.5]])
        scale = 1.0 / (self.focal * width)
        right = ((torch.arange(width + 1) + shift) - width / 2) * scale
        up = (height / 2 - (torch.arange(height + 1) + shift)) * scale
        r, u, f = self.axes.tolist()
        x, y, z = (right[:, None, :] * r[i] + up[:, :, None] * u[i] + f[i] for i in range(3))
        return x, y, z


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """The first hit of each ray. depth: V, inf for sky. surface: V int64, a row of `surfaces`; -1 for sky."""

    depth: Tensor
    surface: Tensor


def root(x: Tensor) -> Tensor:
    """The correctly rounded square root. On a CPU torch uses MKL's, whose last bit is sometimes wrong."""
    return x.sqrt() if x.is_cuda else torch.as_tensor(np.sqrt(x.numpy()))


def span(
    solid: Solid, origin: Sequence[_Component], ray: Sequence[_Component], *, faces: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The t where origin + t ray enters and leaves the solid, and with `faces` the surface of entry (shell: of exit).

    Either the origin (camera, lamp) or the ray (sun) is three plain numbers. enter > leave means a miss.
    """
    enter, leave = torch.tensor(-torch.inf), torch.tensor(torch.inf)
    face = torch.tensor(0) if faces else None
    for index, (nx, ny, nz, offset) in enumerate(solid.planes):
        slope = ray[0] * nx + ray[1] * ny + ray[2] * nz
        height = offset - (origin[0] * nx + origin[1] * ny + origin[2] * nz)
        if isinstance(slope, Tensor):
            # For rays from one point, a plane is crossed inwards by all of them or outwards by all of them.
            outside = height < 0
            at = torch.where(slope < 0 if outside else slope > 0, height / slope, torch.inf)
        else:
            outside = slope < 0
            at = torch.as_tensor(height / (slope or 1e-30))
        if outside:
            if face is not None and not solid.shell:
                face = torch.where(at > enter, index, face)
            enter = torch.maximum(enter, at)
        else:
            if face is not None and solid.shell:
                face = torch.where(at < leave, index, face)
            leave = torch.minimum(leave, at)
    if solid.quadric is None:
        return enter, leave, face
    m = solid.quadric.tolist()
    o = [sum(m[i][j] * (origin[j] - solid.centre[j]) for j in range(3)) for i in range(3) if any(m[i])]
    d = [sum(m[i][j] * ray[j] for j in range(3)) for i in range(3) if any(m[i])]
    squared = torch.as_tensor(sum(a * a for a in d)).clamp(min=1e-20)
    # The point nearest to the centre or axis, then half a chord: b^2 - 4ac would lose precision far from the camera.
    nearest = -sum(a * b for a, b in zip(o, d, strict=True)) / squared
    chord = 1.0 - sum((a + nearest * b).square() for a, b in zip(o, d, strict=True))
    reach = torch.where(chord > 0, chord.clamp(min=0) / squared, -1.0)
    reach = torch.where(reach >= 0, root(reach.clamp(min=0)), -torch.inf)
    if face is not None:
        face = torch.where(nearest - reach > enter, len(solid.planes), face)
    return torch.maximum(enter, nearest - reach), torch.minimum(leave, nearest + reach), face


def windows(solids: Sequence[Solid], camera: Camera, height: int, width: int) -> np.ndarray:
    """The part of the sample grid that each solid can cover: (P,4) int64, rows [0] to [1], columns [2] to [3].

    With a margin of one pixel; empty where the solid lies behind the camera or outside the picture.
    """
    regions = np.tile(np.array([0, height + 1, 0, width + 1]), (len(solids), 1))
    bounded = [i for i, solid in enumerate(solids) if solid.corners is not None and not solid.shell]
    if not bounded:
        return regions
    corners = np.array([solids[i].corners for i in bounded])
    in_camera = (corners - np.asarray(camera.position)) @ camera.axes.T
    near, far = in_camera[..., 2].min(1), in_camera[..., 2].max(1)
    ahead = np.where(near[:, None] < NEAR, 1.0, in_camera[..., 2])
    columns = in_camera[..., 0] / ahead * camera.focal * width + width / 2
    rows = height / 2 - in_camera[..., 1] / ahead * camera.focal * width
    limits = np.stack(
        [
            np.clip(np.floor(rows.min(1)) - 1, 0, height + 1),
            np.clip(np.ceil(rows.max(1)) + 2, 0, height + 1),
            np.clip(np.floor(columns.min(1)) - 1, 0, width + 1),
            np.clip(np.ceil(columns.max(1)) + 2, 0, width + 1),
        ],
        axis=1,
    ).astype(np.int64)
    limits = np.where(near[:, None] < NEAR, regions[bounded], limits)
    regions[bounded] = np.where(far[:, None] < NEAR, 0, limits)
    return regions


def cast(solids: Sequence[Solid], camera: Camera, rays: tuple[Tensor, Tensor, Tensor]) -> Hits:
    """The first surface along each camera ray; rays as `Camera.rays` gives them."""
    shape = rays[0].shape
    depth = torch.full(shape, torch.inf)
    surface = torch.full(shape, -1, dtype=torch.int64)
    first = 0
    grid = windows(solids, camera, shape[1] - 1, shape[2] - 1).tolist()
    for solid, (top, bottom, left, right) in zip(solids, grid, strict=True):
        if top < bottom and left < right:
            at = (slice(None), slice(top, bottom), slice(left, right))
            enter, leave, face = span(solid, camera.position, [r[at] for r in rays], faces=True)
            assert face is not None
            reached = leave if solid.shell else enter
            near = (enter <= leave) & (reached > NEAR) & (reached < depth[at])
            depth[at] = torch.where(near, reached, depth[at])
            surface[at] = torch.where(near, face + first, surface[at])
        first += len(solid.planes) + (solid.quadric is not None)
    sky = depth > FAR
    return Hits(depth=depth.masked_fill(sky, torch.inf), surface=surface.masked_fill(sky, -1))


@dataclass(frozen=True, slots=True)
class Surfaces:
    """One row per surface of every solid, in the order in which `cast` numbers them.

    gradient: (S,3,3) and constant (S,3): the normal at p is along gradient @ (p - centre) + constant.
    centre (S,3), axes (S,3,3), material (S,) int64.
    """

    gradient: Tensor
    constant: Tensor
    centre: Tensor
    axes: Tensor
    material: Tensor


@dataclass(slots=True)
class _Rows:
    gradient: list[np.ndarray] = field(default_factory=list)
    constant: list[Sequence[float]] = field(default_factory=list)
    owner: list[Solid] = field(default_factory=list)


def surfaces(solids: Sequence[Solid]) -> Surfaces:
    """The table that `Hits.surface` indexes."""
    rows = _Rows()
    for solid in solids:
        sign = -1.0 if solid.shell else 1.0
        for plane in solid.planes:
            rows.gradient.append(_FLAT)
            rows.constant.append((sign * plane[0], sign * plane[1], sign * plane[2]))
            rows.owner.append(solid)
        if solid.quadric is not None:
            rows.gradient.append(sign * solid.quadric.T @ solid.quadric)
            rows.constant.append((0.0, 0.0, 0.0))
            rows.owner.append(solid)
    return Surfaces(
        gradient=torch.tensor(np.array(rows.gradient), dtype=torch.float32),
        constant=torch.tensor(np.array(rows.constant), dtype=torch.float32),
        centre=torch.tensor([s.centre for s in rows.owner], dtype=torch.float32),
        axes=torch.tensor(np.array([s.axes for s in rows.owner]), dtype=torch.float32),
        material=torch.tensor([s.material for s in rows.owner]),
    )


@dataclass(frozen=True, slots=True)
class Cluster:
    """Neighbouring solids in one bounding sphere, so that one test can exclude them all for a shadow ray.

    solids: each with the middle and radius of its own bounding sphere.
    """

    middle: np.ndarray
    radius: float
    solids: tuple[tuple[Solid, np.ndarray, float], ...]


def _length(vector: np.ndarray) -> float:
    return math.sqrt(vector.dot(vector))


def clusters(solids: Sequence[Solid]) -> tuple[Cluster, ...]:
    """The shadow casters in the order in which they were added; successive ones that are close form a cluster."""
    gathered: list[Cluster] = []
    low, high = np.zeros(3), np.zeros(3)
    casting = [(solid, solid.corners) for solid in solids if solid.casts and solid.corners is not None]
    corners = np.array([solid_corners for _, solid_corners in casting]).reshape(-1, 8, 3)
    for (solid, _), lowest, highest in zip(casting, corners.min(1), corners.max(1), strict=True):
        own_radius = _length(highest - lowest) / 2
        if gathered:
            joined_low, joined_high = np.minimum(low, lowest), np.maximum(high, highest)
            joined_radius = _length(joined_high - joined_low) / 2
            if joined_radius < 1.5 * max(own_radius, gathered[-1].radius) + 0.1 and len(gathered[-1].solids) < 16:
                low, high = joined_low, joined_high
                gathered[-1] = Cluster(
                    (low + high) / 2, joined_radius, (*gathered[-1].solids, (solid, (lowest + highest) / 2, own_radius))
                )
                continue
        low, high = lowest, highest
        gathered.append(Cluster((low + high) / 2, own_radius, ((solid, (low + high) / 2, own_radius),)))
    return tuple(gathered)


def across(light: _Vector) -> np.ndarray:
    """(2,3): two unit axes perpendicular to the direction of a sun's light and to each other."""
    first = np.cross(light, (1.0, 0.0, 0.0) if abs(light[0]) < 0.7 else (0.0, 1.0, 0.0))
    first /= np.linalg.norm(first)
    return np.array([first, np.cross(light, first)])


def shadow(groups: Sequence[Cluster], points: Sequence[Tensor], light: _Vector, *, sun: bool) -> Tensor:
    """Whether each point (x, y, z each (N,)) is hidden from the light: (N,) bool.

    light: the unit direction towards the sun, or a lamp's position. Points should lie slightly above their surface.
    """
    hidden = torch.zeros_like(points[0], dtype=torch.bool)
    if sun:
        axes = across(light)
        coordinates = [points[0] * a[0] + points[1] * a[1] + points[2] * a[2] for a in axes.tolist()]
        lines = list(points)
    else:
        lines = [points[i] - light[i] for i in range(3)]
        length = root(lines[0] * lines[0] + lines[1] * lines[1] + lines[2] * lines[2])
        coordinates = [line / length for line in lines]

    def reach(middle: np.ndarray, radius: float, way: Sequence[Tensor]) -> Tensor:
        """Indices of the points, given by coordinates (sun) or unit directions (lamp), that a sphere may shadow."""
        if sun:
            a, b = (axes @ middle).tolist()
            chosen = (way[0] - a).square() + (way[1] - b).square() < radius**2
        else:
            to_sphere = middle - np.asarray(light)
            gap = float(np.linalg.norm(to_sphere))
            cosine = math.sqrt(1 - (radius / gap) ** 2) if gap > radius else -2.0
            x, y, z = (to_sphere / max(gap, 1e-9)).tolist()
            chosen = way[0] * x + way[1] * y + way[2] * z > cosine
        return torch.nonzero(chosen)[:, 0]

    for group in groups:
        near = reach(group.middle, group.radius, coordinates)
        if len(near) == 0:
            continue
        way, line = [c[near] for c in coordinates], [x[near] for x in lines]
        dark = torch.zeros_like(near, dtype=torch.bool)
        for solid, middle, radius in group.solids:
            chosen = reach(middle, radius, way)
            if len(chosen) == 0:
                continue
            if sun:
                enter, leave, _ = span(solid, [x[chosen] for x in line], light)
                dark[chosen] |= (enter <= leave) & (leave > 0) & (enter > -1e-3)
            else:
                enter, leave, _ = span(solid, light, [x[chosen] for x in line])
                dark[chosen] |= (enter <= leave) & (enter < 1) & (leave > 0) & (enter > 0)
        hidden[near] |= dark
    return hidden
