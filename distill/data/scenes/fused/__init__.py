"""The torch path's picture, bit for bit, with one compiled loop over the pixels in place of thousands of small tensors.

Each line of the kernels corresponds to one of the torch path: the same float32 operations in the same order, compiled
without contraction and without fast-math, so that both give identical data (tests/data/test_scenes.py). The kernels
skip only work that cannot change a bit: a shadow ray stops at the first solid that hides the light, and a light that
adds nothing gets no gloss. A number over a tensor is written as `1 / x` times the number, because torch computes it so.

V: the sample grid (2,H+1,W+1) of `cast.Camera.rays`. Everything is float32 except counts, indices and flags.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distill.data.scenes.fused.hits import first_hit
from distill.data.scenes.fused.shading import shade, sky
from distill.data.scenes.packed import pack_air, pack_lamps, pack_looks, pack_solids
from distill.data.scenes.stage import Stage


def light_up(stage: Stage, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Depth (V), inf for sky, and linear colour (3,V) of a view of height x width = `size`."""
    camera = stage.camera
    assert camera is not None
    rays = tuple(ray.numpy() for ray in camera.rays(*size, corners=True))
    depth, surface = np.empty(rays[0].shape, np.float32), np.empty(rays[0].shape, np.int32)
    colour = np.zeros((3, *rays[0].shape), np.float32)
    (enter, leave), face = np.empty((2, size[1] + 1), np.float32), np.empty(size[1] + 1, np.int32)
    first_hit(pack_solids(stage.solids, camera, *size), *rays, depth, surface, enter, leave, face)
    looks, air = pack_looks(stage), pack_air(stage, 1.0 / (camera.focal * size[1]))
    casters, lamps = pack_lamps(stage)
    eye = np.array(camera.position, dtype=np.float32)
    hint, near = np.full((len(lamps.sun), 2), -1, np.int64), np.empty(lamps.spheres.shape[2], np.bool_)
    shade(looks, casters, lamps, air, eye, *rays, depth, surface, colour, hint, near, np.empty(6, np.float32))
    if stage.sky is not None:
        sky(looks, lamps, air, *rays, surface, colour)
    return torch.from_numpy(depth), torch.from_numpy(colour)
