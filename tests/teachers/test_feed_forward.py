"""Depth Anything V2 and 3, MiDaS and the analytic teacher, one by one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from distill import teachers
from distill.core.depth import Kind
from distill.teachers import (
    analytic,
    depth_anything_3,
    depth_anything_v2,
    midas,
)
from distill.teachers._resize import resize_cubic
from tests import tiny_teachers as tiny
from tests.teachers.asking import IMAGES, load, one_line


def test_analytic_is_its_formula():
    teacher = analytic.Teacher.load("none", rgb=[1.0, -2.0, 0.5], offset=3.0, kind="scale_depth")
    out = teacher.predict(IMAGES)
    expected = 3 + IMAGES[:, 0] - 2 * IMAGES[:, 1] + 0.5 * IMAGES[:, 2]
    torch.testing.assert_close(out.values, expected)
    assert out.kind == Kind.SCALE_DEPTH and teacher.card.revision == "rgb=1,-2,0.5 offset=3"
    with pytest.raises(OSError, match="no weights"):
        analytic.Teacher.load("model.pth")


@pytest.mark.parametrize(
    ("height", "width", "size", "shape"),
    [(480, 640, 518, (518, 686)), (375, 1242, 518, (518, 1722)), (1000, 700, 518, (742, 518)), (60, 80, 98, (98, 126))],
)
def test_depth_anything_v2_rule(height, width, size, shape):
    assert depth_anything_v2.native_shape(height, width, size) == shape


@pytest.mark.parametrize(("height", "width", "size", "side"), [(60, 80, 70, 70), (480, 640, 700, 700), (9, 90, 60, 70)])
def test_distill_any_depth_squashes(height, width, size, side):
    assert depth_anything_v2.native_shape(height, width, size, square=True) == (side, side)


def test_distill_any_depth_is_known_by_its_path_or_its_names():
    known = depth_anything_v2._is_distilled
    assert known("xingyang1/Distill-Any-Depth/small/model.safetensors", {"pretrained.cls_token": torch.zeros(1)})
    assert known("model.safetensors", {"module.backbone.cls_token": torch.zeros(1)})
    assert not known("depth_anything_v2_vits.pth", {"pretrained.cls_token": torch.zeros(1)})


def test_depth_anything_v2_metric(made, tmp_path):
    metric = load(made, "depth_anything_v2", max_depth=20.0)
    out = metric.predict(IMAGES)
    assert out.kind == Kind.METRIC_DEPTH and 0 < out.values.min() and out.values.max() < 20
    (tmp_path / "depth_anything_v2_metric_hypersim_vits.pth").write_bytes(b"PK")
    with pytest.raises(ValueError, match="give max_depth"):
        depth_anything_v2.Teacher.load(str(tmp_path / "depth_anything_v2_metric_hypersim_vits.pth"))
    (tmp_path / "depth_anything_vits14.pth").write_bytes(b"PK")
    with pytest.raises(ValueError, match="Depth Anything V1"):
        depth_anything_v2.Teacher.load(str(tmp_path / "depth_anything_vits14.pth"))


def test_depth_anything_v2_refuses_other_networks(made, copy, tmp_path):
    for name in ("depth_anything_3", "midas"):
        with pytest.raises(ValueError, match="not depth_anything") as error:
            depth_anything_v2.Teacher.load(str(copy(name)))
        one_line(error)
    safetensors.torch.save_file({"pretrained.cls_token": torch.zeros(1, 1, 384)}, tmp_path / "a.safetensors")
    with pytest.raises(teachers.WeightsMismatchError, match="lacks backbone.embeddings.position_embeddings"):
        depth_anything_v2.Teacher.load(str(tmp_path / "a.safetensors"))


def giant_state(width, blocks, features):
    """Random weights under the authors' names, of a giant's kind: a gated feed-forward in every block."""
    hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8
    norm, square = {"weight": (width,), "bias": (width,)}, {"weight": (width, width), "bias": (width,)}
    block = {"norm1": norm, "norm2": norm, "attn.proj": square, "ls1": {"gamma": (width,)}, "ls2": {"gamma": (width,)}}
    block["attn.qkv"] = {"weight": (3 * width, width), "bias": (3 * width,)}
    block["mlp.w12"] = {"weight": (2 * hidden, width), "bias": (2 * hidden,)}
    block["mlp.w3"] = {"weight": (width, hidden), "bias": (width,)}
    parts = {f"pretrained.blocks.{i}.{name}": table for i in range(blocks) for name, table in block.items()}
    parts["pretrained.norm"] = norm
    parts["pretrained.patch_embed.proj"] = {"weight": (width, 3, 14, 14), "bias": (width,)}
    conv = {"weight": (features, features, 3, 3), "bias": (features,)}
    for i in range(4):
        parts[f"depth_head.projects.{i}"] = {"weight": (features, width, 1, 1), "bias": (features,)}
        parts[f"depth_head.scratch.layer{i + 1}_rn"] = {"weight": (features, features, 3, 3)}
        unit = f"depth_head.scratch.refinenet{i + 1}"
        parts |= {f"{unit}.resConfUnit{u}.conv{c}": conv for u in (1, 2) for c in (1, 2)}
        parts[f"{unit}.out_conv"] = {"weight": (features, features, 1, 1), "bias": (features,)}
    for i, side in ((0, 4), (1, 2), (3, 3)):
        parts[f"depth_head.resize_layers.{i}"] = conv | {"weight": (features, features, side, side)}
    scratch = "depth_head.scratch"
    parts[f"{scratch}.output_conv1"] = {"weight": (features // 2, features, 3, 3), "bias": (features // 2,)}
    parts[f"{scratch}.output_conv2.0"] = {"weight": (32, features // 2, 3, 3), "bias": (32,)}
    parts[f"{scratch}.output_conv2.2"] = {"weight": (1, 32, 1, 1), "bias": (1,)}
    shapes = {f"{name}.{key}": shape for name, table in parts.items() for key, shape in table.items()}
    shapes |= {"pretrained.cls_token": (1, 1, width), "pretrained.pos_embed": (1, 26, width)}
    return {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


def test_depth_anything_v2_reads_the_giants_gated_feed_forward(monkeypatch, tmp_path):
    published = {
        (384, 12): (2, 5, 8, 11),
        (768, 12): (2, 5, 8, 11),
        (1024, 24): (4, 11, 17, 23),
        (1536, 40): (9, 19, 29, 39),
    }
    assert {size: tuple(i - 1 for i in taps) for size, taps in depth_anything_v2._TAPS.items()} == published
    monkeypatch.setitem(depth_anything_v2._TAPS, (64, 4), (1, 2, 3, 4))
    state = giant_state(64, 4, 8)
    torch.save(state, tmp_path / "depth_anything_v2_vitg.pth")
    teacher = depth_anything_v2.Teacher.load(str(tmp_path / "depth_anything_v2_vitg.pth"), resize="none")
    assert teacher.card.licence == "unknown", "its weights are not published"
    assert teacher.predict(IMAGES).valid.all()
    tokens = torch.randn(2, 5, 64)
    w12, b12, w3, b3 = (
        state[f"pretrained.blocks.2.mlp.{k}"] for k in ("w12.weight", "w12.bias", "w3.weight", "w3.bias")
    )
    gate, value = (tokens @ w12.T + b12).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * value) @ w3.T + b3
    torch.testing.assert_close(teacher.model.backbone.encoder.layer[2].mlp(tokens), expected)


def test_position_table_uses_the_offset():
    table = torch.randn(1, 26, 4, generator=torch.Generator().manual_seed(0))
    from distill.teachers._dino import position_table

    assert position_table(table, 5, 5) is table
    ours = position_table(table, 7, 4)
    grid = table[:, 1:].reshape(1, 5, 5, 4).permute(0, 3, 1, 2)
    plain = torch.nn.functional.interpolate(grid, size=(7, 4), mode="bicubic").flatten(2).transpose(1, 2)
    assert ours.shape == (1, 29, 4) and 1e-3 < (ours[:, 1:] - plain).abs().max() < 1


def test_depth_anything_3_main_series(tmp_path):
    weights, options = tiny.da3(tmp_path, main=True)
    state = safetensors.torch.load_file(f"{weights}/model.safetensors")
    extra = {"cam_dec.fc_t.weight": (3, 4), "cam_enc.trunk.0.norm1.bias": (4,)}
    extra |= {"head.scratch.refinenet1_aux.out_conv.bias": (4,), "head.scratch.output_conv2_aux.0.2.weight": (4,)}
    state |= {f"model.{key}": torch.zeros(shape) for key, shape in extra.items()}
    safetensors.torch.save_file(state, f"{weights}/model.safetensors")
    teacher = depth_anything_3.Teacher.load(weights, **options)
    out = teacher.predict(IMAGES)
    assert out.kind == Kind.SCALE_DEPTH and (out.values > 0).all()
    moved = teacher.predict(IMAGES.flip(-1)).values.flip(-1)
    assert (moved - out.values).abs().max() > 1e-3, "positions matter"


def test_depth_anything_3_metric(tmp_path):
    weights, options = tiny.da3(tmp_path, name="da3metric-large")
    plain = depth_anything_3.Teacher.load(weights, **options)
    assert plain.card.kind == Kind.METRIC_DEPTH and "focal" in plain.card.note
    images = torch.rand(1, 3, 112, 112)
    focal = depth_anything_3.Teacher.load(weights, native_size=56, focal=600.0)
    torch.testing.assert_close(focal.predict(images).values, plain.predict(images).values)  # 600 px at 112 is 300 at 56
    (tmp_path / "mono").mkdir()
    mono, _ = tiny.da3(tmp_path / "mono")
    with pytest.raises(ValueError, match="focal is for the metric checkpoint"):
        depth_anything_3.Teacher.load(mono, focal=500.0)


def test_depth_anything_3_refuses_what_it_cannot_read(copy):
    folder = copy("depth_anything_3")
    table = json.loads((folder / "config.json").read_text())
    table["config"]["net"]["qknorm_start"] = 2
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(teachers.WeightsMismatchError, match="do not fit"):
        depth_anything_3.Teacher.load(str(folder))
    safetensors.torch.save_file({"model.da3.a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(teachers.WeightsMismatchError, match="nested"):
        depth_anything_3.Teacher.load(str(folder))


@pytest.mark.parametrize(
    ("height", "width", "shapes"),
    [
        (480, 640, ((378, 504), (378, 504))),
        (1500, 2250, ((336, 504), (336, 504))),
        (504, 301, ((504, 301), (504, 308))),  # 301 is 21.5 patches: ties go up
        (2, 3000, ((1, 504), (14, 504))),
    ],
)
def test_depth_anything_3_rule(height, width, shapes):
    assert depth_anything_3.native_shapes(height, width, 504) == shapes


class Halves(torch.nn.Module):
    """Depth 2 everywhere, and sky in the left half."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        depth = torch.full_like(images[:, 0], 2.0)
        return depth, (torch.arange(images.shape[-1]) < images.shape[-1] // 2).float().expand_as(depth)


def test_depth_anything_3_says_for_which_camera_its_metres_hold():
    mono, metric = depth_anything_3.CARDS[:2]
    teacher = depth_anything_3.Teacher(Halves(), metric, native_size=56, sky="keep")
    # By the width, where rounding to patches stretches an image.
    assert teacher.assumed_focal(100, 198) == 300 * 198 / 56 and teacher.assumed_focal(198, 100) == 300 * 100 / 28
    for images in (torch.rand(1, 3, 50, 99), torch.rand(1, 3, 99, 50)):
        focal = teacher.assumed_focal(*images.shape[-2:])
        assert torch.allclose(teacher.predict(images, focal=3 * focal).values, 3 * teacher.predict(images).values)
    padded = depth_anything_3.Teacher(Halves(), metric, resize="none", sky="keep")
    assert padded.assumed_focal(100, 200) == 300
    assert (padded.predict(torch.rand(1, 3, 30, 40), focal=900.0).values == 6).all()
    assert depth_anything_3.Teacher(Halves(), metric, focal=700.0).assumed_focal(100, 200) == 700
    assert depth_anything_3.Teacher(Halves(), mono).assumed_focal(100, 200) is None


def test_depth_anything_3_has_no_depth_where_interpolation_mixed_it_with_sky():
    teacher = depth_anything_3.Teacher(Halves(), depth_anything_3.CARDS[0], native_size=28, sky="invalid")
    out = teacher.predict(torch.rand(1, 3, 56, 56))  # column 28 is a quarter of the last one with sky
    assert torch.equal(out.valid[0], (torch.arange(56) > 28).expand(56, 56)) and (out.values[out.valid] == 2).all()


@pytest.mark.parametrize(("rest", "moves"), [(10, False), (11, True), (14, True), (15, False)])
def test_depth_anything_3_puts_the_sky_far_where_there_is_enough_of_both(rest, moves):
    depth, sky = torch.arange(1.0, 26.0).reshape(5, 5), (torch.arange(25) >= rest).float().reshape(5, 5)
    far = depth_anything_3.sky_to_far(depth, sky)
    expected = torch.quantile(torch.arange(1.0, rest + 1), 0.99) if moves else depth[sky == 1]
    assert torch.equal(far[sky == 0], depth[sky == 0]) and torch.allclose(far[sky == 1], expected)


def test_depth_anything_3_resizes_as_opencv_does():
    """Cubic where any side grows; what is no picture of eight bits is neither rounded nor cut."""
    array = np.random.default_rng(0).random((20, 30, 3), np.float32)
    eight = np.round(array * 255).astype(np.uint8)
    for size, how in (((22, 28), cv2.INTER_CUBIC), ((18, 32), cv2.INTER_CUBIC), ((18, 28), cv2.INTER_AREA)):
        expected = cv2.resize(eight, size[::-1], interpolation=how).astype(np.float32) / 255
        assert np.array_equal(depth_anything_3._resized(array, (size, size)), expected)
        wide = 3 * array - 1
        expected = cv2.resize(wide, size[::-1], interpolation=how)
        assert np.array_equal(depth_anything_3._resized(wide, (size, size)), expected) and expected.max() > 1


@pytest.mark.parametrize(
    ("height", "width", "shape"), [(480, 640, (512, 672)), (375, 1242, (512, 1696)), (1500, 2250, (512, 768))]
)
def test_midas_rule(height, width, shape):
    assert midas.native_shape(height, width, 512) == shape


def test_midas_enlarges_by_cubic_pieces_and_drops_what_it_padded():
    class Stub(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1))

        def forward(self, pixel_values):
            return SimpleNamespace(predicted_depth=pixel_values[:, 0])

    images = torch.rand(1, 3, 30, 40)
    padded = midas.Teacher(Stub(), midas.CARDS[0], resize="none").predict(images)
    torch.testing.assert_close(padded.values, 2 * images[:, 0] - 1)
    small = midas.Teacher(Stub(), midas.CARDS[0], native_size=32).predict(images).values
    inner = 2 * resize_cubic(images, 32, 32)[:, :1] - 1 if midas.native_shape(30, 40, 32) == (32, 32) else None
    torch.testing.assert_close(small, F.interpolate(inner, (30, 40), mode="bicubic", align_corners=False)[:, 0])


def test_midas_refuses_other_backbones(made):
    with pytest.raises(teachers.WeightsMismatchError, match="dpt on beit"):
        midas.Teacher.load(made("depth_anything_v2")[0])
