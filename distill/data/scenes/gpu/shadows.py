"""Whether lights are hidden: `cast.shadow` for a tile of points."""

from __future__ import annotations

import triton
import triton.language as tl

from distill.data.scenes.gpu.hits import INF, chord, seen_from, turned
from distill.data.scenes.gpu.slots import (
    AXES,
    CASTER_CENTRE,
    CASTER_FIRST,
    CASTER_QUADRIC,
    CASTER_ROUND,
    CASTERS,
    CLUSTERS,
    EDGES,
    GROUP,
    LAMP_EYE,
    LAMP_OUTSIDE,
    LAMP_PLANES,
    MEMBERS,
    PLACE,
    SLOPE,
    SPHERES,
    SQUARED,
)

EARLY = tl.constexpr(-1e-3)


@triton.jit
def some(mask):
    """Whether a mask is set anywhere, for branches of the whole program."""
    return tl.max(mask.to(tl.int32), 0) > 0


@triton.jit
def hidden_from_lamp(integers, floats, lamp, asked, x, y, z):
    """1 where `asked` is set and a lamp is hidden from the point, else 0."""
    place = floats + tl.load(integers + PLACE) + 3 * lamp
    x, y, z = x - tl.load(place), y - tl.load(place + 1), z - tl.load(place + 2)
    length = tl.sqrt_rn(x * x + y * y + z * z)
    wx, wy, wz = tl.div_rn(x, length), tl.div_rn(y, length), tl.div_rn(z, length)
    clusters, casters, edges = tl.load(integers + CLUSTERS), tl.load(integers + CASTERS), tl.load(integers + EDGES)
    balls = floats + tl.load(integers + SPHERES) + 4 * clusters * lamp
    members = floats + tl.load(integers + MEMBERS) + 4 * casters * lamp
    planes = floats + tl.load(integers + LAMP_PLANES) + 4 * edges * lamp
    outsides = integers + tl.load(integers + LAMP_OUTSIDE) + edges * lamp
    eyes = floats + tl.load(integers + LAMP_EYE) + 3 * casters * lamp
    groups, firsts = integers + tl.load(integers + GROUP), integers + tl.load(integers + CASTER_FIRST)
    rounds, quadrics = integers + tl.load(integers + CASTER_ROUND), floats + tl.load(integers + CASTER_QUADRIC)
    hidden = asked.to(tl.int32) * 0
    for g in range(clusters):
        cosine = wx * tl.load(balls + g) + wy * tl.load(balls + clusters + g) + wz * tl.load(balls + 2 * clusters + g)
        near = asked & (hidden == 0) & (cosine > tl.load(balls + 3 * clusters + g))
        if some(near):
            for k in range(tl.load(groups + g), tl.load(groups + g + 1)):
                ball = members + 4 * k
                cosine = wx * tl.load(ball) + wy * tl.load(ball + 1) + wz * tl.load(ball + 2)
                close = near & (hidden == 0) & (cosine > tl.load(ball + 3))
                if some(close):
                    enter, leave = x * 0.0 - INF, x * 0.0 + INF
                    for q in range(tl.load(firsts + k), tl.load(firsts + k + 1)):
                        plane = planes + 4 * q
                        slope = x * tl.load(plane) + y * tl.load(plane + 1) + z * tl.load(plane + 2)
                        at = tl.div_rn(1.0, slope) * tl.load(plane + 3)
                        if tl.load(outsides + q) != 0:
                            enter = tl.where(slope < 0.0, tl.where(at > enter, at, enter), INF)
                        else:
                            leave = tl.where((slope > 0.0) & (at < leave), at, leave)
                    if tl.load(rounds + k) != 0:
                        into, out = seen_from(quadrics + 9 * k, eyes + 3 * k, x, y, z)
                        enter, leave = tl.where(into > enter, into, enter), tl.where(out < leave, out, leave)
                    dark = close & (enter <= leave) & (enter < 1.0) & (leave > 0.0) & (enter > 0.0)
                    hidden = tl.where(dark, 1, hidden)
    return hidden


@triton.jit
def hidden_from_sun(integers, floats, lamp, asked, x, y, z):
    """1 where `asked` is set and the sun is hidden from the point, else 0."""
    axes = floats + tl.load(integers + AXES) + 6 * lamp
    wx = x * tl.load(axes) + y * tl.load(axes + 1) + z * tl.load(axes + 2)
    wy = x * tl.load(axes + 3) + y * tl.load(axes + 4) + z * tl.load(axes + 5)
    clusters, casters, edges = tl.load(integers + CLUSTERS), tl.load(integers + CASTERS), tl.load(integers + EDGES)
    balls = floats + tl.load(integers + SPHERES) + 4 * clusters * lamp
    members = floats + tl.load(integers + MEMBERS) + 4 * casters * lamp
    planes = floats + tl.load(integers + LAMP_PLANES) + 4 * edges * lamp
    slopes = floats + tl.load(integers + SLOPE) + edges * lamp
    eyes, squares = floats + tl.load(integers + LAMP_EYE), floats + tl.load(integers + SQUARED) + casters * lamp
    groups, firsts = integers + tl.load(integers + GROUP), integers + tl.load(integers + CASTER_FIRST)
    rounds, quadrics = integers + tl.load(integers + CASTER_ROUND), floats + tl.load(integers + CASTER_QUADRIC)
    centres = floats + tl.load(integers + CASTER_CENTRE)
    hidden = asked.to(tl.int32) * 0
    for g in range(clusters):
        a, b = wx - tl.load(balls + g), wy - tl.load(balls + clusters + g)
        near = asked & (hidden == 0) & (a * a + b * b < tl.load(balls + 2 * clusters + g))
        if some(near):
            for k in range(tl.load(groups + g), tl.load(groups + g + 1)):
                a, b = wx - tl.load(members + 4 * k), wy - tl.load(members + 4 * k + 1)
                close = near & (hidden == 0) & (a * a + b * b < tl.load(members + 4 * k + 2))
                if some(close):
                    enter, leave = x * 0.0 - INF, x * 0.0 + INF
                    for q in range(tl.load(firsts + k), tl.load(firsts + k + 1)):
                        plane, slope = planes + 4 * q, tl.load(slopes + q)
                        below = x * tl.load(plane) + y * tl.load(plane + 1) + z * tl.load(plane + 2)
                        at = tl.div_rn(tl.load(plane + 3) - below, slope)
                        if slope < 0.0:
                            enter = tl.where(at > enter, at, enter)
                        else:
                            leave = tl.where(at < leave, at, leave)
                    if tl.load(rounds + k) != 0:
                        centre, eye = centres + 3 * k, eyes + 3 * (casters * lamp + k)
                        px, py, pz = x - tl.load(centre), y - tl.load(centre + 1), z - tl.load(centre + 2)
                        ox, oy, oz = turned(quadrics + 9 * k, px, py, pz)
                        squared = tl.load(squares + k)
                        into, out = chord(ox, oy, oz, tl.load(eye), tl.load(eye + 1), tl.load(eye + 2), squared)
                        enter, leave = tl.where(into > enter, into, enter), tl.where(out < leave, out, leave)
                    dark = close & (enter <= leave) & (leave > 0.0) & (enter > EARLY)
                    hidden = tl.where(dark, 1, hidden)
    return hidden
