"""The reference renderer in torch, which defines every bit of a picture: cast rays, shade surfaces, fill in the sky.

Shapes: N points or rays, as lists of their components; the sample grid is that of `cast.Camera.rays`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data.scenes import texture
from distill.data.scenes.cast import Surfaces, cast, clusters, root, shadow, surfaces
from distill.data.scenes.stage import Stage


def light_up(stage: Stage, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Depth (2,H+1,W+1) and linear colour (3,2,H+1,W+1) on the corner and centre grids."""
    height, width = size
    camera = stage.camera
    assert camera is not None
    rays = camera.rays(height, width, corners=True)
    hits = cast(stage.solids, camera, rays)
    colour = torch.zeros(3, hits.depth.numel())
    empty = torch.nonzero(hits.surface.reshape(-1) < 0)[:, 0]
    if len(empty):
        colour[:, empty] = _sky(stage, [r.reshape(-1)[empty] for r in rays])
    solid = torch.nonzero(hits.surface.reshape(-1) >= 0)[:, 0]
    t = hits.depth.reshape(-1)[solid]
    ray = [r.reshape(-1)[solid] for r in rays]
    seen = _shade(stage, hits.surface.reshape(-1)[solid], t, ray, 1.0 / (camera.focal * width))
    if stage.haze:
        clear = (stage.haze / (stage.haze + t)) ** 2
        horizon = torch.tensor(stage.sky[0] if stage.sky else stage.ambient[0])[:, None]
        seen = seen * clear + horizon * (1 - clear)
    colour[:, solid] = seen
    return hits.depth, colour.reshape(3, *hits.depth.shape)


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _unit(a: list[Tensor]) -> list[Tensor]:
    length = root(_dot(a, a).clamp(min=1e-20))
    return [x / length for x in a]


def _surface_points(
    stage: Stage, surface: Surfaces, rows: Tensor, t: Tensor, ray: list[Tensor]
) -> tuple[list[Tensor], ...]:
    """World points, unit normals, and position and normal in the solid's own frame."""
    assert stage.camera is not None
    point = [stage.camera.position[i] + t * ray[i] for i in range(3)]
    flat = torch.cat(
        [surface.gradient.reshape(-1, 9), surface.constant, surface.centre, surface.axes.reshape(-1, 9)], dim=1
    )[rows].T
    away = [point[i] - flat[12 + i] for i in range(3)]
    normal = _unit([_dot(away, [flat[3 * i], flat[3 * i + 1], flat[3 * i + 2]]) + flat[9 + i] for i in range(3)])
    axes = [[flat[15 + 3 * i + j] for j in range(3)] for i in range(3)]
    return point, normal, [_dot(away, a) for a in axes], [_dot(normal, a) for a in axes]


def _shade(stage: Stage, rows: Tensor, t: Tensor, ray: list[Tensor], pixel: float) -> Tensor:
    """Linear colour (3,N) of the points at `t` along the rays."""
    surface = surfaces(stage.solids)
    point, normal, own, own_normal = _surface_points(stage, surface, rows, t, ray)
    material = surface.material[rows]
    patterns, numbers = texture.table(stage.materials)
    number = numbers[material]
    # Texture is projected along the axis that the surface faces most.
    x, y, z = (c.abs() for c in own_normal)
    on_x, on_y = (x > y) & (x > z), (y >= x) & (y > z)
    u = torch.where(on_x, own[2], own[0])
    v = torch.where(on_y, own[2], -own[1])
    facing = -_dot(_unit(ray), normal)
    albedo, texel = texture.paint(patterns[material], number, u, v, t * pixel / facing.clamp(min=0.12))
    bend_a, bend_b = (texel[:, 0] - 0.5) * number[:, 18], (texel[:, 1] - 0.5) * number[:, 18]
    bent = _unit([normal[0] + bend_a, normal[1] + bend_b, normal[2] + bend_a - bend_b])

    up, down = torch.tensor(stage.ambient[0])[:, None], torch.tensor(stage.ambient[1])[:, None]
    share = 0.5 + 0.5 * bent[1]
    # Ambient occlusion: near the floor less of the room is visible.
    near_floor = (point[1].clamp(min=0.0) + 0.08) / (point[1].clamp(min=0.0) + 0.16)
    light = (up * share + down * (1 - share)) * torch.where(normal[1] < 0.7, near_floor, 1.0) * _corners(stage, point)
    shine = torch.zeros_like(light)
    lifted = [p + n * (1e-3 + 1e-3 * t) for p, n in zip(point, normal, strict=True)]
    groups = clusters(stage.solids)
    for lamp in stage.lights:
        if lamp.sun:
            towards = [torch.tensor(c) for c in lamp.place]
            power: Tensor = torch.tensor(1.0)
        else:
            away = [lamp.place[i] - point[i] for i in range(3)]
            square = _dot(away, away)
            towards, power = _unit(away), lamp.reach**2 / (lamp.reach**2 + square)
        slope = torch.where(_dot(normal, towards) > 0, _dot(bent, towards), 0.0)
        lit = torch.nonzero(slope > 0)[:, 0]
        hidden = shadow(groups, [p[lit] for p in lifted], lamp.place, sun=lamp.sun)
        strength = torch.zeros_like(t)
        strength[lit] = torch.where(hidden, 0.0, 1.0)
        strength = strength * power
        shade = torch.tensor(lamp.colour)[:, None]
        light = light + shade * (slope.clamp(min=0) * strength)
        half = _unit([towards[i] - r for i, r in enumerate(_unit(ray))])
        gleam = _dot(half, bent).clamp(min=0)
        for _ in range(5):
            gleam = gleam * gleam
        shine = shine + shade * (gleam * strength * number[:, 16] * 0.6)
    return albedo * (light + number[:, 17]) + shine


def _corners(stage: Stage, point: list[Tensor]) -> Tensor:
    """A soft darkening (N,) towards the walls, floor and ceiling of a room."""
    shade = torch.ones_like(point[0])
    if stage.bounds is not None:
        hx, hy, hz = stage.bounds
        for gap in (hx - point[0].abs(), hz - point[2].abs(), hy - (point[1] - hy).abs()):
            gap = gap.clamp(min=0)
            shade = shade * (gap + 0.25) / (gap + 0.45)
    return shade


def _sky(stage: Stage, ray: list[Tensor]) -> Tensor:
    """Colour (3,N) of rays that hit nothing."""
    if stage.sky is None:
        return torch.zeros(3, len(ray[0]))
    horizon, zenith = (torch.tensor(c)[:, None] for c in stage.sky)
    direction = _unit(ray)
    rise = direction[1].clamp(min=0)
    blue = rise * (2 - rise) * 0.9 + 0.1 * (rise > 0)
    colour = horizon * (1 - blue) + zenith * blue
    # Clouds lie on a plane far above.
    level = 1.0 / rise.clamp(min=0.02)
    noise = torch.full_like(rise, texture.cloud_pattern(stage.clouds)).long()
    cloud = texture.sample(
        noise, direction[0] * level * 0.15 + 0.3, direction[2] * level * 0.15 + 0.7, level * 0.002, smooth=False
    )[:, 0]
    cover = ((cloud - 1 + stage.clouds * 0.8) * 3).clamp(0, 1) * (rise * 8).clamp(0, 1)
    white = horizon * 0.4 + 0.55
    colour = colour * (1 - cover) + white * cover
    sun = stage.lights[0]
    glow = _dot(direction, [torch.tensor(c) for c in sun.place]).clamp(min=0)
    for _ in range(6):
        glow = glow * glow
    return colour + torch.tensor(sun.colour)[:, None] * glow
