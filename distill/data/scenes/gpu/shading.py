"""The colour of each ray's hit: `reference._shade` and `reference._sky`, one tile of rays per program."""

from __future__ import annotations

import triton
import triton.language as tl

from distill.data.scenes import texture
from distill.data.scenes.gpu.hits import TINY, rays_of, tile_of
from distill.data.scenes.gpu.shadows import hidden_from_lamp, hidden_from_sun, some
from distill.data.scenes.gpu.slots import (
    AIR,
    BUMP,
    CAMERA,
    CENTRE,
    CLOUDS,
    COLOUR,
    CONSTANT,
    COVER,
    DETAIL,
    DOWN,
    FRAME,
    GLOSS,
    GLOW,
    HALF,
    HAZE,
    HEIGHT,
    HORIZON,
    LAMPS,
    MATERIAL,
    MATERIAL_WORDS,
    NUMBERS,
    PATTERN,
    PIXEL,
    PLACE,
    POSITION,
    RATE,
    REACH,
    RISE,
    ROOM,
    SKY,
    STAIN,
    STAINS,
    SUN,
    SURFACE_WORDS,
    SURFACES,
    UP,
    WIDTH,
    ZENITH,
)

SIZE, TOP = tl.constexpr(texture.SIZE), tl.constexpr(texture.LEVELS - 1)


@triton.jit
def three(at):
    """Load three numbers: a position or a colour."""
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def unit(x, y, z):
    """The vector normalized to unit length."""
    squared = x * x + y * y + z * z
    length = tl.sqrt_rn(tl.where(squared > TINY, squared, TINY))
    return tl.div_rn(x, length), tl.div_rn(y, length), tl.div_rn(z, length)


@triton.jit
def texel(bank, start, level, u, v):
    """Bilinear ramp position and detail of one mip level; `start`: the pattern's first texel in the bank."""
    size = SIZE >> level
    # Texels of the finer levels: 4/3 of SIZE squared minus 4/3 of this level's size squared.
    start += (4 * (SIZE * SIZE - size * size)) // 3
    x, y = u * size.to(tl.float32) - 0.5, v * size.to(tl.float32) - 0.5
    x0, y0 = tl.floor(x), tl.floor(y)
    fx, fy = x - x0, y - y0
    gx, gy = 1.0 - fx, 1.0 - fy
    mask = size - 1
    west, north = x0.to(tl.int32) & mask, y0.to(tl.int32) & mask
    east, south = (west + 1) & mask, (north + 1) & mask
    a, b = bank + 2 * (start + north * size + west), bank + 2 * (start + north * size + east)
    c, d = bank + 2 * (start + south * size + west), bank + 2 * (start + south * size + east)
    ramp = (tl.load(a) * gx + tl.load(b) * fx) * gy + (tl.load(c) * gx + tl.load(d) * fx) * fy
    detail = (tl.load(a + 1) * gx + tl.load(b + 1) * fx) * gy + (tl.load(c + 1) * gx + tl.load(d + 1) * fx) * fy
    return ramp, detail


@triton.jit
def level_of(footprint):
    """The mip level for a footprint in repeats, and the weight of the next one."""
    texels = footprint * SIZE
    texels = tl.where(texels > 1.0, texels, 1.0)
    texels = tl.where(texels < SIZE, texels, SIZE * 1.0)
    bits = texels.to(tl.int32, bitcast=True)
    level = ((bits >> 23) - 127).to(tl.float32)
    level += ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    low = tl.floor(level)
    return low.to(tl.int32), level - low


@triton.jit
def paint(bank, integers, number, pattern, u, v, footprint):
    """Albedo (three numbers) and texel, as `texture.paint`. number: pointer to each point's row of numbers."""
    rate, rise = tl.load(number + RATE), tl.load(number + RISE)
    u, v, footprint = u * rate + 0.5, v * rise + 0.5, footprint * tl.where(rise > rate, rise, rate)
    low, mix = level_of(footprint)
    ramp, detail = texel(bank, pattern, low, u, v)
    ramp2, detail2 = texel(bank, pattern, tl.where(low < TOP, low + 1, TOP), u, v)
    rest = 1.0 - mix
    position, detail = ramp * rest + ramp2 * mix, detail * rest + detail2 * mix
    ramp = position * 3.0
    w0, w1 = 1.0 - tl.abs(ramp), 1.0 - tl.abs(ramp - 1.0)
    w2, w3 = 1.0 - tl.abs(ramp - 2.0), 1.0 - tl.abs(ramp - 3.0)
    w0, w1 = tl.where(w0 > 0.0, w0, 0.0), tl.where(w1 > 0.0, w1, 0.0)
    w2, w3 = tl.where(w2 > 0.0, w2, 0.0), tl.where(w3 > 0.0, w3, 0.0)
    coarser, _ = level_of(footprint * 0.23)
    stains = pattern * 0 + tl.load(integers + STAINS)
    coarse, _ = texel(bank, stains, coarser, u * 0.23 + 0.37, v * 0.23 + 0.11)
    light = (1.0 + tl.load(number + DETAIL) * (detail - 0.5)) * (1.0 + tl.load(number + STAIN) * (coarse - 0.5))
    c = number
    red = (w0 * tl.load(c) + w1 * tl.load(c + 3) + w2 * tl.load(c + 6) + w3 * tl.load(c + 9)) * light
    green = (w0 * tl.load(c + 1) + w1 * tl.load(c + 4) + w2 * tl.load(c + 7) + w3 * tl.load(c + 10)) * light
    blue = (w0 * tl.load(c + 2) + w1 * tl.load(c + 5) + w2 * tl.load(c + 8) + w3 * tl.load(c + 11)) * light
    return red, green, blue, position, detail


@triton.jit
def dimmed(corner, gap):
    """The corner darkening `corner`, multiplied by that of a wall at distance `gap`."""
    gap = tl.where(gap > 0.0, gap, 0.0)
    return tl.div_rn(corner * (gap + 0.25), gap + 0.45)


@triton.jit
def ambient(integers, air, bend, level, x, y, z):
    """The ambient light: three numbers."""
    share = 0.5 + 0.5 * bend
    rest, corner = 1.0 - share, x * 0.0 + 1.0
    tall = tl.where(y > 0.0, y, 0.0)
    dim = tl.where(level < 0.7, tl.div_rn(tall + 0.08, tall + 0.16), 1.0)
    if tl.load(integers + ROOM) > 0:
        half = tl.load(air + HALF + 1)
        corner = dimmed(corner, tl.load(air + HALF) - tl.abs(x))
        corner = dimmed(corner, tl.load(air + HALF + 2) - tl.abs(z))
        corner = dimmed(corner, half - tl.abs(y - half))
    red = (tl.load(air + UP) * share + tl.load(air + DOWN) * rest) * dim * corner
    green = (tl.load(air + UP + 1) * share + tl.load(air + DOWN + 1) * rest) * dim * corner
    blue = (tl.load(air + UP + 2) * share + tl.load(air + DOWN + 2) * rest) * dim * corner
    return red, green, blue


@triton.jit
def towards(integers, floats, lamp, x, y, z):
    """The unit direction (three numbers) from a point to a lamp, and its strength there."""
    place = floats + tl.load(integers + PLACE) + 3 * lamp
    px, py, pz = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    tx, ty, tz, power = x * 0.0 + px, x * 0.0 + py, x * 0.0 + pz, x * 0.0 + 1.0
    if tl.load(integers + tl.load(integers + SUN) + lamp) == 0:
        reach = tl.load(floats + tl.load(integers + REACH) + lamp)
        dx, dy, dz = px - x, py - y, pz - z
        power = tl.div_rn(1.0, dx * dx + dy * dy + dz * dz + reach) * reach
        tx, ty, tz = unit(dx, dy, dz)
    return tx, ty, tz, power


@triton.jit
def surface_at(flat, x, y, z):
    """The normal at a point, and point and normal in the solid's own frame. flat: pointer to each point's row."""
    x, y, z = x - tl.load(flat + CENTRE), y - tl.load(flat + CENTRE + 1), z - tl.load(flat + CENTRE + 2)
    nx = x * tl.load(flat) + y * tl.load(flat + 1) + z * tl.load(flat + 2) + tl.load(flat + CONSTANT)
    ny = x * tl.load(flat + 3) + y * tl.load(flat + 4) + z * tl.load(flat + 5) + tl.load(flat + CONSTANT + 1)
    nz = x * tl.load(flat + 6) + y * tl.load(flat + 7) + z * tl.load(flat + 8) + tl.load(flat + CONSTANT + 2)
    nx, ny, nz = unit(nx, ny, nz)
    a0, a1, a2 = tl.load(flat + FRAME), tl.load(flat + FRAME + 1), tl.load(flat + FRAME + 2)
    b0, b1, b2 = tl.load(flat + FRAME + 3), tl.load(flat + FRAME + 4), tl.load(flat + FRAME + 5)
    c0, c1, c2 = tl.load(flat + FRAME + 6), tl.load(flat + FRAME + 7), tl.load(flat + FRAME + 8)
    own0, own1, own2 = x * a0 + y * a1 + z * a2, x * b0 + y * b1 + z * b2, x * c0 + y * c1 + z * c2
    facing0, facing1 = nx * a0 + ny * a1 + nz * a2, nx * b0 + ny * b1 + nz * b2
    facing2 = nx * c0 + ny * c1 + nz * c2
    return nx, ny, nz, own0, own1, own2, facing0, facing1, facing2


@triton.jit
def lit(integers, floats, here, px, py, pz, nx, ny, nz, bx, by, bz, vx, vy, vz, t, gloss, red, green, blue):
    """Sums over all lights (six numbers): diffuse light, added to red, green and blue, and specular highlights."""
    lift = t * 1e-3 + 1e-3
    x, y, z = px + nx * lift, py + ny * lift, pz + nz * lift
    shine_red, shine_green, shine_blue = red * 0.0, red * 0.0, red * 0.0
    for lamp in range(tl.load(integers + LAMPS)):
        tx, ty, tz, power = towards(integers, floats, lamp, px, py, pz)
        slope = bx * tx + by * ty + bz * tz
        asked = here & (nx * tx + ny * ty + nz * tz > 0.0) & (slope > 0.0)
        if some(asked):
            if tl.load(integers + tl.load(integers + SUN) + lamp) != 0:
                hidden = hidden_from_sun(integers, floats, lamp, asked, x, y, z)
            else:
                hidden = hidden_from_lamp(integers, floats, lamp, asked, x, y, z)
            seen = asked & (hidden == 0)
            colour = floats + tl.load(integers + COLOUR) + 3 * lamp
            r, g, b = tl.load(colour), tl.load(colour + 1), tl.load(colour + 2)
            strength = slope * power
            red = tl.where(seen, red + r * strength, red)
            green = tl.where(seen, green + g * strength, green)
            blue = tl.where(seen, blue + b * strength, blue)
            hx, hy, hz = unit(tx - vx, ty - vy, tz - vz)
            gleam = hx * bx + hy * by + hz * bz
            gleam = tl.where(gleam > 0.0, gleam, 0.0)
            for _ in tl.static_range(5):
                gleam = gleam * gleam
            gleam = gleam * power * gloss * 0.6
            shine_red = tl.where(seen, shine_red + r * gleam, shine_red)
            shine_green = tl.where(seen, shine_green + g * gleam, shine_green)
            shine_blue = tl.where(seen, shine_blue + b * gleam, shine_blue)
    return red, green, blue, shine_red, shine_green, shine_blue


@triton.jit
def solid_colour(integers, floats, bank, here, row, t, rx, ry, rz):
    """Colour of the points at t along the rays, on surfaces `row`; undefined where `here` is not set."""
    camera, air = floats + tl.load(integers + CAMERA), floats + tl.load(integers + AIR)
    px, py, pz = (
        tl.load(camera + POSITION) + t * rx,
        tl.load(camera + POSITION + 1) + t * ry,
        tl.load(camera + POSITION + 2) + t * rz,
    )
    flat = floats + tl.load(integers + SURFACES) + SURFACE_WORDS * row
    nx, ny, nz, own0, own1, own2, f0, f1, f2 = surface_at(flat, px, py, pz)
    material = tl.load(integers + tl.load(integers + MATERIAL) + row)
    number = floats + tl.load(integers + NUMBERS) + MATERIAL_WORDS * material
    pattern = tl.load(integers + tl.load(integers + PATTERN) + material)
    x, y, z = tl.abs(f0), tl.abs(f1), tl.abs(f2)
    u = tl.where((x > y) & (x > z), own2, own0)
    v = tl.where((y >= x) & (y > z), own2, -own1)
    vx, vy, vz = unit(rx, ry, rz)
    facing = -(vx * nx + vy * ny + vz * nz)
    footprint = tl.div_rn(t * tl.load(camera + PIXEL), tl.where(facing > 0.12, facing, 0.12))
    red, green, blue, position, detail = paint(bank, integers, number, pattern, u, v, footprint)
    bump = tl.load(number + BUMP)
    a, b = (position - 0.5) * bump, (detail - 0.5) * bump
    bx, by, bz = unit(nx + a, ny + b, nz + a - b)
    r, g, b, shine_red, shine_green, shine_blue = lit(
        integers, floats, here, px, py, pz, nx, ny, nz, bx, by, bz, vx, vy, vz, t, tl.load(number + GLOSS),
        *ambient(integers, air, by, ny, px, py, pz),
    )  # fmt: skip
    glow = tl.load(number + GLOW)
    red, green, blue = red * (r + glow) + shine_red, green * (g + glow) + shine_green, blue * (b + glow) + shine_blue
    haze = tl.load(air + HAZE)
    if haze != 0.0:
        clear = tl.div_rn(1.0, t + haze) * haze
        clear = clear * clear
        red = red * clear + tl.load(air + HORIZON) * (1.0 - clear)
        green = green * clear + tl.load(air + HORIZON + 1) * (1.0 - clear)
        blue = blue * clear + tl.load(air + HORIZON + 2) * (1.0 - clear)
    return red, green, blue


@triton.jit
def under_clouds(plain, horizon, cover):
    """A sky colour behind clouds, whose colour is derived from the horizon's."""
    return plain * (1.0 - cover) + (horizon * 0.4 + 0.55) * cover


@triton.jit
def sky_colour(integers, floats, bank, rx, ry, rz):
    """Colour of rays that hit nothing."""
    air = floats + tl.load(integers + AIR)
    dx, dy, dz = unit(rx, ry, rz)
    rise = tl.where(dy > 0.0, dy, 0.0)
    deep = rise * (2.0 - rise) * 0.9 + tl.where(rise > 0.0, 0.1, 0.0)
    level = tl.div_rn(1.0, tl.where(rise > 0.02, rise, 0.02))
    mip, _ = level_of(level * 0.002)
    start = mip * 0 + tl.load(integers + CLOUDS)
    cloud, _ = texel(bank, start, mip, dx * level * 0.15 + 0.3, dz * level * 0.15 + 0.7)
    cover = (cloud - 1.0 + tl.load(air + COVER)) * 3.0
    cover = tl.where(cover > 0.0, tl.where(cover < 1.0, cover, 1.0), 0.0)
    climb = rise * 8.0
    cover = cover * tl.where(climb < 1.0, climb, 1.0)
    sun, colour = floats + tl.load(integers + PLACE), floats + tl.load(integers + COLOUR)
    glow = dx * tl.load(sun) + dy * tl.load(sun + 1) + dz * tl.load(sun + 2)
    glow = tl.where(glow > 0.0, glow, 0.0)
    for _ in tl.static_range(6):
        glow = glow * glow
    rest = 1.0 - deep
    h0, h1, h2 = three(air + HORIZON)
    z0, z1, z2 = three(air + ZENITH)
    red = under_clouds(h0 * rest + z0 * deep, h0, cover)
    green = under_clouds(h1 * rest + z1 * deep, h1, cover)
    blue = under_clouds(h2 * rest + z2 * deep, h2, cover)
    return red + tl.load(colour) * glow, green + tl.load(colour + 1) * glow, blue + tl.load(colour + 2) * glow


@triton.jit
def shade(integers, floats, bank, depth, surface, colour, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Fills colour (3,2,H+1,W+1) from what `first_hit` found. Grid: (tiles, 2)."""
    row, column, _, _ = tile_of(integers, ROWS, COLUMNS)
    rx, ry, rz = rays_of(integers, floats, row, column)
    height, width = tl.load(integers + HEIGHT), tl.load(integers + WIDTH)
    place = (tl.program_id(1) * (height + 1) + row) * (width + 1) + column
    # No pixel reads the spare row and column of the centres.
    inside = (row <= height - tl.program_id(1)) & (column <= width - tl.program_id(1))
    found = tl.load(surface + place, mask=inside, other=-1)
    here = inside & (found >= 0)
    red, green, blue = rx * 0.0, rx * 0.0, rx * 0.0
    if some(here):
        t = tl.where(here, tl.load(depth + place, mask=inside, other=1.0), 1.0)
        red, green, blue = solid_colour(integers, floats, bank, here, tl.where(here, found, 0), t, rx, ry, rz)
    if tl.load(integers + SKY) != 0:
        above = inside & (found < 0)
        if some(above):
            r, g, b = sky_colour(integers, floats, bank, rx, ry, rz)
            red, green, blue = tl.where(above, r, red), tl.where(above, g, green), tl.where(above, b, blue)
    else:
        red, green, blue = tl.where(here, red, 0.0), tl.where(here, green, 0.0), tl.where(here, blue, 0.0)
    plane = 2 * (height + 1) * (width + 1)
    tl.store(colour + place, red, mask=inside)
    tl.store(colour + plane + place, green, mask=inside)
    tl.store(colour + 2 * plane + place, blue, mask=inside)
