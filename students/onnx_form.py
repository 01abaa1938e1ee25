"""The form of a student's ONNX graph: the size rule inside it, or nothing that a browser's WebGPU lacks.

A browser's WebGPU has no Resize with `antialias`. The position table's is then exact only where the table grows, so
the table is first brought to the student's native grid, the least that its size rule ever gives (`for_browser`).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from distill.core.optional import optional
from distill.students import Student


def for_browser(student: Student) -> Student:
    """A copy whose learned position table, where it has one, is of its native grid: the least that its rule gives."""
    out = copy.deepcopy(student)
    if getattr(out.encoder.backbone, "pos_embed", None) is not None and out.native_size:
        side = round(out.native_size / out.encoder.patch_size) * out.encoder.patch_size
        out.encoder.backbone.set_input_size(img_size=(side, side))
    return out


def without_antialias(model: Any) -> None:
    """Every Resize plain, in place: the same where it enlarges."""
    for node in model.graph.node:
        if node.op_type == "Resize":
            kept = [attribute for attribute in node.attribute if attribute.name != "antialias"]
            del node.attribute[:]
            node.attribute.extend(kept)


def with_resize(model: Any, student: Student) -> None:
    """The size rule of core.crops.native_shape around the graph, in place: "photo" (H,W,3) uint8 to its map (H,W).

    In float64, as Python counts: a side in the middle between two multiples must not fall to the other one.
    """
    onnx = optional("onnx")
    make, tensors = onnx.helper.make_node, onnx.TensorProto
    graph, size, multiple = model.graph, student.native_size, student.encoder.patch_size
    output = graph.output[0].name
    name = "photo:map"
    for node in graph.node:
        node.output[:] = [name if x == output else x for x in node.output]
        node.input[:] = [name if x == output else x for x in node.input]
    numbers = {
        "size": np.float64(size), "most": np.float64(8 * size), "multiple": np.float64(multiple), "one": np.float64(1),
        "two": np.array([0, 2], np.int64), "axis": np.array([0], np.int64), "axes": np.array([0, 1], np.int64),
        "front": np.array([1, 3], np.int64), "plane": np.array([1, 1], np.int64), "top": np.float32(255),
        "start": np.array([0], np.int64), "end": np.array([2], np.int64),
    }  # fmt: skip
    graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), f"photo:{k}") for k, v in numbers.items())

    def add(op: str, inputs: str, made: str, **attributes: Any) -> Any:
        return make(op, [x and f"photo:{x}" if x != "photo" else x for x in inputs.split(",")], [made], **attributes)

    resize = {"mode": "linear", "antialias": 1, "coordinate_transformation_mode": "half_pixel"}
    before = [
        add("Shape", "photo", "photo:shape", end=2),
        add("Cast", "shape", "photo:sides", to=tensors.DOUBLE),
        add("ReduceMin", "sides", "photo:short", keepdims=0),
        add("Div", "size,short", "photo:scale"),
        add("Mul", "sides,scale", "photo:scaled"),
        add("Min", "scaled,most", "photo:capped"),
        add("Div", "capped,multiple", "photo:exact"),
        add("Round", "exact", "photo:whole"),
        add("Max", "whole,one", "photo:patches"),
        add("Mul", "patches,multiple", "photo:pixels"),
        add("Cast", "pixels", "photo:target", to=tensors.INT64),
        add("Concat", "front,target", "photo:sizes", axis=0),
        add("Cast", "photo", "photo:float", to=tensors.FLOAT),
        add("Div", "float,top", "photo:unit"),
        add("Transpose", "unit", "photo:chw", perm=[2, 0, 1]),
        add("Unsqueeze", "chw,axis", "photo:whole_image"),
        add("Resize", "whole_image,,,sizes", graph.input[0].name, **resize),
    ]
    after = [
        add("Unsqueeze", "map,axis", "photo:map4"),
        add("Concat", "plane,shape", "photo:back", axis=0),
        add("Resize", "map4,,,back", "photo:full", **resize),
        add("Squeeze", "full,axes", output),
    ]
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.input.append(onnx.helper.make_tensor_value_info("photo", tensors.UINT8, ["height", "width", 3]))
    graph.output.append(onnx.helper.make_tensor_value_info(output, tensors.FLOAT, ["height", "width"]))
