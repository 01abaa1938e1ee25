"""Depth Pro: Apple's file against Apple's code, and what depends on a camera."""

from __future__ import annotations

import pytest
import torch

from distill.core.depth import Kind
from distill.teachers import WeightsMismatchError, depth_pro
from tests.golden import weights_rule
from tests.teachers.asking import IMAGES, load, one_line


def test_the_authors_file_is_the_network_that_they_run(golden, tmp_path):
    facts, data = golden("depth_pro_tiny")
    shapes = {key: tuple(entry[0]) for key, entry in facts["state_dict"].items()}
    state = {k: torch.from_numpy(v) for k, v in weights_rule.synth_state(shapes, facts["seed"]).items()}
    state |= {key: torch.tensor(value) for key, value in facts["replaced"].items()}
    torch.save(state, tmp_path / "depth_pro.pt")
    teacher = depth_pro.Teacher.load(str(tmp_path / "depth_pro.pt"))
    assert teacher.native_size == teacher.card.native_size == 1536
    tolerance = facts["runs"][0]["tolerance"]
    seen = []
    run = teacher._run
    teacher._run = lambda images: seen.append(run(images)) or seen[-1]  # once is enough at 1536 x 1536
    depth = teacher.predict(torch.from_numpy(data["image0"])).values[0]
    canonical, degrees = seen[0]
    for got, name in ((canonical[0, ::16, ::16], "canonical"), (depth, "depth"), (degrees, "degrees")):
        want = torch.from_numpy(data[f"{name}0"])
        assert got.shape == want.shape and (got - want).abs().max() <= tolerance[name], name
    with pytest.raises(WeightsMismatchError, match="has unknown encoder.other"):
        depth_pro.rename(state | {"encoder.other": torch.zeros(1)}, "x.pt")


def test_the_camera_is_estimated_or_told(made):
    """depth = f / (W C): with the focal length that the field of view means it is the same map."""
    teacher = load(made, "depth_pro")
    width = IMAGES.shape[-1]
    degrees = teacher.field_of_view(IMAGES)
    assert degrees.shape == (2,) and 50 < degrees.min() and degrees.max() < 60 and teacher.takes_focal
    estimated = teacher.predict(IMAGES).values
    focal = float(0.5 * width / torch.tan(torch.deg2rad(degrees[0]) / 2))
    torch.testing.assert_close(teacher.predict(IMAGES[:1], focal=focal).values, estimated[:1], rtol=1e-5, atol=1e-5)
    told = load(made, "depth_pro", focal=2 * focal)
    assert not told.takes_focal
    torch.testing.assert_close(told.predict(IMAGES[:1]).values, 2 * estimated[:1], rtol=1e-5, atol=1e-5)
    told._run = lambda images: (torch.tensor([0.0, 1e-9, 1.0, 1e9]).reshape(1, 2, 2), degrees[:1])
    far, _, usual, near = told.predict(IMAGES[:1, :, :2, :2], focal=2.0).values.flatten().tolist()
    assert (far, usual) == (pytest.approx(1e4), pytest.approx(1.0)) and near == pytest.approx(1e-4), "metres"
    canonical = load(made, "depth_pro", output="canonical")
    out = canonical.predict(IMAGES[:1])
    assert out.kind == canonical.card.kind == Kind.SCALE_DISPARITY and not canonical.takes_focal
    torch.testing.assert_close(focal / (width * out.values), estimated[:1], rtol=1e-4, atol=1e-4)


def test_what_it_cannot_do_is_told(made, copy):
    with pytest.raises(ValueError, match="focal is a length in pixels") as error:
        depth_pro.Teacher.load(made("depth_pro")[0], output="canonical", focal=100.0)
    one_line(error)
    with pytest.raises(ValueError, match="output must be one of depth, canonical"):
        depth_pro.Teacher.load(made("depth_pro")[0], output="metric")
    with pytest.raises(WeightsMismatchError, match="describes a dpt model, not depth_pro"):
        depth_pro.Teacher.load(str(copy("midas")))
