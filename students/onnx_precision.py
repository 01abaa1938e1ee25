"""The precision of a student's ONNX graph: float16 where it suffices, or 8 bits after a calibration.

Surprises: float16 fails in a few places whatever the weights: positions (rotary angles, sampling grids of DySample,
the position table's resize) need more than ten bits, and values above 65504 become infinite, as in DINOv3's first
attention. Both are detected, by the inputs that values depend on and by their magnitudes on a few images, and stay
float32. onnxruntime's own converter casts around every single node, so that a value between two float32 nodes still
passes through float16; hence our own.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distill.core.optional import optional
from distill.students.onnx_form import rename

_MOVES = {"Concat", "Expand", "Gather", "Identity", "Pad", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
_MOVES |= {"Resize", "Unsqueeze"}  # outputs no larger than inputs; bicubic's few percent are in _LARGEST's room
BLOCK = 32
"""Rows of a matrix's column that share a scale if only its weights are in eight bits."""
_LARGEST = 65504 / 4  # of float16, with room for images that were not tried


def to_float16(model: Any, images: Sequence[Tensor]) -> Any:
    """Convert a float32 graph to float16 with float32 inputs and outputs; what float16 cannot represent stays float32.

    images: (B,3,H,W) each, on which values are measured: nodes that write or read one above a quarter of float16's
    largest stay float32. So do positions (`_positions`). ValueError for a graph with branches or loops.
    """
    onnx = optional("onnx")
    model = _prepared(model)
    graph = model.graph
    tops = _magnitudes(model, images)
    large = {name for name, top in tops.items() if not top <= _LARGEST}
    kept_nodes = _positions(graph)
    kept_nodes |= {node.name for node in graph.node if large & {*node.input, *node.output}}
    weights = {t.name: t for t in graph.initializer if t.name in tops}
    single = {value.name for value in graph.input} | set(weights)  # computed in float32; grows node by node
    floats = set(tops) | {value.name for value in graph.input}
    nodes: list[Any] = []
    made_casts: set[str] = set()

    def variant_name(name: str, halved: bool) -> str:
        """A float tensor's name in the requested precision; a cast is added once."""
        if name not in floats or halved is (name not in single):
            return name
        cast = f"{name}:{'half' if halved else 'single'}"
        if cast not in made_casts:
            made_casts.add(cast)
            if name in weights:
                array = onnx.numpy_helper.to_array(weights[name]).astype(np.float16)
                graph.initializer.append(onnx.numpy_helper.from_array(array, cast))
            else:
                to = onnx.TensorProto.FLOAT16 if halved else onnx.TensorProto.FLOAT
                nodes.append(onnx.helper.make_node("Cast", [name], [cast], name=cast, to=to))
        return cast

    for node in graph.node:
        halved = node.name not in kept_nodes
        # Resize takes its scales in float32 whatever the map is.
        inputs = [variant_name(x, halved and not (node.op_type == "Resize" and i)) for i, x in enumerate(node.input)]
        node.input[:] = inputs
        nodes.append(node)
        if halved:
            _in_half(node)
        else:
            single |= set(node.output)
    for value in graph.output:
        if value.name not in single:
            name = f"{value.name}:half"
            rename(nodes, value.name, name)
            nodes.append(onnx.helper.make_node("Cast", [name], [value.name], name=f"{name}:out", to=1))
    del graph.value_info[:]
    _set_nodes(graph, nodes)
    return model


def _set_nodes(graph: Any, nodes: Sequence[Any]) -> None:
    """Replace the graph's nodes, and leave out the weights that none of them reads."""
    del graph.node[:]
    graph.node.extend(nodes)
    used = {x for node in nodes for x in node.input}
    initializers = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def _prepared(model: Any) -> Any:
    """A copy in which every node has a name and constants are initializers."""
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
    """Change a node's float32 attributes to float16, in place."""
    onnx = optional("onnx")
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
            attribute.i = onnx.TensorProto.FLOAT16
        if node.op_type == "ConstantOfShape" and attribute.t.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(attribute.t).astype(np.float16)
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(array))


def _positions(graph: Any) -> set[str]:
    """Names of nodes that compute positions: those before a GridSample's grid, and those that depend only on sizes."""
    maker = {name: node for node in graph.node for name in node.output}
    pixel_dependent = {value.name for value in graph.input}
    for node in graph.node:  # in the order of computation
        if node.op_type not in ("Shape", "Size") and pixel_dependent & set(node.input):
            pixel_dependent |= set(node.output)
    kept_names = {node.name for node in graph.node if not pixel_dependent & set(node.output)}
    todo = [node for node in graph.node if node.op_type == "GridSample"]
    while todo:
        node = todo.pop()
        kept_names.add(node.name)
        inputs = node.input[1:] if node.op_type == "GridSample" else node.input
        todo += [
            maker[n] for n in inputs if n in maker and maker[n].op_type != "Conv" and maker[n].name not in kept_names
        ]
    return kept_names


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
        # An empty map has no largest value, so a zero is appended.
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
        maxima = session.run([f"{name}:top" for name in floats], {session.get_inputs()[0].name: image.numpy()})
        for name, value in zip(floats, maxima, strict=True):
            measured = float(value)
            tops[name] = max(tops.get(name, 0.0), measured if math.isfinite(measured) else math.inf)  # max(0, NaN) is 0
    for node in model.graph.node:
        for name in known & moved & set(node.output):
            tops[name] = max((tops[x] for x in node.input if x in tops), default=0.0)
    return tops


def to_int8(model: Any, images: Sequence[Tensor], *, matrices: str = "int8") -> Any:
    """A float32 graph with its convolutions and matrices in INT8 (QDQ: activations uint8, weights int8 per channel).

    images: those of the calibration, (1,3,H,W) each. The patch embedding and the last convolution stay float32, because
    their errors affect the whole map (ours). So do the outputs of matrix products, whose rounding would double the
    noise, and whose consumers are float32 anyway; attention's products, of two activations, are not quantized at
    all. matrices: "int8"; or "weights": only the weights of matrices and convolutions are in eight bits, because INT8's
    loss comes from activations, where a few values are many times larger than the rest and determine the step. Nothing
    is calibrated then, and everything is computed in float32.
    """
    if matrices not in ("int8", "weights"):
        raise ValueError(f'matrices must be "int8" or "weights", not {matrices!r}')
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{i}"
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    excluded = [convolutions[0], convolutions[-1]]
    if matrices == "weights":
        copied = copy.deepcopy(model)
        _eight_bit_weights(copied, excluded)
        return copied
    onnx, quantization = optional("onnx"), optional("onnxruntime.quantization")
    sized = iter([{model.graph.input[0].name: image.numpy()} for image in images])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def get_next(self) -> Any:
            return next(sized, None)

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
                nodes_to_exclude=excluded,
                extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
            )
        return onnx.load(after)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence onnxruntime's advice, on the root logger, of a preparation that a traced graph does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _eight_bit_weights(model: Any, whole: Sequence[str]) -> None:
    """Store every right-hand matrix (in, out) as int8, in place, with a scale for BLOCK rows of a column; and every
    convolution's kernel (out, in, h, w), with a scale for each output. Nodes named in `whole` are left out.

    A Cast and a Mul, not a DequantizeLinear: with that onnxruntime was off by .034, of which weights and convolutions
    explain .014, as if it rounded the product's activations after all (inferred, not seen in its graph).
    """
    onnx = optional("onnx")
    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    nodes: list[Any] = []
    converted: dict[str, str] = {}

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
            input_names, out = [f"{name}:{part}" for part in inputs], f"{name}:{key}"
            nodes.append(onnx.helper.make_node(op, input_names, [out], name=out, **options))
        return f"{name}:single"

    for node in graph.node:
        shrinks = {"MatMul": 2, "Conv": 4}.get(node.op_type) if node.name not in whole else None
        name = node.input[1] if shrinks else ""
        if name in stored and len(stored[name].dims) == shrinks:
            converted[name] = converted.get(name) or weight(name)
            node.input[1] = converted[name]
        nodes.append(node)
    _set_nodes(graph, nodes)
