"""Views stay what they are from one version to the next: scores on the benchmark `scenes` are compared across them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from distill.data import scenes
from distill.data.scenes import variety
from distill.data.scenes.stage import Stage


def numbers(part: Any) -> Iterator[float]:
    """Every number of a stage but its generator: solids, materials, lights, camera, sky."""
    if dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            if field.name != "rng":
                yield from numbers(getattr(part, field.name))
    elif isinstance(part, list | tuple):
        for item in part:
            yield from numbers(item)
    elif part is not None:
        yield from np.ravel(part).astype(float).tolist()


@pytest.mark.parametrize(
    ("kind", "seeds", "total", "net"),
    [
        ("room", 8, 170760.46141144284, 104067.20673225191),
        ("corridor", 8, 134219.32910842283, 27973.00994703539),
        ("street", 4, 580224.0463337855, 436299.276875779),
        ("country", 6, 814441.062018664, 553312.1538266345),
        ("table", 8, 102288.7968329842, 72321.52543675489),
        ("hall", 6, 370372.9399454466, 126716.86687432977),
    ],
)
def test_stages_hold_what_they_held(kind, seeds, total, net):
    """Built, not rendered: two numbers for all sizes, places, colours and lights, additions of `variety` included.

    The sum of magnitudes alone does not change with a block's half size: its two faces move apart.
    """
    found = []
    for seed in range(seeds):
        stage = Stage(rng=np.random.default_rng(seed))
        scenes._LAYOUTS[kind][0](stage)
        variety.vary(stage)
        found += numbers(stage)
    assert math.fsum(map(abs, found)) == pytest.approx(total, rel=1e-11)
    assert math.fsum(found) == pytest.approx(net, abs=1e-11 * total)


@pytest.mark.parametrize(
    ("kind", "mean", "spread", "depth"),
    [
        ("room", 0.4626, 0.1164, 4.8856),
        ("corridor", 0.4849, 0.1191, 3.2653),
        ("street", 0.5084, 0.1052, 12.2433),
        ("country", 0.4299, 0.1490, 6.0374),
        ("table", 0.5445, 0.0877, 0.9006),
        ("hall", 0.4017, 0.0750, 8.0405),
    ],
)
def test_views_look_as_they_looked(kind, mean, spread, depth):
    view = scenes.render(3, size=(24, 32), kind=kind)
    found = view.image.double().mean(), view.image.double().std(), view.depth.double().mean()
    assert [float(value) for value in found] == pytest.approx([mean, spread, depth], rel=1e-3)
