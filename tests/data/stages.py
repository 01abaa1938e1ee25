"""A stage made for one line of the renderers, which no view that is drawn by lot has."""

from __future__ import annotations

import numpy as np

from distill.data.scenes.cast import Camera, block, ground
from distill.data.scenes.stage import Light, Stage


def under_a_block() -> Stage:
    """The sun straight above a block that floats 1.6 mm over the ground, on which a camera 0.8 mm high looks.

    Points are lifted off their surface before they ask for the light, by 1 mm and a thousandth of their distance:
    half a metre away still below the block, farther into it, and from 1.6 m on so far that they have light again.
    """
    stage = Stage(rng=np.random.default_rng(3))
    paint = stage.material("plain")
    stage.add(ground(paint), block((0.0, 0.5016, 1.9), (2.0, 0.5, 1.5), paint))
    stage.lights = [Light(place=(0.0, 1.0, 0.0), colour=(3.0, 3.0, 3.0), sun=True)]
    stage.sky = ((0.5, 0.5, 0.5), (0.3, 0.4, 0.6))
    stage.camera = Camera(position=(0.0, 0.0008, 0.0), axes=np.eye(3), focal=200.0)
    return stage
