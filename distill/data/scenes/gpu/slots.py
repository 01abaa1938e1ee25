"""Layout of a stage's arrays for the kernels: indices of the words of the header at the start of the integers.

A word holds either a count itself, or the offset of a table in the array of integers or of floats.
"""

from __future__ import annotations

import triton.language as tl

# Counts. HEIGHT, WIDTH: of the picture. EDGES: planes of all shadow casters. SKY, ROOM: 1 where the stage has one.
HEIGHT, WIDTH, SOLIDS, LAMPS, CLUSTERS, CASTERS, EDGES, SKY, ROOM = (tl.constexpr(i) for i in range(9))
# Offsets of patterns in the bank of textures.
CLOUDS, STAINS = tl.constexpr(9), tl.constexpr(10)
# Tables of integers, named as in `packed`: of Solids, of Casters, of Lamps, of Looks.
WINDOWS, FIRST, SURFACE, SHELL, ROUND, OUTSIDE = (tl.constexpr(i) for i in range(11, 17))
GROUP, CASTER_FIRST, CASTER_ROUND = (tl.constexpr(i) for i in range(17, 20))
SUN, LAMP_OUTSIDE, MATERIAL, PATTERN = (tl.constexpr(i) for i in range(20, 24))
# Tables of floats.
CAMERA, AIR, PLANES, QUADRIC, EYE = (tl.constexpr(i) for i in range(24, 29))
CASTER_QUADRIC, CASTER_CENTRE = tl.constexpr(29), tl.constexpr(30)
PLACE, COLOUR, REACH, AXES, SPHERES, MEMBERS = (tl.constexpr(i) for i in range(31, 37))
LAMP_PLANES, SLOPE, LAMP_EYE, SQUARED = (tl.constexpr(i) for i in range(37, 41))
SURFACES, NUMBERS = tl.constexpr(41), tl.constexpr(42)
HEADER = 43

# Within CAMERA: three axes (right, up, forward), its position, metres across one pixel at 1 m distance.
POSITION, PIXEL = tl.constexpr(9), tl.constexpr(12)
# Within AIR: three numbers each for light from above (UP) and below, the sky and a room's half sizes; then single ones.
UP, DOWN, HORIZON, ZENITH, HALF = (tl.constexpr(i) for i in range(0, 15, 3))
HAZE, COVER = tl.constexpr(15), tl.constexpr(16)
# Within a row of SURFACES, after a gradient of nine numbers: see `cast.Surfaces`.
CONSTANT, CENTRE, FRAME, SURFACE_WORDS = tl.constexpr(9), tl.constexpr(12), tl.constexpr(15), tl.constexpr(24)
# Within a row of NUMBERS, after four colours: see `texture.table`.
RATE, RISE, DETAIL, STAIN, GLOSS, GLOW, BUMP, MATERIAL_WORDS = (tl.constexpr(i) for i in range(12, 20))
