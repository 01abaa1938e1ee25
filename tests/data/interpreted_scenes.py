"""Runs the scene-rendering kernels in Triton's interpreter against the torch path: run by test_scenes_gpu.py.

TRITON_INTERPRET=1, then `python -m tests.data.interpreted_scenes [KIND ...]`; by default all kinds. Prints a line for
each view whose image and depth equal the torch path's bit for bit.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from distill.data import scenes
from distill.data.scenes import backends, gpu, reference
from distill.data.scenes.film import Film, draw_film
from distill.data.scenes.stage import Stage
from distill.data.scenes.variety import vary
from tests.data.stages import under_a_block

SIZE = (19, 26)
VARIED = ("corridor", "country", "table")


def stage_of(kind: str, seed: int, *, variety: bool) -> tuple[Stage, Film]:
    rng = np.random.default_rng([7, seed])
    stage = Stage(rng=rng)
    scenes._LAYOUTS[kind][0](stage)
    if variety:
        vary(stage)
    return stage, draw_film(rng, *SIZE)


def main(kinds: list[str]) -> None:
    gpu.TILE = (32, 32)  # the interpreter needs as long for a program of a thousand rays as for one ray
    np.seterr(all="ignore")
    cpu = torch.device("cpu")
    views = [(kind, *stage_of(kind, 1, variety=kind in VARIED)) for kind in kinds]
    dark = ("dark", *stage_of("table", 3, variety=False))
    dark[1].lights = []
    below = ("under a block", under_a_block(), draw_film(np.random.default_rng(0), *SIZE))
    for name, stage, film in [*views, dark, below]:
        expected = backends.developed(*reference.light_up(stage, SIZE), film)
        ours = backends.developed(*gpu.light_up(stage, SIZE, cpu), film)
        assert all(map(torch.equal, ours, expected)), name
        assert expected[0].std() > 0.02 or name not in kinds, name
        print(name, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:] or [*scenes.KINDS])
