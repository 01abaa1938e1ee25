"""The colour of each ray's hit: `reference._shade`, `reference._sky` and `cast.shadow` for one point at a time.

The GPU version is `distill.data.scenes.gpu.shading`.
"""

from __future__ import annotations

import math

import numpy as np

from distill.data.scenes.fused.compiled import kernel, part

_f = np.float32
# A literal inside a kernel would be a double and promote the whole expression to double precision.
_INF, _ZERO, _HALF, _ONE, _TWO, _THREE = (_f(x) for x in (math.inf, 0, 0.5, 1, 2, 3))
_TINY, _EARLY, _LIFT = _f(1e-20), _f(-1e-3), _f(1e-3)


@part
def _unit(x, y, z):
    length = np.sqrt(max(x * x + y * y + z * z, _TINY))
    return x / length, y / length, z / length


@part
def _texel(looks, start, level, u, v):
    """Bilinear ramp position and detail of one mip level; `start`: the pattern's first texel in the bank."""
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
    """As `texture.sample`; the second level is not read where its weight is 0."""
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
def _chord(ox, oy, oz, dx, dy, dz, squared):
    """Where a line enters and leaves the unit sphere, in a quadric's frame; enter > leave means a miss."""
    nearest = -(ox * dx + oy * dy + oz * dz) / squared
    ex, ey, ez = ox + nearest * dx, oy + nearest * dy, oz + nearest * dz
    chord = _ONE - (ex * ex + ey * ey + ez * ez)
    reach = np.sqrt(max(chord, _ZERO) / squared) if chord > _ZERO else -_INF
    return nearest - reach, nearest + reach


@part
def _hidden_from_lamp(casters, lamps, lamp, x, y, z, hint, near):
    """Whether a lamp is hidden from a point. hint (L,2): the last cluster and caster that hid it; near: (G,)."""
    group, first, round_, m, _ = casters
    _, place, _, _, _, balls, members, planes, _, outside, eye, _ = lamps
    x, y, z = x - place[lamp, 0], y - place[lamp, 1], z - place[lamp, 2]
    length = np.sqrt(x * x + y * y + z * z)
    wx, wy, wz = x / length, y / length, z / length
    for g in range(len(near)):
        near[g] = wx * balls[lamp, 0, g] + wy * balls[lamp, 1, g] + wz * balls[lamp, 2, g] > balls[lamp, 3, g]
    # The caster that hid the neighbouring point is tested first: it often hides this one too; the order changes no bit.
    for turn in range(-1, len(near)):
        g = hint[lamp, 0] if turn < 0 else turn
        if g < 0 or not near[g]:
            continue
        low = hint[lamp, 1] if turn < 0 else group[g]
        for k in range(low, low + 1 if turn < 0 else group[g + 1]):
            cosine = wx * members[lamp, k, 0] + wy * members[lamp, k, 1] + wz * members[lamp, k, 2]
            if not cosine > members[lamp, k, 3]:
                continue
            enter, leave = -_INF, _INF
            for q in range(first[k], first[k + 1]):
                slope = x * planes[lamp, q, 0] + y * planes[lamp, q, 1] + z * planes[lamp, q, 2]
                at = (_ONE / slope) * planes[lamp, q, 3]
                if outside[lamp, q]:
                    enter = max(enter, at) if slope < _ZERO else _INF
                elif slope > _ZERO:
                    leave = min(leave, at)
                if enter > leave or enter >= _ONE or leave <= _ZERO:
                    break
            if round_[k]:
                dx = m[k, 0, 0] * x + m[k, 0, 1] * y + m[k, 0, 2] * z
                dy = m[k, 1, 0] * x + m[k, 1, 1] * y + m[k, 1, 2] * z
                dz = m[k, 2, 0] * x + m[k, 2, 1] * y + m[k, 2, 2] * z
                squared = max(dx * dx + dy * dy + dz * dz, _TINY)
                into, out = _chord(eye[lamp, k, 0], eye[lamp, k, 1], eye[lamp, k, 2], dx, dy, dz, squared)
                enter, leave = max(enter, into), min(leave, out)
            if enter <= leave and enter < _ONE and leave > _ZERO and enter > _ZERO:
                hint[lamp, 0], hint[lamp, 1] = g, k
                return True
    return False


@part
def _hidden_from_sun(casters, lamps, lamp, x, y, z, hint, near):
    """Whether the sun is hidden from a point; as `_hidden_from_lamp`."""
    group, first, round_, m, centre = casters
    _, _, _, _, axes, balls, members, planes, slope, _, eye, squared = lamps
    wx = x * axes[lamp, 0, 0] + y * axes[lamp, 0, 1] + z * axes[lamp, 0, 2]
    wy = x * axes[lamp, 1, 0] + y * axes[lamp, 1, 1] + z * axes[lamp, 1, 2]
    for g in range(len(near)):
        a, b = wx - balls[lamp, 0, g], wy - balls[lamp, 1, g]
        near[g] = a * a + b * b < balls[lamp, 2, g]
    for turn in range(-1, len(near)):
        g = hint[lamp, 0] if turn < 0 else turn
        if g < 0 or not near[g]:
            continue
        low = hint[lamp, 1] if turn < 0 else group[g]
        for k in range(low, low + 1 if turn < 0 else group[g + 1]):
            a, b = wx - members[lamp, k, 0], wy - members[lamp, k, 1]
            if not a * a + b * b < members[lamp, k, 2]:
                continue
            enter, leave = -_INF, _INF
            for q in range(first[k], first[k + 1]):
                below = x * planes[lamp, q, 0] + y * planes[lamp, q, 1] + z * planes[lamp, q, 2]
                at = (planes[lamp, q, 3] - below) / slope[lamp, q]
                if slope[lamp, q] < _ZERO:
                    enter = max(enter, at)
                else:
                    leave = min(leave, at)
                if enter > leave or leave <= _ZERO:
                    break
            if round_[k]:
                px, py, pz = x - centre[k, 0], y - centre[k, 1], z - centre[k, 2]
                ox = m[k, 0, 0] * px + m[k, 0, 1] * py + m[k, 0, 2] * pz
                oy = m[k, 1, 0] * px + m[k, 1, 1] * py + m[k, 1, 2] * pz
                oz = m[k, 2, 0] * px + m[k, 2, 1] * py + m[k, 2, 2] * pz
                dx, dy, dz = eye[lamp, k, 0], eye[lamp, k, 1], eye[lamp, k, 2]
                into, out = _chord(ox, oy, oz, dx, dy, dz, squared[lamp, k])
                enter, leave = max(enter, into), min(leave, out)
            if enter <= leave and leave > _ZERO and enter > _EARLY:
                hint[lamp, 0], hint[lamp, 1] = g, k
                return True
    return False


@part
def _ambient(air, bend, level, x, y, z):
    """The ambient light (three numbers)."""
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
    px, py, pz = lamps.place[lamp, 0], lamps.place[lamp, 1], lamps.place[lamp, 2]
    if lamps.sun[lamp]:
        return px, py, pz, _ONE
    x, y, z = px - x, py - y, pz - z
    power = (_ONE / (x * x + y * y + z * z + lamps.reach[lamp])) * lamps.reach[lamp]
    x, y, z = _unit(x, y, z)
    return x, y, z, power


@part
def _surface(flat, x, y, z):
    """The surface normal at a point, and the point and the normal in the solid's own frame."""
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
    """Adds all lights to light (6,): three numbers of diffuse light, and three of specular highlights."""
    lift = t * _LIFT + _LIFT
    x, y, z = point[0] + normal[0] * lift, point[1] + normal[1] * lift, point[2] + normal[2] * lift
    for lamp in range(len(lamps.sun)):
        tx, ty, tz, power = _towards(lamps, lamp, point[0], point[1], point[2])
        if not normal[0] * tx + normal[1] * ty + normal[2] * tz > _ZERO:
            continue
        slope = bent[0] * tx + bent[1] * ty + bent[2] * tz
        if not slope > _ZERO:
            continue
        if lamps.sun[lamp]:
            hidden = _hidden_from_sun(casters, lamps, lamp, x, y, z, hint, near)
        else:
            hidden = _hidden_from_lamp(casters, lamps, lamp, x, y, z, hint, near)
        if hidden:
            continue
        strength = slope * power
        for i in range(3):
            light[i] += lamps.colour[lamp, i] * strength
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
    """Writes the colour of the point at t along a ray to light[:3], as `reference._shade`."""
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
def shade(looks, casters, lamps, air, eye, x, y, z, depth, surface, colour, hint, near, light):
    """Fills colour (3,V) where the rays x, y, z (V) from eye (3,) hit a surface; the spare pixels stay black.

    Working memory: hint (L,2) int64, initially -1, near (G,) bool, light (6,) float32.
    """
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
    """Fills colour (3,V) where the rays x, y, z (V) hit nothing, as `reference._sky`."""
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
