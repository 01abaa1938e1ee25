"""MoGe-2 against the published code, and what depends on a camera."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from distill.core.depth import Kind
from distill.teachers import WeightsMismatchError, _dino, moge
from distill.teachers._moge_network import Network
from tests.golden import weights_rule
from tests.teachers.asking import IMAGES, load, one_line


def close(got, want, tolerance):
    want = torch.from_numpy(want)
    assert got.shape == want.shape and (got - want).abs().max() <= tolerance


def test_the_authors_file_is_the_network_that_they_run(golden, tmp_path):
    facts, data = golden("moge_tiny")
    shapes = {key: tuple(entry[0]) for key, entry in facts["state_dict"].items()}
    state = weights_rule.synth_state(shapes, facts["seed"], facts["kept_keys"])
    state = {key: torch.from_numpy(value) for key, value in state.items()}
    state |= {key: state[key] * factor for key, factor in facts["scaled"].items()}
    state |= {key: torch.tensor(value) for key, value in facts["replaced"].items()}
    state |= {
        f"encoder.image_{k}": torch.tensor(v).view(1, 3, 1, 1) for k, v in (("mean", _dino.MEAN), ("std", _dino.STD))
    }
    file = tmp_path / "model.pt"
    torch.save({"model_config": facts["model_config"], "model": state}, file)
    teacher, run = moge.Teacher.load(str(file)), facts["runs"][0]
    assert teacher.card.kind == Kind.METRIC_DEPTH and teacher.native_size == 14 * math.isqrt(run["num_tokens"])
    images = torch.from_numpy(data["image0"])
    points, valid, scale = teacher._run(images)
    close(points[:, ::2, ::2], data["points0"], run["tolerance"]["points"])
    close(scale, data["scale0"], run["tolerance"]["scale"])
    out = teacher.predict(images)
    assert torch.equal(out.valid, torch.from_numpy(data["mask0"])) and torch.equal(out.valid & valid, out.valid)
    close(out.values, data["depth0"], run["tolerance"]["depth"])
    width = images.shape[-1]
    focal = width / 2 / math.tan(math.radians(facts["given_fov_x"]) / 2)
    whole = moge.Teacher(teacher.network, teacher.card, focal=focal, apply_mask=False).predict(images)
    positive = torch.from_numpy(data["given0"]) > 0
    assert torch.equal(whole.valid, positive)
    close(whole.values, data["given0"] * positive.numpy(), run["tolerance"]["given"])


def test_a_view_of_known_camera_is_found_again():
    """Points of a scene through a camera of 60 degrees, shifted along the view: focal length and shift come back."""
    height, width, degrees, shift = 48, 64, 60.0, 0.7
    diagonal = (height**2 + width**2) ** 0.5
    focal = width / diagonal / math.tan(math.radians(degrees) / 2)
    plane = moge.view_plane(height, width, width / height)[0].permute(1, 2, 0)
    depth = 2 + torch.rand(height, width, generator=torch.Generator().manual_seed(0))
    points = torch.cat([plane * depth[..., None] / focal, (depth - shift)[..., None]], -1)[None]
    every = torch.ones(1, height, width, dtype=torch.bool)
    found = moge.camera(points, every)
    assert found[0].item() == pytest.approx(focal, rel=1e-3) and found[1].item() == pytest.approx(shift, rel=1e-2)
    assert moge.camera(points, every, focal=focal)[1].item() == pytest.approx(shift, rel=1e-2)
    assert [one.item() for one in moge.camera(points, ~every)] == [1.0, 0.0]


def test_the_first_moge_is_named(tmp_path):
    torch.save({"model_config": {"encoder": "dinov2_vitl14"}, "model": {"a": torch.zeros(1)}}, tmp_path / "model.pt")
    with pytest.raises(WeightsMismatchError, match="model.pt is of MoGe-1, by its model_config"):
        moge.Teacher.load(str(tmp_path / "model.pt"))


def test_weights_are_claimed_one_by_one(made, tmp_path):
    teacher = load(made, "moge")
    assert teacher.takes_focal and teacher.field_of_view(IMAGES).shape == (2,)
    file = torch.load(f"{made('moge')[0]}/model.pt")
    state, description = file["model"], file["model_config"]
    without = {key: value for key, value in state.items() if key != "neck.res_blocks.1.0.layers.2.bias"}
    strange = description | {"neck": description["neck"] | {"resamplers": "max_pool"}}
    for content, words in (
        ({"model": without, "model_config": description}, "lacks neck.res_blocks.1.0.layers.2.bias"),
        ({"model": state | {"other": torch.ones(1)}, "model_config": description}, "has unknown other"),
        (
            {"model": state, "model_config": strange},
            "does not describe a MoGe-2 that is known here: a resampler of kind 'max_pool'",
        ),
        ({"model": state}, "model.pt has no model_config"),
    ):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(WeightsMismatchError, match=words) as error:
            moge.Teacher.load(str(tmp_path))
        one_line(error)


def test_each_remapping_of_points_is_the_authors_and_another_is_refused():
    point = torch.tensor([0.5, -0.25, 0.75])
    x, y, z = point.double().tolist()
    expected = {
        "linear": [x, y, z],
        "sinh": [math.sinh(x), math.sinh(y), math.sinh(z)],
        "exp": [x * math.exp(z), y * math.exp(z), math.exp(z)],
        "sinh_exp": [math.sinh(x), math.sinh(y), math.exp(z)],
    }
    for remap, values in expected.items():
        found = Network._remapped(SimpleNamespace(remap=remap), point.view(1, 1, 1, 3))
        assert found.flatten().tolist() == pytest.approx(values, rel=1e-6), remap
    with pytest.raises(ValueError, match="an output remapped by 'log'"):
        Network(None, {"remap_output": "log"})
