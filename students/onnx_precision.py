"""The precision of a student's ONNX graph: float16 where it holds, or 8 bits after a calibration.

Surprises: float16 is wrong in a few places whatever the weights: positions (rotary angles, sampling grids of DySample,
the position table's resize) need more than ten bits, and values above 65504 become infinite, as in DINOv3's first
attention. Both are found in the graph, by where values come from and how large they get on a few images, and stay
float32. onnxruntime's own converter casts around every single node, so that a value between two nodes that stay still
passes through float16; hence one of our own.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distill.core.optional import optional

_MOVES = {"Concat", "Expand", "Gather", "Identity", "Pad", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
_MOVES |= {"Resize", "Unsqueeze"}  # what gives no larger value than it takes: bicubic's few percent are in the room
BLOCK = 32
"""Rows of a matrix's column that share a scale where only its weights are in eight bits."""
_LARGEST = 65504 / 4  # of float16, with room for images that were not tried


def half(model: Any, images: Sequence[Tensor]) -> Any:
    """A float32 graph as a float16 one with float32 ends; what float16 cannot do stays float32.

    images: (B,3,H,W) each, on which values are measured: where one is above a quarter of float16's largest, the nodes
    that make and take it stay. So do positions (`_positions`). ValueError for a graph with branches or loops.
    """
    onnx = optional("onnx")
    model = _prepared(model)
    graph = model.graph
    tops = _magnitudes(model, images)
    large = {name for name, top in tops.items() if not top <= _LARGEST}
    kept = _positions(graph)
    kept |= {node.name for node in graph.node if large & {*node.input, *node.output}}
    weights = {t.name: t for t in graph.initializer if t.name in tops}
    single = {value.name for value in graph.input} | set(weights)  # made in float32; grows in order
    floats = set(tops) | {value.name for value in graph.input}
    nodes: list[Any] = []
    made: set[str] = set()

    def wanted(name: str, halved: bool) -> str:
        """A float tensor's name in the precision asked for; a cast is made once."""
        if name not in floats or halved is (name not in single):
            return name
        cast = f"{name}:{'half' if halved else 'single'}"
        if cast not in made:
            made.add(cast)
            if name in weights:
                array = onnx.numpy_helper.to_array(weights[name]).astype(np.float16)
                graph.initializer.append(onnx.numpy_helper.from_array(array, cast))
            else:
                to = onnx.TensorProto.FLOAT16 if halved else onnx.TensorProto.FLOAT
                nodes.append(onnx.helper.make_node("Cast", [name], [cast], name=cast, to=to))
        return cast

    for node in graph.node:
        halved = node.name not in kept
        # Resize takes its scales in float32 whatever the map is.
        inputs = [wanted(x, halved and not (node.op_type == "Resize" and i)) for i, x in enumerate(node.input)]
        node.input[:] = inputs
        nodes.append(node)
        if halved:
            _in_half(node)
        else:
            single |= set(node.output)
    for value in graph.output:
        if value.name not in single:
            name = f"{value.name}:half"
            for node in nodes:
                node.output[:] = [name if x == value.name else x for x in node.output]
                node.input[:] = [name if x == value.name else x for x in node.input]
            nodes.append(onnx.helper.make_node("Cast", [name], [value.name], name=f"{name}:out", to=1))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    used = {x for node in nodes for x in node.input}
    left = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)
    return model


def _prepared(model: Any) -> Any:
    """A copy with names for all nodes, and constants among the weights."""
    onnx = optional("onnx")
    model = copy.deepcopy(model)
    nodes = []
    for i, node in enumerate(model.graph.node):
        if any(
            attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute
        ):
            raise ValueError(f"{node.op_type}: a graph with branches or loops has no float16 form here")
        node.name = f"{i}:{node.op_type}"
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = copy.deepcopy(node.attribute[0].t)
            tensor.name = node.output[0]
            model.graph.initializer.append(tensor)
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _in_half(node: Any) -> None:
    """What of a node's attributes says float32, in float16."""
    onnx = optional("onnx")
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
            attribute.i = onnx.TensorProto.FLOAT16
        if node.op_type == "ConstantOfShape" and attribute.t.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(attribute.t).astype(np.float16)
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(array))


def _positions(graph: Any) -> set[str]:
    """Names of nodes that compute where and not what: all before a GridSample's grid, all that sees sizes alone."""
    maker = {name: node for node in graph.node for name in node.output}
    seen = {value.name for value in graph.input}
    for node in graph.node:  # in the order of computation
        if node.op_type not in ("Shape", "Size") and seen & set(node.input):
            seen |= set(node.output)
    kept = {node.name for node in graph.node if not seen & set(node.output)}
    todo = [node for node in graph.node if node.op_type == "GridSample"]
    while todo:
        node = todo.pop()
        kept.add(node.name)
        before = node.input[1:] if node.op_type == "GridSample" else node.input
        todo += [maker[n] for n in before if n in maker and maker[n].op_type != "Conv" and maker[n].name not in kept]
    return kept


def _magnitudes(model: Any, images: Sequence[Tensor]) -> dict[str, float]:
    """The largest |value| of every float32 tensor in the graph, weights among them, over some images."""
    onnx, runtime = optional("onnx"), optional("onnxruntime")
    single = onnx.TensorProto.FLOAT
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == single}
    tops = {name: float(np.abs(array).max(initial=0)) for name, array in arrays.items()}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = [*inferred.value_info, *inferred.output]
    known = {value.name for value in values if value.type.tensor_type.elem_type == single}
    moved = {name for node in model.graph.node if node.op_type in _MOVES for name in node.output}
    floats = sorted(known - moved)
    probe = copy.deepcopy(model)
    for name in floats:
        # A map without a pixel has no largest value: zero stands beside it.
        flat, top = f"{name}:flat", f"{name}:top"
        probe.graph.node.extend(
            [
                onnx.helper.make_node("Reshape", [name, ":row"], [flat]),
                onnx.helper.make_node("Concat", [flat, ":zero"], [f"{flat}0"], axis=0),
                onnx.helper.make_node("Abs", [f"{flat}0"], [f"{flat}1"]),
                onnx.helper.make_node("ReduceMax", [f"{flat}1"], [top], keepdims=0),
            ]
        )
        probe.graph.output.append(onnx.helper.make_tensor_value_info(top, single, []))
    for name, array in ((":row", np.array([-1])), (":zero", np.zeros(1, np.float32))):
        probe.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for image in images:
        found = session.run([f"{name}:top" for name in floats], {session.get_inputs()[0].name: image.numpy()})
        for name, value in zip(floats, found, strict=True):
            tops[name] = max(tops.get(name, 0.0), float(value))
    for node in model.graph.node:
        for name in known & moved & set(node.output):
            tops[name] = max((tops[x] for x in node.input if x in tops), default=0.0)
    return tops


def quantized(model: Any, images: Sequence[Tensor], *, matrices: str = "int8") -> Any:
    """A float32 graph with its convolutions and matrices in INT8 (QDQ: activations uint8, weights int8 per channel).

    images: those of the calibration, (1,3,H,W) each. The patches' embedding and
    the last convolution stay float32: what they lose, everything has lost (ours). So do the products of matrices, whose
    output's rounding would double the noise, while what takes them is float32 anyhow; attention's, of two activations,
    are not quantized at all. matrices: "int8"; or "weights": the weights alone, of matrices and convolutions, in eight
    bits, for what INT8 loses is its activations', where a few values are many times larger than the rest and share its
    step. Nothing is calibrated then, and everything is computed in float32.
    """
    if matrices not in ("int8", "weights"):
        raise ValueError(f'matrices must be "int8" or "weights", not {matrices!r}')
    quantization = optional("onnxruntime.quantization")
    onnx = optional("onnx")
    sized = iter([{model.graph.input[0].name: image.numpy()} for image in images])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def get_next(self) -> Any:
            return next(sized, None)

    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{i}"
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    whole = [convolutions[0], convolutions[-1]]
    if matrices == "weights":
        made = copy.deepcopy(model)
        _eight_bit_weights(made, whole)
        return made
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "before.onnx"), Path(folder, "after.onnx")
        onnx.save(onnx.shape_inference.infer_shapes(model), before)
        with _without_warnings():
            quantization.quantize_static(
                before,
                after,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                reduce_range=True,  # seven bits: with eight, processors without VNNI overflow between products
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                nodes_to_exclude=whole,
                extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
            )
        return onnx.load(after)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """onnxruntime advises a preparation that a traced graph does not need, on the root logger: on the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _eight_bit_weights(model: Any, whole: Sequence[str]) -> None:
    """Every matrix (in, out) that multiplies from the right as int8, a scale for BLOCK of a column, in place; and every
    convolution's kernel (out, in, h, w) but those of the nodes called as in `whole`, a scale for an output's.

    A Cast and a Mul, not a DequantizeLinear: with that onnxruntime was off by .034 where weights and convolutions
    explain .014, as if it rounded the product's activations after all (inferred, not seen in its graph).
    """
    onnx = optional("onnx")
    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    nodes: list[Any] = []
    made: dict[str, str] = {}

    def weight(name: str) -> str:
        values = onnx.numpy_helper.to_array(stored[name])
        if values.ndim == 2:
            blocks = values.reshape(-1, values.shape[0] if values.shape[0] % BLOCK else BLOCK, values.shape[1])
        else:
            blocks = values.reshape(values.shape[0], -1, 1)
        scale = np.abs(blocks).max(1, keepdims=True).astype(np.float32) / np.float32(127)
        scale[scale == 0] = 1
        parts = {"codes": np.round(blocks / scale).astype(np.int8), "scale": scale, "shape": np.array(values.shape)}
        graph.initializer.extend(onnx.numpy_helper.from_array(array, f"{name}:{key}") for key, array in parts.items())
        for op, inputs, key, options in (
            ("Cast", ["codes"], "cast", {"to": onnx.TensorProto.FLOAT}),
            ("Mul", ["cast", "scale"], "blocks", {}),
            ("Reshape", ["blocks", "shape"], "single", {}),
        ):
            given, out = [f"{name}:{one}" for one in inputs], f"{name}:{key}"
            nodes.append(onnx.helper.make_node(op, given, [out], name=out, **options))
        return f"{name}:single"

    for node in graph.node:
        shrinks = {"MatMul": 2, "Conv": 4}.get(node.op_type) if node.name not in whole else None
        name = node.input[1] if shrinks else ""
        if name in stored and len(stored[name].dims) == shrinks:
            made[name] = made.get(name) or weight(name)
            node.input[1] = made[name]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {x for node in nodes for x in node.input}
    left = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)
