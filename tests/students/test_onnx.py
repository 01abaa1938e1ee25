"""What is done to an ONNX graph after it was traced: float16 with its guards, 8 bits, the size rule, browsers."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.app import cli
from distill.core import crops
from distill.students import checkpoint, onnx_form, onnx_graph, onnx_precision
from distill.students.onnx_graph import OnnxOptions
from tests.students.test_export import small

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def graph(nodes, weights, output="disparity"):
    """A model from images (batch,3,height,width); nodes: (op, inputs, output, attributes)."""
    single = onnx.TensorProto.FLOAT
    made = onnx.helper.make_graph(
        [onnx.helper.make_node(op, inputs, [out], **attributes) for op, inputs, out, attributes in nodes],
        "g",
        [onnx.helper.make_tensor_value_info("images", single, ["batch", 3, "height", "width"])],
        [onnx.helper.make_tensor_value_info(output, single, ["batch", "height", "width"])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


def conv(inputs, outputs, seed=0, scale=0.1):
    return np.random.default_rng(seed).normal(size=(outputs, inputs, 3, 3)).astype(np.float32) * np.float32(scale)


PADS = {"pads": [1, 1, 1, 1]}
# A convolution, an "attention" whose product is beyond float16, a sampling grid, and a last convolution.
LARGE = graph(
    [
        ("Conv", ["images", "w0"], "a", PADS),
        ("Mul", ["a", "large"], "b", {}),
        ("Mul", ["b", "b"], "product", {}),
        ("Div", ["product", "huge"], "c", {}),
        ("Conv", ["c", "w1"], "d", PADS),
        ("Shape", ["images"], "shape", {}),
        ("Cast", ["shape"], "sides", {"to": 1}),
        ("ReduceMax", ["sides"], "side", {"keepdims": 0}),
        ("Div", ["d", "side"], "e", {}),
        ("Squeeze", ["e", "axis"], "disparity", {}),
    ],
    {
        "w0": conv(3, 8), "w1": conv(8, 1, 1), "large": np.float32(1e3), "huge": np.float32(1e5),
        "axis": np.array([1], np.int64),
    },
)  # fmt: skip


def run(model, tmp_path, images):
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "m.onnx")
    return onnx_graph.run_onnx(tmp_path / "m.onnx")(images)


def kinds(model):
    """The precision of every node's output, by operation."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    return {n.output[0]: types.get(n.output[0]) for n in model.graph.node}


def test_float16_keeps_what_overflows_and_halves_the_rest(tmp_path):
    images = torch.rand(1, 3, 12, 9, generator=torch.Generator().manual_seed(0))
    expected = run(LARGE, tmp_path, images)
    half = onnx_precision.to_float16(LARGE, [images])
    found = run(half, tmp_path, images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=5e-3 * float(expected.std()), rtol=0)
    single, short = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    found_kinds = kinds(half)
    assert found_kinds["a"] == short and found_kinds["d"] == short, "weights and what fits are halved"
    assert found_kinds["product"] == single, "what is beyond 65504 is not"
    assert found_kinds["side"] == single, "sizes are positions, not contents"
    weights = {t.name: t.data_type for t in half.graph.initializer}
    assert weights["w0:half"] == short and "w0" not in weights


def test_what_nears_the_largest_of_float16_stays_float32_and_so_do_a_resizes_scales(tmp_path):
    net = graph(
        [
            ("Mul", ["images", "much"], "near", {}),
            ("Mul", ["images", "less"], "far", {}),
            ("Resize", ["far", "", "scales"], "resized", {"mode": "nearest"}),
            ("Gather", ["resized", "first"], "disparity", {"axis": 1}),
        ],
        {
            "much": np.float32(17_000), "less": np.float32(16_000), "scales": np.array([1, 1, 2, 2], np.float32),
            "first": np.int64(0),
        },
    )  # fmt: skip
    half = onnx_precision.to_float16(net, [torch.ones(1, 3, 4, 4)])
    assert kinds(half)["near"] == onnx.TensorProto.FLOAT and kinds(half)["far"] == onnx.TensorProto.FLOAT16
    assert run(half, tmp_path, torch.ones(1, 3, 4, 4)).tolist() == [[[16_000.0] * 8] * 8]


def test_what_is_moved_is_as_large_as_before(tmp_path):
    net = graph(
        [
            ("Mul", ["images", "much"], "large", {}),
            ("Transpose", ["large"], "moved", {"perm": [0, 1, 3, 2]}),
            ("Identity", ["moved"], "again", {}),
            ("Div", ["again", "huge"], "small", {}),
            ("Gather", ["small", "first"], "disparity", {"axis": 1}),
        ],
        {"much": np.float32(1e6), "huge": np.float32(1e4), "first": np.int64(0)},
    )
    half = onnx_precision.to_float16(net, [torch.ones(1, 3, 4, 4)])
    single = onnx.TensorProto.FLOAT
    assert [kinds(half)[name] for name in ("moved", "again", "small")] == [single] * 3
    assert run(half, tmp_path, torch.ones(1, 3, 4, 4)).tolist() == [[[100.0] * 4] * 4]


def test_a_matrix_whose_rows_do_not_divide_into_blocks_has_a_scale_per_column(tmp_path):
    matrix = np.random.default_rng(0).normal(size=(3, 48)).astype(np.float32)
    nodes = [
        ("Conv", ["images", "w0"], "a", PADS),
        ("Transpose", ["a"], "t", {"perm": [0, 2, 3, 1]}),
        ("MatMul", ["t", "matrix"], "m", {}),
        ("Transpose", ["m"], "b", {"perm": [0, 3, 1, 2]}),
        ("Conv", ["b", "w1"], "c", PADS),
        ("Squeeze", ["c", "axis"], "disparity", {}),
    ]
    matrix[:, 0] = 0
    model = graph(nodes, {"w0": conv(3, 3), "w1": conv(48, 1, 1), "matrix": matrix, "axis": np.array([1], np.int64)})
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = run(model, tmp_path, images)
    made = onnx_precision.to_int8(model, [], matrices="weights")
    off = (run(made, tmp_path, images) - expected).abs().mean() / expected.std()
    assert 0 < float(off) < 0.01


def test_what_is_nan_inside_stays_float32():
    """max(0, NaN) is 0, by which a tensor that holds NaN would look small enough for float16."""
    net = graph(
        [("Sqrt", ["images"], "root", {}), ("ReduceMax", ["root"], "disparity", {"keepdims": 0})],
        {},
    )
    images = torch.full((1, 3, 8, 8), -1.0)
    assert onnx_precision._magnitudes(net, [images])["root"] == math.inf
    assert onnx_precision._magnitudes(net, [images.abs()])["root"] == 1.0
    assert onnx_precision._magnitudes(net, [images, images.abs()])["root"] == math.inf


def test_float16_keeps_sampling_grids_whole(tmp_path):
    """A grid of ten bits is half a pixel off on a map of a thousand."""
    width = 2048
    step = (2 * (torch.arange(width) + 0.5) / width - 1).numpy()
    grid = np.stack([step, np.zeros(width)], axis=-1).astype(np.float32)[None, None]
    model = graph(
        [
            ("Mul", ["images", "zero"], "nothing", {}),
            ("ReduceSum", ["nothing"], "none", {"keepdims": 0}),
            ("Add", ["grid", "none"], "moved", {}),
            ("GridSample", ["images", "moved"], "read", {"align_corners": 0}),
            ("ReduceMean", ["read", "axis"], "disparity", {"keepdims": 0}),
        ],
        {"zero": np.float32(0), "grid": grid, "axis": np.array([1], np.int64)},
    )
    images = torch.linspace(0, 1, width).expand(1, 3, 1, width).contiguous()
    half = onnx_precision.to_float16(model, [images])
    off = (run(half, tmp_path, images) - run(model, tmp_path, images)).abs().max()
    assert off < 1e-3  # float16 of a value near one; a grid in float16 is off by more than 2e-4 everywhere


def test_eight_bits_are_calibrated_and_close(tmp_path, caplog):
    draw = torch.Generator().manual_seed(0)
    model = graph(
        [
            ("Conv", ["images", "w0"], "a", PADS),
            ("Relu", ["a"], "b", {}),
            ("Conv", ["b", "w1"], "c", PADS),
            ("Relu", ["c"], "d", {}),
            ("Conv", ["d", "w2"], "e", PADS),
            ("Squeeze", ["e", "axis"], "disparity", {}),
        ],
        {"w0": conv(3, 16), "w1": conv(16, 16, 1), "w2": conv(16, 1, 2), "axis": np.array([1], np.int64)},
    )
    images = torch.rand(1, 3, 16, 24, generator=draw)
    expected = run(model, tmp_path, images)
    made = onnx_precision.to_int8(model, [torch.rand(1, 3, 16, 16, generator=draw) for _ in range(3)])
    assert not caplog.records, "what onnxruntime would say is nothing that a person can act on"
    found = run(made, tmp_path, images)
    assert 0 < float((found - expected).abs().mean() / expected.std()) < 0.1
    codes = [t for t in made.graph.initializer if t.name.startswith("w1") and t.data_type == onnx.TensorProto.INT8]
    assert max(np.abs(onnx.numpy_helper.to_array(t)).max() for t in codes) == 64, "seven bits: processors without VNNI"
    assert not any(t.name.startswith("w0_quantized") for t in made.graph.initializer), "the first one stays whole"


def test_weights_alone_are_in_eight_bits_and_their_products_in_float32(tmp_path):
    draw = np.random.default_rng(0)
    matrix = draw.normal(size=(64, 64)).astype(np.float32)
    matrix[:32] *= 100  # a column's halves have scales of their own
    kernel = conv(64, 64, 2)
    kernel[:32] *= 100  # and so do a convolution's outputs
    nodes = [
        ("Conv", ["images", "w0"], "a", PADS),
        ("Conv", ["a", "kernel"], "k", PADS),
        ("Transpose", ["k"], "t", {"perm": [0, 2, 3, 1]}),
        ("MatMul", ["t", "matrix"], "m", {}),
        ("Transpose", ["m"], "b", {"perm": [0, 3, 1, 2]}),
        ("Conv", ["b", "w1"], "c", PADS),
        ("Squeeze", ["c", "axis"], "disparity", {}),
    ]
    last = conv(64, 1, 1)
    weights = {"w0": conv(3, 64), "kernel": kernel, "matrix": matrix, "w1": last, "axis": np.array([1], np.int64)}
    model = graph(nodes, weights)
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = run(model, tmp_path, images)
    made = onnx_precision.to_int8(model, [], matrices="weights")
    assert {node.op_type for node in made.graph.node}.isdisjoint({"QuantizeLinear", "DequantizeLinear"})
    kept = {t.name: t for t in made.graph.initializer}
    assert kept["kernel:codes"].data_type == onnx.TensorProto.INT8 and {"w0", "w1"} < kept.keys() - {"kernel"}
    codes, scale = (onnx.numpy_helper.to_array(kept[f"kernel:{key}"]) for key in ("codes", "scale"))
    assert np.abs((codes * scale).reshape(kernel.shape) - kernel)[32:].max() < 0.003
    assert kept["matrix:codes"].data_type == onnx.TensorProto.INT8 and "matrix" not in kept
    codes, scale = (onnx.numpy_helper.to_array(kept[f"matrix:{key}"]) for key in ("codes", "scale"))
    assert np.abs((codes * scale).reshape(64, 64) - matrix)[32:].max() < 0.03
    off = (run(made, tmp_path, images) - expected).abs().mean() / expected.std()
    assert 0 < float(off) < 0.01
    with pytest.raises(ValueError, match="matrices must be"):
        onnx_precision.to_int8(model, [], matrices="some")


@pytest.mark.parametrize(("height", "width"), [(90, 120), (333, 217), (20, 700), (56, 56), (7, 9)])
def test_the_size_rule_in_the_graph_is_that_of_predict(tmp_path, height, width):
    student = small()
    student.native_size = 56
    # The "network" is the first channel at its own size.
    model = graph([("Gather", ["images", "first"], "disparity", {"axis": 1})], {"first": np.int64(0)})
    onnx_form.with_resize(model, student)
    sides = [
        d.dim_param or d.dim_value
        for v in (*model.graph.input, *model.graph.output)
        for d in v.type.tensor_type.shape.dim
    ]
    assert sides == ["height", "width", 3, "height", "width"]
    photo = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = run(model, tmp_path, photo.permute(1, 2, 0).contiguous())
    sized = crops.resize(photo[None].float() / 255, *crops.native_shape(height, width, 56, student.encoder.patch_size))
    expected = crops.resize(sized, height, width)[0, 0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_the_python_of_the_page_runs_a_graph_by_the_size_rule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shipped").mkdir()
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    plain, with_resize = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "session" in code)
    student = small()
    student.native_size = 56
    multiple = student.encoder.patch_size
    # The "network" is the first channel at its own size.
    model = graph([("Gather", ["images", "first"], "disparity", {"axis": 1})], {"first": np.int64(0)})
    onnx.helper.set_model_props(model, {"native_size": "56", "multiple": str(multiple)})
    onnx.save(model, "shipped/model.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save("photo.png")
    scope: dict = {}
    exec(plain.replace("photo.jpg", "photo.png"), scope)
    photo = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    sized = crops.resize(photo, *crops.native_shape(90, 120, 56, multiple))
    expected = crops.resize(sized, 90, 120)[0, 0].numpy()
    np.testing.assert_allclose(scope["depth"], expected, atol=1.5 / 255)  # Pillow rounds to 8 bits
    onnx_form.with_resize(model, student)
    onnx.save(model, "shipped/model.onnx")
    exec(plain.partition("scale")[0].replace("photo.jpg", "photo.png") + with_resize, scope)
    np.testing.assert_allclose(scope["depth"], expected, atol=2e-5)


def test_a_graph_for_browsers_has_no_antialias_and_the_same_map():
    model = graph(
        [
            ("Resize", ["images", "", "scales"], "big", {"mode": "cubic", "antialias": 1, "cubic_coeff_a": -0.5}),
            ("Gather", ["big", "first"], "disparity", {"axis": 1}),
        ],
        {"scales": np.array([1, 1, 1.5, 2], np.float32), "first": np.int64(0)},
    )
    onnx_form.without_antialias(model)
    assert {a.name for a in model.graph.node[0].attribute} == {"mode", "cubic_coeff_a"}


def test_missing_packages_are_said_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else found(name, *a)
    )
    monkeypatch.setattr(checkpoint, "load", lambda *given, **options: pytest.fail("loaded"))
    checkpoint.save(small(), tmp_path / "s")
    assert cli.main(["export", str(tmp_path / "s"), str(tmp_path / "o"), "--onnx"]) == 2
    assert "onnxruntime is not installed; run pip install 'depth-distill[export]'" in " ".join(
        capsys.readouterr().err.split()
    )


def test_forms_that_need_more_are_refused(tmp_path):
    student = small()
    with pytest.raises(ValueError, match="8 bits need images"):
        onnx_graph.write_onnx(student, tmp_path / "m.onnx", options=OnnxOptions(bits=8))
    with pytest.raises(ValueError, match="no native_size"):
        onnx_graph.write_onnx(student, tmp_path / "m.onnx", options=OnnxOptions(with_resize=True))


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_every_precision_is_written_with_its_resize_and_checked(tmp_path, monkeypatch, bits):
    weights = [conv(3, 16), conv(16, 16, 1), conv(16, 1, 2)]
    steps = [("Conv", [x, f"w{i}"], f"c{i}", PADS) for i, x in enumerate(("images", "r0", "r1"))]
    relus = [("Relu", [f"c{i}"], f"r{i}", {}) for i in range(2)]
    nodes = [steps[0], relus[0], steps[1], relus[1], steps[2], ("Squeeze", ["c2", "axis"], "disparity", {})]
    model = graph(nodes, {f"w{i}": w for i, w in enumerate(weights)} | {"axis": np.array([1], np.int64)})

    def network(images):
        for i, weight in enumerate(weights):
            images = torch.conv2d(images.relu() if i else images, torch.from_numpy(weight), padding=1)
        return images[:, 0]

    student = small()
    student.native_size, student.forward = 64, network
    monkeypatch.setattr(onnx_graph, "traced", lambda *given: model)
    draw = torch.Generator().manual_seed(0)
    photos = [torch.randint(0, 256, (3, 80, 80), generator=draw, dtype=torch.uint8) for _ in range(4)]
    options = OnnxOptions(bits=bits, with_resize=True, crops=photos)
    check, limits = onnx_graph._check_resize, []
    monkeypatch.setattr(onnx_graph, "_check_resize", lambda *given: limits.append(given[-1]) or check(*given))
    assert onnx_graph.write_onnx(student, tmp_path / "m.onnx", options=options) < {32: 1e-4, 16: 5e-3, 8: 0.2}[bits]
    # In eight bits an input that is off by rounding moves codes: the resize may cost as much as they do.
    assert limits[0] in (1e-3, 1e-2) if bits != 8 else 0.01 < limits[0] < 0.4
    found = onnx_graph.run_onnx(tmp_path / "m.onnx")(photos[0].permute(1, 2, 0).contiguous())
    expected = onnx_graph.at_native(student, network, photos[0])
    assert float((found - expected).abs().mean() / expected.std()) < {32: 1e-4, 16: 5e-3, 8: 0.2}[bits]


def test_a_constant_becomes_a_weight_and_is_halved_and_one_of_another_form_stays(tmp_path):
    tensor = onnx.numpy_helper.from_array(np.float32(3), "")
    nodes = [
        ("Constant", [], "three", {"value": tensor}),
        ("Constant", [], "two", {"value_float": 2.0}),
        ("Mul", ["images", "three"], "tripled", {}),
        ("Mul", ["tripled", "two"], "sixfold", {}),
        ("Gather", ["sixfold", "first"], "disparity", {"axis": 1}),
    ]
    net = graph(nodes, {"first": np.int64(0)})
    prepared = onnx_precision._prepared(net)
    assert [node.op_type for node in prepared.graph.node] == ["Constant", "Mul", "Mul", "Gather"]
    assert {t.name for t in prepared.graph.initializer} == {"first", "three"}
    assert len(net.graph.node) == 5 and not net.graph.node[0].name, "the given graph is unchanged"
    half = onnx_precision.to_float16(net, [torch.ones(1, 3, 4, 4)])
    assert {t.name: t.data_type for t in half.graph.initializer}["three:half"] == onnx.TensorProto.FLOAT16
    assert run(half, tmp_path, torch.ones(1, 3, 4, 4)).tolist() == [[[6.0] * 4] * 4]
