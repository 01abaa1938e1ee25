"""DySample, SDT, DPT and the DINOv3 encoder against outputs of the published code; case.json says which."""

from __future__ import annotations

import pytest
import torch

from distill.students import Student
from distill.students.decoders import dav2, dpt, sdt
from distill.students.dysample import DySample
from distill.students.encoder import Encoder
from tests.conftest import golden_weights as synth

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # golden inputs are already normalised
PAPER_COUNTS = {
    "sdt": {384: 5_517_381, 768: 9_451_077, 1024: 13_384_261},
    "dpt": {384: 50_825_153, 768: 76_047_425, 1024: 99_579_713},
}


def tensor(data, name):
    return torch.from_numpy(data[name])


def features_of(data):
    maps = [tensor(data, f"spatial{i}") for i in range(4)]
    return [(m, tensor(data, f"cls{i}")) for i, m in enumerate(maps)] if "cls0" in data.files else maps


def close(got, expected, tolerance):
    assert got.shape == expected.shape
    assert (got - expected).abs().max().item() <= tolerance


def stats_close(got, expected, tolerance):
    """[mean, std, min, max, l2] of a whole map, where only a part of it is stored."""
    x = got.double()
    found = torch.stack([x.mean(), x.std(correction=0), x.min(), x.max()])
    assert (found - expected[:4]).abs().max().item() <= tolerance


@pytest.mark.parametrize("case", ["dysample_lp", "dysample_lp_scope", "dysample_pl", "dysample_pl_scope"])
def test_dysample(golden, case):
    facts, data = golden(case)
    style, groups, scope = (facts["kwargs"][key] for key in ("style", "groups", "dyscope"))
    for run in facts["runs"]:
        i = run["index"]
        module = DySample(run["in_channels"], scale=run["scale"], style=style, groups=groups, scope=scope)
        assert torch.equal(module.init_pos, tensor(data, f"init_pos{i}"))
        assert list(module.state_dict()) == list(run["state_dict"])
        module.load_state_dict(synth(run["state_dict"], facts["seed"]) | {"init_pos": module.init_pos})

        x = tensor(data, f"x{i}").requires_grad_()
        close(module.offsets(x), tensor(data, f"offset{i}"), 2e-6)
        y = module(x)
        close(y, tensor(data, f"y{i}"), run["tolerance_max_abs"])
        y.square().mean().backward()
        expected = tensor(data, f"gx{i}")
        close(x.grad, expected, 2e-4 * expected.abs().max().item())
        for name, norm in run["param_grad_norms_of_mean_square"].items():
            parameter = module.get_parameter(name.removeprefix("gradnorm_"))
            assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("case", ["sdt_head_f64_cls", "sdt_head_f256_cls", "sdt_head_f256_nocls"])
def test_sdt(golden, case):
    facts, data = golden(case)
    kwargs = facts["kwargs"]
    decoder = sdt.Decoder(kwargs["in_channels"], kwargs["fusion_channels"], kwargs["use_cls_token"])
    assert set(decoder.state_dict()) == set(facts["state_dict"])
    assert sum(p.numel() for p in decoder.parameters()) == facts["params"]
    decoder.load_released(synth(facts["state_dict"], facts["seed"])).eval()
    seen = {}
    decoder.detail_enhancer.register_forward_hook(lambda _m, _i, out: seen.update(enhanced=out))
    decoder.refinement_1.register_forward_hook(lambda _m, _i, out: seen.update(refined=out))
    with torch.no_grad():
        close(decoder(features_of(data)), tensor(data, "output"), facts["tolerance"]["output"]["max_abs"])
    close(seen["enhanced"], tensor(data, "detail_enhancer"), 1e-5)
    close(seen["refined"][:, ::8, ::2, ::2], tensor(data, "refinement_1_strided"), 1e-5)


def test_sdt_trains_as_published(golden):
    facts, data = golden("sdt_head_train_f64")
    decoder = sdt.Decoder(facts["kwargs"]["in_channels"], facts["kwargs"]["fusion_channels"])
    decoder.load_released(synth(facts["state_dict"], facts["seed"])).train()
    output = decoder(features_of(data))
    close(output, tensor(data, "output"), facts["tolerance"]["output"]["max_abs"])
    output.mean().backward()
    assert all(p.grad is not None for p in decoder.parameters())
    for name, expected in facts["grad_norms"].items():
        got = decoder.get_parameter(name).grad.norm().item()
        assert got == pytest.approx(expected["grad_norm_float64"], rel=2 * expected["rtol"]), name
    buffers = dict(decoder.named_buffers())
    for key in data.files:
        if key.startswith("grad:"):
            expected = tensor(data, key)
            close(decoder.get_parameter(key[5:]).grad, expected, 4e-3 * expected.abs().max().item())
        if key.startswith("after:"):
            close(buffers[key[6:]], tensor(data, key), 1e-5)


@pytest.mark.parametrize("case", ["dpt_head_default", "dpt_head_vits"])
def test_dpt(golden, case):
    facts, data = golden(case)
    kwargs = facts["make_head_kwargs"]
    decoder = dpt.Decoder(
        kwargs["embed_dims"],
        kwargs["channels"],
        kwargs["post_process_channels"],
        readout="project" if kwargs["use_cls_token"] else "ignore",
        norm="batch" if kwargs.get("use_batchnorm") else "none",
    )
    assert set(decoder.state_dict()) == set(facts["state_dict"])
    assert sum(p.numel() for p in decoder.parameters()) == facts["params"]
    decoder.load_released(synth(facts["state_dict"], facts["seed"])).eval()
    with torch.no_grad():
        close(decoder(features_of(data)), tensor(data, "output"), facts["tolerance"]["output"]["max_abs"])


@pytest.mark.parametrize("name", ["sdt", "dpt"])
def test_parameter_counts_of_the_paper(name):
    with torch.device("meta"):
        found = {
            c: sum(p.numel() for p in {"sdt": sdt, "dpt": dpt}[name].Decoder(c).parameters()) for c in (384, 768, 1024)
        }
    assert found == PAPER_COUNTS[name]


def dinov3(tmp_path, shapes, seed, prefix="", **options):
    """Our DINOv3 ViT-S/16 with golden weights, read from a file in facebookresearch's names."""
    path = tmp_path / "dinov3.pth"
    if not path.exists():
        torch.save(synth({key: entry for key, entry in shapes.items() if key.startswith(prefix)}, seed), path)
    return Encoder("dinov3_vits16", weights=path, **RAW, **options)


@pytest.mark.slow
def test_dinov3_features(golden, tmp_path):
    facts, data = golden("dinov3_vits16")
    for norm, feature, cls in (("prenorm", "feat", "cls"), ("norm", "featnorm", "clsnorm")):
        encoder = dinov3(tmp_path, facts["state_dict"], facts["seed"], final_norm=norm == "norm").eval()
        for run in facts["runs"]:
            i = run["index"]
            with torch.no_grad():
                got = encoder(tensor(data, f"x{i}"))
            for (patches, token), layer in zip(got, run["per_layer"], strict=True):
                tolerance = layer["tolerance"][norm]["max_abs"]
                close(patches[:, :, ::4, ::3], tensor(data, f"{feature}{i}_L{layer['layer']}"), tolerance)
                close(token, tensor(data, f"{cls}{i}_L{layer['layer']}"), tolerance)


@pytest.mark.slow
def test_encoder_pads_as_anydepth(golden, tmp_path):
    facts, data = golden("anydepth_encoder_vits16")
    whole = golden("anydepth_sdt_vits")[0]["state_dict"]
    shapes = {k.removeprefix("0.encoder.backbone."): v for k, v in whole.items() if k.startswith("0.encoder.")}
    for run in facts["runs"]:
        i = run["index"]
        encoder = dinov3(tmp_path, shapes, facts["seed"], final_norm=run["use_backbone_norm"]).eval()
        x = tensor(data, f"x{i}")
        padded = torch.nn.functional.pad(x, encoder.padding(*x.shape[-2:]))
        assert torch.equal(padded, tensor(data, f"padded{i}"))
        with torch.no_grad():
            got = encoder(x)
        for j, ((patches, token), allowed) in enumerate(zip(got, run["tolerance"], strict=True)):
            close(patches[:, :, ::2, ::2], tensor(data, f"feat{i}_{j}"), allowed["max_abs"])
            close(token, tensor(data, f"cls{i}_{j}"), allowed["max_abs"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["anydepth_sdt_vits", "anydepth_dpt_vits"])
def test_whole_model(golden, tmp_path, case):
    facts, data = golden(case)
    decoder = sdt.Decoder(384) if case == "anydepth_sdt_vits" else dpt.Decoder(384)
    seed = facts["runs"][0]["seed"]
    assert {run["seed"] for run in facts["runs"]} == {seed}
    encoder = dinov3(tmp_path, facts["state_dict"], seed, prefix="0.encoder.backbone.")
    shapes = {key: entry for key, entry in facts["state_dict"].items() if key.startswith("0.decoder.")}
    student = Student(encoder, decoder.load_released(synth(shapes, seed))).eval()
    for run in facts["runs"]:
        i = run["index"]
        x, expected = tensor(data, f"x{i}"), tensor(data, f"depth{i}")
        with torch.no_grad():
            depth = torch.relu(student.decoder(student.encoder(x))) + 0.001
            cropped = torch.relu(student(x)) + 0.001
        close(depth, expected, run["tolerance"]["max_abs"])
        left, _, top, _ = student.encoder.padding(*x.shape[-2:])
        assert torch.equal(cropped, depth[:, 0, top : top + x.shape[-2], left : left + x.shape[-1]])


def test_depth_anything_v2_as_a_student(golden, tmp_path):
    """The released network as Encoder + dav2 decoder, on the released interpolation of its position table."""
    facts, data = golden("dav2_vits")
    state = synth(facts["state_dict"], facts["seed"])
    torch.save(state, tmp_path / "dav2.pth")
    run = facts["runs"][0]
    x = tensor(data, "x0")
    grid = (x.shape[-2] // 14, x.shape[-1] // 14)
    encoder = Encoder("dinov2_vits14", weights=tmp_path / "dav2.pth", pos_grid=grid, final_norm=True, **RAW).eval()
    table = state["pretrained.pos_embed"][:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    scales = tuple((side + 0.1) / 37 for side in grid)
    table = torch.nn.functional.interpolate(table, scale_factor=scales, mode="bicubic").flatten(2).transpose(1, 2)
    with torch.no_grad():
        encoder.backbone.pos_embed.copy_(torch.cat([state["pretrained.pos_embed"][:, :1], table], dim=1))
        decoder = dav2.Decoder(384).load_released(state).eval()
        found = torch.relu(Student(encoder, decoder)(x))
    close(found, tensor(data, "depth0"), run["tolerance"]["max_abs"])
    counted = sum(p.numel() for p in decoder.parameters())
    unused = [k for k in state if "refinenet4.resConfUnit1" in k]
    assert counted == sum(v.numel() for k, v in state.items() if k.startswith("depth_head.") and k not in unused)
