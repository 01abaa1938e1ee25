"""Teachers against outputs of the published code; case.json says which, and how far float32 may differ."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from distill.teachers import (
    _described,
    _dino,
    _ensemble,
    _resize,
    depth_anything_3,
    depth_anything_v2,
    fiffdepth,
    genpercept,
    marigold,
)
from tests.conftest import golden_folder, golden_weights

pytestmark = pytest.mark.usefixtures("parts_read_once")

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (_dino.MEAN, _dino.STD))


def synth(facts):
    return golden_weights(facts["state_dict"], facts["seed"])


@pytest.fixture
def unwritten(monkeypatch):
    """`unwritten(module, state)`: the file that this module reads with `read_state` has these weights.

    A gigabyte is not written, read and hashed: files of the same formats are, in the small cases.
    """
    return lambda module, state: monkeypatch.setattr(module, "read_state", lambda file, weights_key=None: dict(state))


def tensor(data, name):
    return torch.from_numpy(data[name])


def photo(array, *, bgr=False):
    array = array[..., ::-1].copy() if bgr else array
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


def close(got, expected, tolerance):
    assert got.shape == expected.shape
    assert (got - expected).abs().max().item() <= tolerance


# --- Depth Anything V2, Distill-Any-Depth -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dav2(golden, tmp_path_factory):
    facts, data = golden("dav2_vits")
    file = tmp_path_factory.mktemp("dav2") / "depth_anything_v2_vits.pth"
    torch.save(synth(facts), file)
    return facts, data, file


def test_depth_anything_v2_network(dav2):
    facts, data, file = dav2
    teacher = depth_anything_v2.Teacher.load(str(file), resize="none")
    assert teacher.card.licence == "Apache-2.0", "the authors' file name says that it is the small one"
    for i, run in enumerate(facts["runs"]):
        # The golden inputs are normalised noise, so the image they stand for leaves [0,1]: it must pass unclamped.
        images = tensor(data, f"x{i}") * STD + MEAN
        assert images.min() < 0 and images.max() > 1
        close(teacher.predict(images).values, tensor(data, f"depth{i}"), run["tolerance"]["max_abs"])


def test_depth_anything_v2_photo(dav2):
    facts, data, file = dav2
    for i, run in enumerate(facts["infer_runs"]):
        teacher = depth_anything_v2.Teacher.load(str(file), native_size=run["input_size"])
        values = teacher.predict(photo(data[f"image{i}"], bgr=True)).values[0]
        close(values, tensor(data, f"infer{i}"), run["tolerance"]["max_abs"])


def test_depth_anything_v2_position_rule_matters(dav2):
    facts, data, file = dav2
    teacher = depth_anything_v2.Teacher.load(str(file), resize="none", position_rule="transformers")
    off = (teacher.predict(tensor(data, "x0") * STD + MEAN).values - tensor(data, "depth0")).abs().max().item()
    assert off == pytest.approx(facts["runs"][0]["hf_max_abs_diff_same_size"], rel=0.05)


@pytest.mark.parametrize("known_by", ["names", "path"])
def test_distill_any_depth_is_used_under_its_own_resizing(dav2, tmp_path, known_by):
    """The same network squashes the image to a square once it is known for Distill-Any-Depth's."""
    facts, _, file = dav2
    theirs = tmp_path / ("Distill-Any-Depth/small" if known_by == "path" else "x") / "model.safetensors"
    theirs.parent.mkdir(parents=True)
    state = torch.load(file)
    named = {key.replace("pretrained.", "backbone.") if known_by == "names" else key: v for key, v in state.items()}
    safetensors.torch.save_file(named, theirs)
    assert depth_anything_v2.Teacher.load(str(theirs)).card.native_size == 700
    image = torch.rand(1, 3, 60, 90, generator=torch.Generator().manual_seed(0))
    plain = depth_anything_v2.Teacher.load(str(file), resize="none").predict(_resize.resize_cubic(image, 70, 70)).values
    expected = torch.nn.functional.interpolate(plain[:, None], (60, 90), mode="bilinear", align_corners=True)[:, 0]
    found = depth_anything_v2.Teacher.load(str(theirs), native_size=70).predict(image).values
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_distill_any_depth(golden, tmp_path, unwritten):
    facts, data = golden("distill_any_depth_large")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\0 not read")
    unwritten(_described, synth(facts))
    teacher = depth_anything_v2.Teacher.load(str(file), resize="none")
    for i, run in enumerate(facts["runs"]):
        values = teacher.predict(tensor(data, f"x{i}") * STD + MEAN).values
        close(values, tensor(data, f"depth{i}")[:, 0], run["tolerance"]["max_abs"])
    assert teacher.square, "its tensors' names say whose it is"
    for i, run in enumerate(facts["infer_runs"]):
        side = run["processing_res"]
        native = depth_anything_v2.Teacher(teacher.model, teacher.card, native_size=side, square=teacher.square)
        image = photo(data[f"image{i}"], bgr=True)
        prepared = _dino.normalize(_resize.resize_cubic(image, side, side))
        close(prepared, tensor(data, f"prep{i}"), run["tolerance"]["prep_max_abs"])
        raw = tensor(data, f"raw{i}")
        expected = torch.nn.functional.interpolate(raw, image.shape[-2:], mode="bilinear", align_corners=True)[:, 0]
        close(native.predict(image).values, expected, run["tolerance"]["max_abs"])


# --- Depth Anything 3 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["da3_mono_vits", "da3_small", pytest.param("da3_mono_large", marks=pytest.mark.slow)])
def test_depth_anything_3_network(golden, tmp_path, case, unwritten):
    facts, data = golden(case)
    state = {f"model.{key}": value for key, value in synth(facts).items()}
    if case == "da3_mono_large":
        (tmp_path / "model.safetensors").write_bytes(b"\0 not read")
        unwritten(depth_anything_3, state)
    else:
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_name": case, "config": facts["config"]}))
    far = depth_anything_3.Teacher.load(str(tmp_path), resize="none")
    keep = depth_anything_3.Teacher(far.network, far.card, resize="none", sky="keep")
    for i, run in enumerate(facts["runs"]):
        images = tensor(data, f"x{i}")[0] * STD + MEAN
        tolerance = run["tolerance"]["raw_depth"]["max_abs"]
        raw = f"raw_depth{i}" if f"raw_depth{i}" in data else f"depth{i}"
        close(keep.predict(images).values, tensor(data, raw)[0], tolerance)
        close(far.predict(images).values, tensor(data, f"depth{i}")[0], tolerance)
        if f"sky{i}" in data:
            sky = far.network(tensor(data, f"x{i}")[0])[1]
            close(sky, tensor(data, f"sky{i}")[0], run["tolerance"]["sky"]["max_abs"])
    with_sky = far.network.head.scratch
    assert hasattr(with_sky, "sky_output_conv2") == ("mono" in case)


def test_depth_anything_3_layout_without_config(golden, tmp_path):
    """A bare weights file reads the same blocks as the authors' configuration."""
    facts, _ = golden("da3_small")
    state = {key: torch.empty(entry[0], device="meta") for key, entry in facts["state_dict"].items()}
    state = {key: value for key, value in state.items() if not depth_anything_3._UNUSED.match(key)}
    bare = depth_anything_3._layout(state, {}, tmp_path)
    assert bare == depth_anything_3._layout(state, {"config": facts["config"]}, tmp_path)
    assert bare.taps == (5, 7, 9, 11) and bare.main_from == 4 and bare.heads == 6


def test_depth_anything_3_sky(golden):
    facts, data = golden("da3_sky_post")
    for i, _ in enumerate(facts["runs"]):
        got = depth_anything_3.sky_to_far(tensor(data, f"depth_in{i}")[0, 0], tensor(data, f"sky{i}")[0, 0])
        close(got, tensor(data, f"depth_out{i}")[0, 0], facts["tolerance"]["depth_out"]["max_abs"])


def test_depth_anything_3_resizing(golden):
    facts, data = golden("da3_input_processor")
    for i, run in enumerate(facts["runs"]):
        sized = depth_anything_3.resize_native(photo(data[f"image{i}"]), run["process_res"])
        close(_dino.normalize(sized)[0], tensor(data, f"tensor{i}"), facts["tolerance"]["tensor"]["max_abs"])


# --- Marigold ---------------------------------------------------------------------------------------------------------


def marigold_options(call):
    args = call["args"]
    size = args.get("processing_res", args.get("processing_resolution", 0))
    padded = call["pipeline"] == "diffusers" and size == 0  # diffusers pads, the authors' code floors
    return {
        "steps": args.get("denoising_steps", args.get("num_inference_steps")),
        "ensemble": args.get("ensemble_size", 1),
        "seed": call.get("generator_seed_cpu") or 0,
        **({"resize": "none"} if padded else {"native_size": size}),
    }


def comparable(call):
    """Calls that differ from ours in nothing: our output has the input's size, and is bilinear."""
    args = call["args"]
    other = {"match_input_res", "resample_method", "prompt"} & args.keys() or args.get("ensemble_kwargs", {}).keys() - {
        "output_uncertainty"
    }
    resized_by_diffusers = call.get("pipeline") == "diffusers" and args.get("processing_resolution")
    return not other and not resized_by_diffusers and args.get("mode") not in ("normal", "matting")


@pytest.mark.parametrize("case", ["marigold_v11", "marigold_v10"])
def test_marigold(golden, case):
    facts, data = golden(case)
    folder = golden_folder(case) / "model"
    calls = [call for call in facts["calls"] if comparable(call)]
    assert {"repo", "diffusers"} <= {call["pipeline"] for call in calls}
    for call in calls:
        teacher = marigold.Teacher.load(str(folder), **marigold_options(call))
        images, expected = photo(data[call["image"]]), tensor(data, call["expected"])
        tolerance = facts["tolerance"]["ensemble_depth_abs" if teacher.ensemble > 1 else "depth_abs"]
        if call.get("generator_seed_cpu"):  # the authors' seed gives the authors' noise
            close(teacher.predict(images).values[0], expected, tolerance)
        if call["noise"] and (teacher.steps == 1 or not call.get("generator_seed_cpu")):
            got = teacher.predict(images, noise=tensor(data, call["noise"])).values[0]
            close(got, expected, tolerance)


def test_marigold_default_steps_are_the_checkpoints_own(golden):
    facts, _ = golden("marigold_v11")
    teacher = marigold.Teacher.load(str(golden_folder("marigold_v11") / "model"))
    assert teacher.steps == facts["config"]["steps_default"] and teacher.native_size == 768


def test_marigold_ensemble(golden):
    facts, data = golden("marigold_ensemble")
    seen = 0
    for call in facts["calls"]:
        if set(call["kwargs"]) - {"max_iter", "tol"}:
            continue
        members = tensor(data, call["members"])[:, 0]
        first = _ensemble.first_parameters(members)
        close(torch.from_numpy(first).double(), tensor(data, f"{call['id']}.param_init"), 1e-4)
        assert _ensemble.cost(first, members) == pytest.approx(call["cost_init"], rel=1e-5)
        final = data[f"{call['id']}.param"]
        assert _ensemble.cost(final, members) == pytest.approx(call["cost_final"], rel=1e-5)
        defaults = {"max_iter": 50, "tol": 1e-6} if call["impl"] == "repo" else {"max_iter": 2, "tol": 1e-3}
        solver = defaults | call["kwargs"]
        got = _ensemble.ensemble(members, **solver)
        close(got, tensor(data, f"{call['id']}.out"), 0.1 if solver["max_iter"] else 1e-5)
        seen += 1
    assert seen >= 3


# --- GenPercept, FiffDepth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["genpercept_dpt", "genpercept_vae"])
def test_genpercept(golden, case):
    facts, data = golden(case)
    for call in filter(comparable, facts["calls"]):
        args, mode = call["args"], call["args"]["mode"]
        size = args["processing_res"] if args["processing_res"] is not None else facts["config"]["res_default"]
        teacher = genpercept.Teacher.load(
            str(golden_folder(case) / "model"), mode=mode, native_size=size, timestep=args.get("fix_timesteps", 1)
        )
        got = teacher.predict(photo(data[call["image"]]))
        close(got.values[0], tensor(data, call["expected"]), facts["tolerance"]["pred_abs"])
        assert got.kind == f"affine_{mode}"


def test_fiffdepth(golden):
    facts, data = golden("fiffdepth_direct")
    for call in filter(comparable, facts["calls"]):
        size = call["args"].get("processing_res")  # without it, model_index.json's default
        teacher = fiffdepth.Teacher.load(str(golden_folder("fiffdepth_direct") / "model"), native_size=size)
        got = teacher.predict(photo(data[call["image"]])).values[0]
        close(got, tensor(data, call["expected"]), facts["tolerance"]["depth_abs"])
