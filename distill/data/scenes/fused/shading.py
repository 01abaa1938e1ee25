"""The colour of what a ray meets: `scenes._shade`, `scenes._sky` and `cast.shadow` for one point at a time."""

from __future__ import annotations

import math

import numpy as np

from distill.data.scenes.fused.compiled import kernel, part

_f = np.float32
# A number written inside a kernel would be a double and draw the whole line up to double precision.
_INF, _ZERO, _HALF, _ONE, _TWO, _THREE = (_f(x) for x in (math.inf, 0, 0.5, 1, 2, 3))
_TINY, _EARLY, _LIFT = _f(1e-20), _f(-1e-3), _f(1e-3)


@part
def _unit(x, y, z):
    length = np.sqrt(max(x * x + y * y + z * z, _TINY))
    return x / length, y / length, z / length


@part
def _texel(looks, start, level, u, v):
    """Bilinear ramp position and detail of one mip level; `start`: of the pattern in the bank."""
    size, bank = looks.levels[level, 0], looks.bank
    start += looks.levels[level, 1]
    x, y = u * np.float32(size) - _HALF, v * np.float32(size) - _HALF
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = x - x0, y - y0
    gx, gy = _ONE - fx, _ONE - fy
    mask = size - 1
    left, top = np.int64(x0) & mask, np.int64(y0) & mask
    right, bottom = (left + 1) & mask, (top + 1) & mask
    a, b = start + top * size + left, start + top * size + right
    c, d = start + bottom * size + left, start + bottom * size + right
    ramp = (bank[a, 0] * gx + bank[b, 0] * fx) * gy + (bank[c, 0] * gx + bank[d, 0] * fx) * fy
    detail = (bank[a, 1] * gx + bank[b, 1] * fx) * gy + (bank[c, 1] * gx + bank[d, 1] * fx) * fy
    return ramp, detail


@part
def _sample(looks, start, u, v, footprint, smooth):
    """As `texture.sample`; what the second level adds with weight nought is not looked up."""
    top = len(looks.levels) - 1
    texels = footprint * np.float32(looks.levels[0, 0])
    texels = min(max(texels, _ONE), np.float32(looks.levels[0, 0]))
    mantissa, exponent = math.frexp(texels)
    level = np.float32(exponent - 1) + (_TWO * mantissa - _ONE)
    low = min(max(np.int64(np.floor(level)), 0), top)
    mix = level - np.float32(low)
    ramp, detail = _texel(looks, start, low, u, v)
    if smooth and mix != _ZERO:
        ramp2, detail2 = _texel(looks, start, min(low + 1, top), u, v)
        rest = _ONE - mix
        ramp, detail = ramp * rest + ramp2 * mix, detail * rest + detail2 * mix
    return ramp, detail


@part
def _paint(looks, air, number, pattern, u, v, footprint):
    """Albedo (three numbers) and texel, as `texture.paint`."""
    rate, rise = number[12], number[13]
    u, v, footprint = u * rate + _HALF, v * rise + _HALF, footprint * max(rate, rise)
    texel, detail = _sample(looks, pattern * air.stride, u, v, footprint, True)
    ramp = texel * _THREE
    w0, w1 = max(_ONE - abs(ramp), _ZERO), max(_ONE - abs(ramp - _ONE), _ZERO)
    w2, w3 = max(_ONE - abs(ramp - _TWO), _ZERO), max(_ONE - abs(ramp - _THREE), _ZERO)
    coarse, _ = _sample(
        looks,
        air.stain_pattern * air.stride,
        u * _f(0.23) + _f(0.37),
        v * _f(0.23) + _f(0.11),
        footprint * _f(0.23),
        False,
    )
    light = (_ONE + number[14] * (detail - _HALF)) * (_ONE + number[15] * (coarse - _HALF))
    red = (w0 * number[0] + w1 * number[3] + w2 * number[6] + w3 * number[9]) * light
    green = (w0 * number[1] + w1 * number[4] + w2 * number[7] + w3 * number[10]) * light
    blue = (w0 * number[2] + w1 * number[5] + w2 * number[8] + w3 * number[11]) * light
    return red, green, blue, texel, detail


@part
def _meets_lamp(casters, lamps, lamp, k, x, y, z):
    """Whether caster k stands between a lamp and a point at x, y, z from it."""
    enter, leave = -_INF, _INF
    for q in range(casters.first[k], casters.first[k + 1]):
        plane = lamps.planes[lamp, q]
        slope = x * plane[0] + y * plane[1] + z * plane[2]
        at = (_ONE / slope) * plane[3]
        if lamps.outside[lamp, q]:
            if not slope < _ZERO or not at < _ONE:
                return False
            enter = at if at > enter else enter
        elif slope > _ZERO:
            if not at > _ZERO:
                return False
            leave = at if at < leave else leave
        if enter > leave:
            return False
    if casters.round[k]:
        m, eye = casters.quadric[k], lamps.eye[lamp, k]
        dx = m[0, 0] * x + m[0, 1] * y + m[0, 2] * z
        dy = m[1, 0] * x + m[1, 1] * y + m[1, 2] * z
        dz = m[2, 0] * x + m[2, 1] * y + m[2, 2] * z
        squared = max(dx * dx + dy * dy + dz * dz, _TINY)
        nearest = -(eye[0] * dx + eye[1] * dy + eye[2] * dz) / squared
        ex, ey, ez = eye[0] + nearest * dx, eye[1] + nearest * dy, eye[2] + nearest * dz
        chord = _ONE - (ex * ex + ey * ey + ez * ez)
        if not chord > _ZERO:
            return False
        reach = np.sqrt(chord / squared)
        enter, leave = max(enter, nearest - reach), min(leave, nearest + reach)
    return enter <= leave and enter < _ONE and leave > _ZERO and enter > _ZERO


@part
def _meets_sun(casters, lamps, lamp, k, x, y, z):
    """Whether caster k stands between the sun and the point x, y, z."""
    enter, leave = -_INF, _INF
    for q in range(casters.first[k], casters.first[k + 1]):
        plane = lamps.planes[lamp, q]
        at = (plane[3] - (x * plane[0] + y * plane[1] + z * plane[2])) / lamps.slope[lamp, q]
        if at != at:
            return False
        if lamps.outside[lamp, q]:
            enter = at if at > enter else enter
        else:
            leave = at if at < leave else leave
        if enter > leave or leave <= _ZERO:
            return False
    if casters.round[k]:
        m, d, squared = casters.quadric[k], lamps.eye[lamp, k], lamps.squared[lamp, k]
        x, y, z = x - casters.centre[k, 0], y - casters.centre[k, 1], z - casters.centre[k, 2]
        ox = m[0, 0] * x + m[0, 1] * y + m[0, 2] * z
        oy = m[1, 0] * x + m[1, 1] * y + m[1, 2] * z
        oz = m[2, 0] * x + m[2, 1] * y + m[2, 2] * z
        nearest = -(ox * d[0] + oy * d[1] + oz * d[2]) / squared
        ex, ey, ez = ox + nearest * d[0], oy + nearest * d[1], oz + nearest * d[2]
        chord = _ONE - (ex * ex + ey * ey + ez * ez)
        if not chord > _ZERO:
            return False
        reach = np.sqrt(chord / squared)
        enter, leave = max(enter, nearest - reach), min(leave, nearest + reach)
    return enter <= leave and leave > _ZERO and enter > _EARLY


@part
def _meets(casters, lamps, lamp, k, way, line):
    """Whether caster k hides the lamp: its bounding sphere first, as `cast.shadow`."""
    ball = lamps.members[lamp, k]
    if lamps.sun[lamp]:
        a, b = way[0] - ball[0], way[1] - ball[1]
        return a * a + b * b < ball[2] and _meets_sun(casters, lamps, lamp, k, line[0], line[1], line[2])
    if way[0] * ball[0] + way[1] * ball[1] + way[2] * ball[2] > ball[3]:
        return _meets_lamp(casters, lamps, lamp, k, line[0], line[1], line[2])
    return False


@part
def _hidden(casters, lamps, lamp, x, y, z, hint, near):
    """Whether a lamp is hidden from a point. hint (L,2): the cluster and caster that hid it last; near: (G,)."""
    balls = lamps.spheres[lamp]
    if lamps.sun[lamp]:
        axes = lamps.axes[lamp]
        line = (x, y, z)
        first = x * axes[0, 0] + y * axes[0, 1] + z * axes[0, 2]
        second = x * axes[1, 0] + y * axes[1, 1] + z * axes[1, 2]
        way = (first, second, _ZERO)
        for g in range(len(near)):
            a, b = first - balls[0, g], second - balls[1, g]
            near[g] = a * a + b * b < balls[2, g]
    else:
        place = lamps.place[lamp]
        line = (x - place[0], y - place[1], z - place[2])
        length = np.sqrt(line[0] * line[0] + line[1] * line[1] + line[2] * line[2])
        way = (line[0] / length, line[1] / length, line[2] / length)
        for g in range(len(near)):
            near[g] = way[0] * balls[0, g] + way[1] * balls[1, g] + way[2] * balls[2, g] > balls[3, g]
    # What hid the neighbour hides this point too, more often than not; asked first, in whatever order torch asks.
    if hint[lamp, 1] >= 0 and near[hint[lamp, 0]] and _meets(casters, lamps, lamp, hint[lamp, 1], way, line):
        return True
    for g in range(len(near)):
        if near[g]:
            for k in range(casters.group[g], casters.group[g + 1]):
                if _meets(casters, lamps, lamp, k, way, line):
                    hint[lamp, 0], hint[lamp, 1] = g, k
                    return True
    return False


@part
def _ambient(air, bend, level, x, y, z):
    """The light of everything else: (three numbers)."""
    share = _HALF + _HALF * bend
    rest, corner = _ONE - share, _ONE
    tall = max(y, _ZERO)
    dim = (tall + _f(0.08)) / (tall + _f(0.16)) if level < _f(0.7) else _ONE
    for b in range(len(air.bounds)):
        hx, hy, hz = air.bounds[b]
        for gap in (hx - abs(x), hz - abs(z), hy - abs(y - hy)):
            gap = max(gap, _ZERO)
            corner = corner * (gap + _f(0.25)) / (gap + _f(0.45))
    up, down = air.ambient[0], air.ambient[1]
    return (
        (up[0] * share + down[0] * rest) * dim * corner,
        (up[1] * share + down[1] * rest) * dim * corner,
        (up[2] * share + down[2] * rest) * dim * corner,
    )


@part
def _towards(lamps, lamp, x, y, z):
    """The unit direction (three numbers) from a point to a lamp, and its strength there."""
    place = lamps.place[lamp]
    if lamps.sun[lamp]:
        return place[0], place[1], place[2], _ONE
    x, y, z = place[0] - x, place[1] - y, place[2] - z
    power = (_ONE / (x * x + y * y + z * z + lamps.reach[lamp])) * lamps.reach[lamp]
    x, y, z = _unit(x, y, z)
    return x, y, z, power


@part
def _surface(flat, x, y, z):
    """The normal of the surface at a point, and point and normal in the solid's own frame."""
    x, y, z = x - flat[12], y - flat[13], z - flat[14]
    nx, ny, nz = _unit(
        x * flat[0] + y * flat[1] + z * flat[2] + flat[9],
        x * flat[3] + y * flat[4] + z * flat[5] + flat[10],
        x * flat[6] + y * flat[7] + z * flat[8] + flat[11],
    )
    return (
        (nx, ny, nz),
        (
            x * flat[15] + y * flat[16] + z * flat[17],
            x * flat[18] + y * flat[19] + z * flat[20],
            x * flat[21] + y * flat[22] + z * flat[23],
        ),
        (
            nx * flat[15] + ny * flat[16] + nz * flat[17],
            nx * flat[18] + ny * flat[19] + nz * flat[20],
            nx * flat[21] + ny * flat[22] + nz * flat[23],
        ),
    )


@part
def _lit(casters, lamps, point, normal, bent, view, t, gloss, hint, near, light):
    """Adds the lights to light (6,): what a surface reflects of its colour, and what it shines."""
    lift = t * _LIFT + _LIFT
    x, y, z = point[0] + normal[0] * lift, point[1] + normal[1] * lift, point[2] + normal[2] * lift
    for lamp in range(len(lamps.sun)):
        tx, ty, tz, power = _towards(lamps, lamp, point[0], point[1], point[2])
        if not normal[0] * tx + normal[1] * ty + normal[2] * tz > _ZERO:
            continue
        slope = bent[0] * tx + bent[1] * ty + bent[2] * tz
        if not slope > _ZERO or _hidden(casters, lamps, lamp, x, y, z, hint, near):
            continue
        flat = slope * power
        for i in range(3):
            light[i] += lamps.colour[lamp, i] * flat
        if gloss != _ZERO:
            hx, hy, hz = _unit(tx - view[0], ty - view[1], tz - view[2])
            gleam = max(hx * bent[0] + hy * bent[1] + hz * bent[2], _ZERO)
            for _ in range(5):
                gleam = gleam * gleam
            gleam = gleam * power * gloss * _f(0.6)
            for i in range(3):
                light[3 + i] += lamps.colour[lamp, i] * gleam


@part
def _shade(looks, casters, lamps, air, row, t, ray, eye, hint, near, light):
    """Colour of the point at t along a ray, left in light[:3], as `scenes._shade`."""
    point = (eye[0] + t * ray[0], eye[1] + t * ray[1], eye[2] + t * ray[2])
    normal, own, facing = _surface(looks.surface[row], point[0], point[1], point[2])
    number, pattern = looks.numbers[looks.material[row]], looks.pattern[looks.material[row]]
    x, y, z = abs(facing[0]), abs(facing[1]), abs(facing[2])
    u = own[2] if (x > y) & (x > z) else own[0]
    v = own[2] if (y >= x) & (y > z) else -own[1]
    view = _unit(ray[0], ray[1], ray[2])
    towards = -(view[0] * normal[0] + view[1] * normal[1] + view[2] * normal[2])
    footprint = t * air.pixel / max(towards, _f(0.12))
    red, green, blue, texel, detail = _paint(looks, air, number, pattern, u, v, footprint)
    a, b = (texel - _HALF) * number[18], (detail - _HALF) * number[18]
    bent = _unit(normal[0] + a, normal[1] + b, normal[2] + a - b)
    light[0], light[1], light[2] = _ambient(air, bent[1], normal[1], point[0], point[1], point[2])
    light[3:] = _ZERO
    _lit(casters, lamps, point, normal, bent, view, t, number[16], hint, near, light)
    glow = number[17]
    light[0] = red * (light[0] + glow) + light[3]
    light[1] = green * (light[1] + glow) + light[4]
    light[2] = blue * (light[2] + glow) + light[5]


@kernel
def shade(looks, casters, lamps, air, eye, x, y, z, depth, surface, colour):
    """Fills colour (3,V) where the rays x, y, z (V) from eye (3,) meet a surface; the spare pixels stay black."""
    hint = np.full((len(lamps.sun), 2), -1, np.int64)
    near, light = np.empty(lamps.spheres.shape[2], np.bool_), np.empty(6, np.float32)
    for grid in range(2):
        for row in range(x.shape[1] - grid):
            for c in range(x.shape[2] - grid):
                if surface[grid, row, c] < 0:
                    continue
                t, ray = depth[grid, row, c], (x[grid, row, c], y[grid, row, c], z[grid, row, c])
                _shade(looks, casters, lamps, air, surface[grid, row, c], t, ray, eye, hint, near, light)
                if air.haze != _ZERO:
                    clear = (_ONE / (t + air.haze)) * air.haze
                    clear = clear * clear
                    for i in range(3):
                        light[i] = light[i] * clear + air.horizon[i] * (_ONE - clear)
                for i in range(3):
                    colour[i, grid, row, c] = light[i]


@kernel
def sky(looks, lamps, air, x, y, z, surface, colour):
    """Fills colour (3,V) where the rays x, y, z (V) meet nothing, as `scenes._sky`."""
    for grid in range(2):
        for row in range(x.shape[1] - grid):
            for c in range(x.shape[2] - grid):
                if surface[grid, row, c] >= 0:
                    continue
                dx, dy, dz = _unit(x[grid, row, c], y[grid, row, c], z[grid, row, c])
                rise = max(dy, _ZERO)
                blue = rise * (_TWO - rise) * _f(0.9) + (_f(0.1) if rise > _ZERO else _ZERO)
                level = _ONE / max(rise, _f(0.02))
                cloud, _ = _sample(
                    looks,
                    air.cloud_pattern * air.stride,
                    dx * level * _f(0.15) + _f(0.3),
                    dz * level * _f(0.15) + _f(0.7),
                    level * _f(0.002),
                    False,
                )
                cover = (cloud - _ONE + air.clouds) * _THREE
                cover = min(max(cover, _ZERO), _ONE) * min(max(rise * _f(8), _ZERO), _ONE)
                sun = lamps.place[0]
                glow = max(dx * sun[0] + dy * sun[1] + dz * sun[2], _ZERO)
                for _ in range(6):
                    glow = glow * glow
                for i in range(3):
                    plain = air.horizon[i] * (_ONE - blue) + air.zenith[i] * blue
                    white = air.horizon[i] * _f(0.4) + _f(0.55)
                    colour[i, grid, row, c] = plain * (_ONE - cover) + white * cover + lamps.colour[0, i] * glow
