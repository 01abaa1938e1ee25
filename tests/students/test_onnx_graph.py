"""What is written as an ONNX file: its names, its facts, a browser's form, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.students import onnx_form, onnx_graph
from distill.students.onnx_graph import OnnxOptions
from tests.students.test_export import small, tiny
from tests.students.test_onnx import graph

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def first_channel(**resize):
    """A "network" that gives the first channel, by way of a resize to the same size."""
    nodes = [
        ("Resize", ["images", "", "scales"], "same", {"mode": "linear", **resize}),
        ("Gather", ["same", "first"], "disparity", {"axis": 1}),
    ]
    return graph(nodes, {"scales": np.ones(4, np.float32), "first": np.int64(0)})


def test_a_browsers_graph_is_of_the_native_table_and_without_antialias(tmp_path, monkeypatch):
    student = tiny("dinov2_vits14", "dpt", channels=8, post_process_channels=[8, 8, 8, 8])
    student.native_size = 66
    student.forward = lambda images: images[:, 0]
    seen = []
    monkeypatch.setattr(onnx_graph, "traced", lambda *given: seen.append(given) or first_channel(antialias=1))
    onnx_graph.write_onnx(student, tmp_path / "m.onnx", options=OnnxOptions(browser=True), program=object())
    ((copied, program),) = seen
    assert program is None and copied.encoder.backbone.patch_embed.grid_size == (5, 5)  # 66 is nearer to 70 than to 56
    (resize,) = (node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "Resize")
    assert {attribute.name for attribute in resize.attribute} == {"mode"}


def test_how_much_the_native_table_changes_a_map_is_told():
    student = tiny("dinov2_vits14", "dpt", channels=8, post_process_channels=[8, 8, 8, 8])
    torch.nn.init.normal_(student.encoder.backbone.pos_embed)
    student.native_size = 70
    assert onnx_graph.change_by_table(student) > 1e-3
    assert onnx_graph.change_by_table(onnx_form.for_browser(student)) < 1e-6  # whose table is of that size


def test_the_output_is_named_by_its_quantity_and_every_size_is_free(monkeypatch):
    student = small()
    given = {}

    class Exported:
        model_proto = graph([("Gather", ["images", "first"], "depth", {"axis": 1})], {"first": np.int64(0)}, "depth")

    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: given.update(options) or Exported)
    for max_depth, name in ((None, "disparity"), (20.0, "depth")):
        student.max_depth = max_depth
        model = onnx_graph.traced(student, object())
        assert given["output_names"] == [name] and given["input_names"] == ["images"]
    sides = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.output]
    assert sides == [["batch", "height", "width"]]


def test_a_graph_that_loses_too_much_leaves_what_was_there(tmp_path, monkeypatch):
    student = small()
    student.native_size = 64
    student.forward = lambda images: images[:, 0]
    (tmp_path / "m.onnx").write_text("older")
    monkeypatch.setattr(onnx_graph, "traced", lambda *given: first_channel())
    brighter = graph(
        [("Mul", ["images", "more"], "m", {}), ("Gather", ["m", "first"], "disparity", {"axis": 1})],
        {"more": np.float32(1.02), "first": np.int64(0)},
    )
    monkeypatch.setattr(onnx_graph, "to_float16", lambda *given: brighter)
    with pytest.raises(ValueError, match="^o/m: differs from torch by 0.1.* of the map's deviation"):
        onnx_graph.write_onnx(student, tmp_path / "m.onnx", options=OnnxOptions(bits=16), named="o/m")
    other = small()
    other.native_size = 96
    monkeypatch.setattr(onnx_graph, "with_resize", lambda model, student: onnx_form.with_resize(model, other))
    with pytest.raises(ValueError, match="^o/m: with its resize it differs by"):
        onnx_graph.write_onnx(student, tmp_path / "m.onnx", options=OnnxOptions(with_resize=True), named="o/m")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.onnx", "older")]


def test_the_facts_in_the_file_are_those_of_the_student():
    output = {"kind": "metric_depth", "larger_is": "farther", "camera": "focal 300"}
    about = {
        "card": {"name": "x", "licence": "MIT", "recipe": {}},
        "output": output,
        "native_size": 70,
        "images": {"multiple": 14},
        "spec": {"max_depth": 20.0},
    }
    facts = onnx_graph.metadata(about)
    rule = "short side to 70, aspect kept, each side to the nearest multiple of 14; bilinear with antialias"
    assert facts == {
        **{"name": "x", "licence": "MIT", "kind": "metric_depth", "larger_is": "farther"},
        **{"native_size": 70, "multiple": 14, "images": "RGB in [0, 1]", "size_rule": rule},
        "values": "metres, 0 to 20.0; focal 300",
    }
    inside = onnx_graph.metadata(about, with_resize=True)
    assert inside["images"] == "uint8 RGB, 0 to 255, (height, width, 3)" and inside["size_rule"] == "in the graph"
    relative = about | {"output": {"kind": "affine_disparity", "larger_is": "nearer"}, "native_size": None}
    assert onnx_graph.metadata(relative)["values"] == "scale and shift unknown; no unit, no fixed range"
    assert onnx_graph.metadata(relative)["size_rule"] == "none"
