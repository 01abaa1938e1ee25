"""The first hit of each ray: `cast.cast` row by row, in loops that the compiler vectorizes.

The GPU version is `distill.data.scenes.gpu.hits`.
"""

from __future__ import annotations

import math

import numpy as np

from distill.data.scenes.cast import FAR, NEAR
from distill.data.scenes.fused.compiled import kernel, part

_f = np.float32
# A literal inside a kernel would be a double and promote the whole expression to double precision.
_INF, _ZERO, _ONE, _NEAR, _FAR, _TINY = (_f(x) for x in (math.inf, 0, 1, NEAR, FAR, 1e-20))


@part
def _row_span(solids, p, x, y, z, enter, leave, face):
    """Where the rays of a row enter and leave a solid, and through which surface, as `cast.span`."""
    shell = solids.shell[p]
    for c in range(len(x)):
        enter[c], leave[c], face[c] = -_INF, _INF, 0
    for k in range(solids.first[p], solids.first[p + 1]):
        nx, ny, nz, height = solids.planes[k, 0], solids.planes[k, 1], solids.planes[k, 2], solids.planes[k, 3]
        index = np.int32(k - solids.first[p])
        if solids.outside[k]:
            for c in range(len(x)):
                slope = x[c] * nx + y[c] * ny + z[c] * nz
                at = (_ONE / slope) * height
                at = at if slope < _ZERO else _INF
                face[c] = index if (at > enter[c]) & (not shell) else face[c]
                enter[c] = at if at > enter[c] else enter[c]
        else:
            for c in range(len(x)):
                slope = x[c] * nx + y[c] * ny + z[c] * nz
                at = (_ONE / slope) * height
                at = at if slope > _ZERO else _INF
                face[c] = index if (at < leave[c]) & shell else face[c]
                leave[c] = at if at < leave[c] else leave[c]
    if solids.round[p]:
        _row_quadric(solids, p, x, y, z, enter, leave, face)


@part
def _row_quadric(solids, p, x, y, z, enter, leave, face):
    m, index = solids.quadric[p], np.int32(solids.first[p + 1] - solids.first[p])
    m00, m01, m02, m10, m11, m12 = m[0, 0], m[0, 1], m[0, 2], m[1, 0], m[1, 1], m[1, 2]
    m20, m21, m22 = m[2, 0], m[2, 1], m[2, 2]
    ox, oy, oz = solids.eye[p, 0], solids.eye[p, 1], solids.eye[p, 2]
    for c in range(len(x)):
        dx = m00 * x[c] + m01 * y[c] + m02 * z[c]
        dy = m10 * x[c] + m11 * y[c] + m12 * z[c]
        dz = m20 * x[c] + m21 * y[c] + m22 * z[c]
        squared = dx * dx + dy * dy + dz * dz
        squared = squared if squared > _TINY else _TINY
        nearest = -(ox * dx + oy * dy + oz * dz) / squared
        ex, ey, ez = ox + nearest * dx, oy + nearest * dy, oz + nearest * dz
        chord = _ONE - (ex * ex + ey * ey + ez * ez)
        reach = np.sqrt((chord if chord > _ZERO else _ZERO) / squared)
        reach = reach if chord > _ZERO else -_INF
        low, high = nearest - reach, nearest + reach
        face[c] = index if low > enter[c] else face[c]
        enter[c] = low if low > enter[c] else enter[c]
        leave[c] = high if high < leave[c] else leave[c]


@kernel
def first_hit(solids, x, y, z, depth, surface, enter, leave, face):
    """Fills depth (V) and surface (V) int32 with what `cast.cast` finds along the rays x, y, z (V).

    Working memory of one row each: enter, leave float32, face int32.
    """
    width = x.shape[2]
    depth[:] = _INF
    surface[:] = -1
    for p in range(len(solids.windows)):
        top, bottom, left, right = solids.windows[p]
        first, shell = np.int32(solids.surface[p]), solids.shell[p]
        if left >= right:
            continue
        for grid in range(2):
            for row in range(top, bottom):
                rx, ry, rz = x[grid, row, left:right], y[grid, row, left:right], z[grid, row, left:right]
                _row_span(solids, p, rx, ry, rz, enter, leave, face)
                deep, seen = depth[grid, row, left:right], surface[grid, row, left:right]
                for c in range(right - left):
                    reached = leave[c] if shell else enter[c]
                    near = (enter[c] <= leave[c]) & (reached > _NEAR) & (reached < deep[c])
                    deep[c] = reached if near else deep[c]
                    seen[c] = face[c] + first if near else seen[c]
    for grid in range(2):
        for row in range(x.shape[1]):
            for c in range(width):
                if depth[grid, row, c] > _FAR:
                    depth[grid, row, c] = _INF
                    surface[grid, row, c] = -1
