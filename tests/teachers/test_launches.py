"""A teacher on a card is asked without the host reading its numbers: batches queue up behind each other."""

from __future__ import annotations

import pytest
import torch

from distill.core.depth import DepthMap, Kind
from distill.teachers import _sky
from tests.launches import Asked
from tests.teachers.asking import IMAGES, NETWORKS, RESIZING, load, predict

pytestmark = pytest.mark.usefixtures("parts_read_once")
# diffusers' schedulers index by the timestep; the DySample of a student on a CPU looks for NaN.
WAIT = {"marigold": "distill/teachers/marigold.py", "checkpoint": "distill/students/dysample.py"}
# Cameras are solved on the host.
UPLOAD = {"moge": "distill/teachers/moge.py"}


@pytest.fixture(autouse=True)
def maps_as_on_a_card(monkeypatch):
    monkeypatch.setattr(_sky, "_host_may_look", lambda values: False)


def files(lines) -> set[str]:
    return {line.partition(":")[0] for line in lines}


@pytest.mark.parametrize("name", NETWORKS)
def test_nobody_waits_for_a_teacher(made, name):
    """At the size given: resized to their own, some are on the host, by OpenCV as by their authors."""
    teacher = load(made, name, **({"resize": "none"} if name in RESIZING else {}))
    predict(teacher, IMAGES)
    with Asked() as counted:
        predict(teacher, IMAGES)
    assert files(counted.waits) <= {WAIT.get(name)}
    assert files(counted.uploads) <= {UPLOAD.get(name), WAIT.get(name)}


@pytest.mark.parametrize("policy", ["far", "invalid", "zero"])
def test_nobody_waits_for_the_sky(policy):
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(2, 9, 11, generator=draw)
    depth = DepthMap(values, torch.ones_like(values, dtype=torch.bool), Kind.SCALE_DEPTH)
    sky = torch.rand(2, 9, 11, generator=draw) > 0.5
    with Asked() as counted:
        _sky.apply_sky(depth, sky, policy)
    assert counted.total and not counted.waits and not counted.uploads
