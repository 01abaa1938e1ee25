"""Variants of a student's ONNX graph: with the size rule inside, or without what a browser's WebGPU lacks.

A browser's WebGPU has no Resize with `antialias`. Without it, resizing the position table is exact only if the table
grows, so the table is first resized to the student's native grid, the smallest of its size rule (`for_browser`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np

from distill.core.crops import native_shape
from distill.core.optional import optional
from distill.students import Student


def for_browser(student: Student) -> Student:
    """A copy whose learned position table, if any, has the native grid, the smallest that the size rule gives."""
    out = copy.deepcopy(student)
    if getattr(out.encoder.backbone, "pos_embed", None) is not None and out.native_size:
        square = native_shape(1, 1, out.native_size, out.encoder.patch_size)
        out.encoder.backbone.set_input_size(img_size=square)
    return out


def without_antialias(model: Any) -> None:
    """Remove `antialias` from every Resize, in place; this changes nothing where it enlarges."""
    for node in model.graph.node:
        if node.op_type == "Resize":
            attributes = [attribute for attribute in node.attribute if attribute.name != "antialias"]
            del node.attribute[:]
            node.attribute.extend(attributes)


def with_resize(model: Any, student: Student) -> None:
    """Add the size rule of core.crops.native_shape to the graph, in place: "photo" (H,W,3) uint8 to its map (H,W).

    Sizes are computed in float64, as in Python, so that a side halfway between two multiples is rounded alike. A resize
    is two products with a matrix of triangle weights, which equals torch's antialias; onnxruntime's Resize treats the
    borders differently, and browsers have no antialias.
    """
    onnx = optional("onnx")
    graph, kinds = model.graph, onnx.TensorProto
    source, output = graph.input[0].name, graph.output[0].name
    rename(graph.node, output, "photo:map")
    build, size = _Builder(graph), student.native_size or 0
    build.numbers(size=size, most=8 * size, multiple=student.encoder.patch_size, one=1.0)
    build.numbers(zero=0.0, half=0.5)
    build.numbers(front=np.array([0], np.int64), back=np.array([1], np.int64), high=np.float32(255))
    build.add("Shape", "photo", "shape", end=2)
    build.add("Cast", "shape", "sides", to=kinds.DOUBLE)
    build.add("ReduceMin", "sides", "short", keepdims=0)
    build.add("Div", "size short", "scale")
    build.add("Mul", "sides scale", "scaled")
    build.add("Min", "scaled most", "capped")
    build.add("Div", "capped multiple", "exact")
    build.add("Round", "exact", "whole")
    build.add("Max", "whole one", "patches")
    build.add("Mul", "patches multiple", "pixels")
    for i, side in enumerate(("rows", "columns")):
        build.numbers(**{f"at_{side}": np.int64(i)})
        build.add("Gather", f"sides at_{side}", f"{side}_there", axis=0)
        build.add("Gather", f"pixels at_{side}", f"{side}_here", axis=0)
        build.triangles(f"{side}_there", f"{side}_here", f"{side}_in")
        build.triangles(f"{side}_here", f"{side}_there", f"{side}_out")
    build.add("Cast", "photo", "float", to=kinds.FLOAT)
    build.add("Div", "float high", "unit")
    build.add("Transpose", "unit", "planes", perm=[2, 0, 1])
    build.matrices("planes", "in", "sized")
    build.add("Unsqueeze", "sized front", source, last=True)
    after = _Builder(graph)
    after.add("Squeeze", "map front", "small")
    after.matrices("small", "out", output)
    nodes = [*build.nodes, *graph.node, *after.nodes]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.input.append(onnx.helper.make_tensor_value_info("photo", kinds.UINT8, ["height", "width", 3]))
    graph.output.append(onnx.helper.make_tensor_value_info(output, kinds.FLOAT, ["height", "width"]))


def rename(nodes: Iterable[Any], old: str, new: str) -> None:
    """Rename a value wherever the nodes write or read it, in place."""
    for node in nodes:
        node.output[:] = [new if x == old else x for x in node.output]
        node.input[:] = [new if x == old else x for x in node.input]


class _Builder:
    """Builds nodes whose names begin with "photo:"."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.nodes: list[Any] = []
        self.onnx = optional("onnx")

    def numbers(self, **values: Any) -> None:
        """Adds constants; plain numbers are float64."""
        for name, value in values.items():
            array = value if isinstance(value, np.ndarray | np.generic) else np.float64(value)
            self.graph.initializer.append(self.onnx.numpy_helper.from_array(np.asarray(array), f"photo:{name}"))

    def add(self, op: str, inputs: str, made: str, *, last: bool = False, **attributes: Any) -> None:
        """Adds a node with the output `made`; last: `made` is the name of a tensor of the graph itself."""
        names = [x if x == "photo" else f"photo:{x}" for x in inputs.split()]
        out = made if last else f"photo:{made}"
        self.nodes.append(self.onnx.helper.make_node(op, names, [out], name=f"photo:{made}:node", **attributes))

    def triangles(self, before: str, after: str, made: str) -> None:
        """Adds the (after, before) float32 matrix that resizes a side linearly, with antialias if it shrinks."""
        self.add("Div", f"{before} {after}", f"{made}_step")
        self.add("Max", f"{made}_step one", f"{made}_reach")
        for name, count in (("to", after), ("from", before)):
            self.add("Range", f"zero {count} one", f"{made}_{name}_i")
            self.add("Add", f"{made}_{name}_i half", f"{made}_{name}")
        self.add("Mul", f"{made}_to {made}_step", f"{made}_centres")
        self.add("Unsqueeze", f"{made}_centres back", f"{made}_column")
        self.add("Sub", f"{made}_from {made}_column", f"{made}_off")
        self.add("Div", f"{made}_off {made}_reach", f"{made}_far")
        self.add("Abs", f"{made}_far", f"{made}_away")
        self.add("Sub", f"one {made}_away", f"{made}_near")
        self.add("Max", f"{made}_near zero", f"{made}_weights")
        self.add("ReduceSum", f"{made}_weights back", f"{made}_sum", keepdims=1)
        self.add("Div", f"{made}_weights {made}_sum", f"{made}_double")
        self.add("Cast", f"{made}_double", made, to=self.onnx.TensorProto.FLOAT)

    def matrices(self, images: str, way: str, made: str) -> None:
        """Resizes (...,H,W) by the matrices rows_WAY and columns_WAY."""
        self.add("Transpose", f"columns_{way}", f"columns_{way}_t", perm=[1, 0])
        self.add("MatMul", f"{images} columns_{way}_t", f"{images}_across")
        self.add("MatMul", f"rows_{way} {images}_across", made, last=way == "out")
