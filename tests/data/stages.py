"""A stage that covers one line of the renderers which random views do not reach."""

from __future__ import annotations

import numpy as np

from distill.data.scenes.cast import Camera, block, ground
from distill.data.scenes.stage import Light, Stage


def under_a_block() -> Stage:
    """The sun vertically above a block that floats 1.6 mm above the ground, seen by a camera at a height of 0.8 mm.

    Before the shadow test points are lifted off their surface by 1 mm plus a thousandth of their distance: up to about
    half a metre away they stay below the block, farther away they are in it, and from 1.6 m on they are lit again.
    """
    stage = Stage(rng=np.random.default_rng(3))
    paint = stage.material("plain")
    stage.add(ground(paint), block((0.0, 0.5016, 1.9), (2.0, 0.5, 1.5), paint))
    stage.lights = [Light(place=(0.0, 1.0, 0.0), colour=(3.0, 3.0, 3.0), sun=True)]
    stage.sky = ((0.5, 0.5, 0.5), (0.3, 0.4, 0.6))
    stage.camera = Camera(position=(0.0, 0.0008, 0.0), axes=np.eye(3), focal=200.0)
    return stage
