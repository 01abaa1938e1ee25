"""A student as an ONNX file: float32, float16 or 8 bits, with the resizing inside on request, or for a browser.

`torch.onnx` traces the student once; all else transforms the resulting graph (onnx_precision, onnx_form). The written
file is read back, run in onnxruntime, and compared with torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.core import crops, files
from distill.core.optional import optional, require
from distill.core.wording import first_line
from distill.students import Student
from distill.students.export import TRACED, difference, parity, to_program
from distill.students.onnx_form import for_browser, with_resize, without_antialias
from distill.students.onnx_precision import to_float16, to_int8

NEEDS = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18  # the first whose Resize can antialias, which a learned position table needs
MAY_DIFFER = {16: 1e-2, 8: 0.5}
"""Largest mean difference from torch, in standard deviations of its map; the quality gate measures what it costs."""


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """Options of an ONNX file.

    bits: 32, 16 (float16 inside, float32 images and maps) or 8 (static INT8, QDQ). with_resize: photo (H,W,3) uint8 in,
    map (H,W) out, the size rule in the graph. browser: no Resize with antialias in the network. crops: images (3,H,W)
    float in [0,1] or uint8 for the calibration of 8 bits. matrices: of 8 bits, "int8" or "weights" (`quantized`).
    """

    bits: int = 32
    with_resize: bool = False
    browser: bool = False
    crops: Sequence[Tensor] = ()
    matrices: str = "int8"


def write_onnx(
    student: Student,
    path: str | Path,
    *,
    options: OnnxOptions | None = None,
    metadata: Mapping[str, Any] | None = None,
    program: torch.export.ExportedProgram | None = None,
    named: str | Path | None = None,
) -> float:
    """Write the student as one ONNX file, check it in onnxruntime, and return the largest difference (see `parity`).

    Input "images" (batch,3,height,width) float32 in [0,1], RGB; output "disparity", or "depth" of a metric student,
    (batch,height,width); options: other forms. For 16 and 8 bits the mean difference is checked (`difference`).
    metadata: plain values that go into the file. program: of `to_program`, if already computed. named: the file's name
    in errors, if `path` is temporary. Raises ImportError if the extra `export` is not installed, ValueError if the
    outputs differ; an older file at `path` is then kept.
    """
    require(NEEDS)
    options, path, named = options or OnnxOptions(), Path(path), named or path
    if options.bits == 8 and not options.crops:
        raise ValueError(f"{named}: 8 bits need images to calibrate on")
    if (options.with_resize or options.browser) and not student.native_size:
        raise ValueError(f"{named}: the student has no native_size, so it has no size rule to put in the graph")
    if options.browser:
        student, program = for_browser(student), None
    model = traced(student, program)
    if options.browser:
        without_antialias(model)
    onnx = optional("onnx")
    with files.writing(path) as new:
        onnx.save(model, new)
        core = run_onnx(new, named=named)
        worst = parity(student, core, named, sizes=_sizes(student) if options.browser else None)
        if options.bits != 32:
            if options.bits == 16:
                model = to_float16(model, _samples(student))
            else:
                calibration = [_sized(student, image) for image in options.crops]
                model = to_int8(model, calibration, matrices=options.matrices)
            onnx.save(model, new)
            # Eight bits are calibrated on photographs, so noise would not be representative.
            probes = [_sized(student, image) for image in options.crops[:4]] or _samples(student)[:2]
            core = run_onnx(new, named=named)
            worst = _close(student, core, named, MAY_DIFFER[options.bits], probes)
        if options.with_resize:
            with_resize(model, student)
        texts = metadata or {}
        onnx.helper.set_model_props(
            model, {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in texts.items()}
        )
        onnx.save(model, new)
        if options.with_resize:
            limit = 1e-3 if options.bits == 32 else 1e-2
            # In INT8, an input that is off by 1e-6 moves codes, and the map by as much as eight bits do.
            limit = max(limit, 2 * worst) if options.bits == 8 else limit
            worst = max(worst, _check_resize(student, core, new, named, limit))
        return worst


def traced(student: Student, program: torch.export.ExportedProgram | None = None) -> Any:
    """The student as an onnx ModelProto in float32, any batch, any size."""
    exported = torch.onnx.export(
        program or to_program(student),
        (torch.rand(TRACED),),
        dynamo=True,
        input_names=["images"],
        output_names=[student.kind.quantity],
        opset_version=OPSET,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    for value, names in ((model.graph.input[0], {0: "batch", 2: "height", 3: "width"}), (model.graph.output[0], {})):
        for i, name in (names or {0: "batch", 1: "height", 2: "width"}).items():
            value.type.tensor_type.shape.dim[i].dim_param = name
    del model.graph.value_info[:]  # shapes of inner values, with the tracer's names
    for node in model.graph.node:
        del node.metadata_props[:]  # source locations on this machine
    return model


def metadata(description: Mapping[str, Any], *, with_resize: bool = False) -> dict[str, Any]:
    """Metadata for a graph, from a student's description (distill.students.checkpoint.describe)."""
    card = description["card"]
    card_text = {key: card[key] for key in ("name", "licence", "commercial", "lineage") if key in card}
    output, size = description["output"], description.get("native_size")
    metric = output["kind"].startswith("metric")
    max_depth = description["spec"].get("max_depth")
    camera = f"; {output['camera']}" if "camera" in output else ""
    rule = (
        f"short side to {size}, aspect kept, each side to the nearest multiple of {description['images']['multiple']}"
    )
    return card_text | {
        "kind": output["kind"],
        "larger_is": output["larger_is"],
        "native_size": size,
        "multiple": description["images"]["multiple"],
        "images": "uint8 RGB, 0 to 255, (height, width, 3)" if with_resize else "RGB in [0, 1]",
        "size_rule": "in the graph" if with_resize else f"{rule}; bilinear with antialias" if size else "none",
        "values": f"metres, 0 to {max_depth}{camera}" if metric else "scale and shift unknown; no unit, no fixed range",
    }


def run_onnx(path: str | Path, *, named: str | Path | None = None) -> Callable[[Tensor], Tensor]:
    """An exported file as a function from its input to maps, on onnxruntime's CPU provider; named: for errors."""
    runtime = optional("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    failures = tuple(
        getattr(runtime.capi.onnxruntime_pybind11_state, name)
        for name in ("Fail", "RuntimeException", "InvalidArgument")
    )
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {name: images.numpy()})[0])
        except failures as error:
            raise ValueError(
                f"{named or path}: fails on images {tuple(images.shape)}; do not use it: {first_line(error)}"
            ) from error

    return run


# --- checks -----------------------------------------------------------------------------------------------------------


def at_native(student: Student, run: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """(H,W) map of an image (3,H,W) by the size rule with the network `run`, as in `distill predict`."""
    values = run(_sized(student, image))
    return crops.resize(values[:, None], *image.shape[-2:])[0, 0]


def _sized(student: Student, image: Tensor) -> Tensor:
    """An image (3,H,W), uint8 or in [0,1], as (1,3,h,w) by the size rule; at its own size without a native one."""
    unit = image[None].float() / 255.0 if image.dtype == torch.uint8 else image[None]
    size = student.native_size or min(image.shape[-2:])
    height, width = image.shape[-2:]
    return crops.resize(unit, *crops.native_shape(height, width, size, student.encoder.patch_size))


def _sizes(student: Student) -> list[tuple[int, int, int]]:
    """(batch, height, width) that the size rule gives for a square, a wide and a tall image."""
    size, multiple = student.native_size or 224, student.encoder.patch_size
    return [
        (batch, *crops.native_shape(height, width, size, multiple))
        for batch, height, width in ((1, 1, 1), (2, 3, 4), (1, 16, 9))
    ]


def change_by_table(student: Student) -> float:
    """How much the resized position table of `for_browser` changes the map of a 3:4 image, in units of its spread."""
    size = _sizes(student)[1][1:]
    images = torch.nn.functional.interpolate(_samples(student)[0], size, mode="bilinear")
    with torch.no_grad():
        before, after = student(images), for_browser(student)(images)
    return float((after - before).abs().max() / (before.amax() - before.amin()).clamp(min=1e-12))


def _samples(student: Student) -> list[Tensor]:
    """Smooth and noisy images for measuring magnitudes and differences."""
    rng = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8, generator=rng), (150, 200), mode="bicubic")
    images = [smooth[0].clamp(0, 1), torch.rand(3, 200, 150, generator=rng), torch.zeros(3, 64, 64)]
    return [_sized(student, image) for image in images]


def _close(
    student: Student, run: Callable[[Tensor], Tensor], path: str | Path, limit: float, images: Sequence[Tensor]
) -> float:
    worst = difference(student, run, path, images=images)
    if not worst <= limit:
        raise ValueError(f"{path}: differs from torch by {worst:.2g} of the map's deviation; do not use it")
    return worst


def _check_resize(
    student: Student, core: Callable[[Tensor], Tensor], path: Path, named: str | Path, limit: float
) -> float:
    """The mean difference from `core`, the network without its resize, resized as `distill predict` does."""
    run = run_onnx(path, named=named)
    rng = torch.Generator().manual_seed(0)
    worst = 0.0
    for height, width in ((90, 120), (333, 217)):
        photo = torch.randint(0, 256, (1, 3, 9, 9), generator=rng).float()
        photo = torch.nn.functional.interpolate(photo, (height, width), mode="bilinear")[0].round().to(torch.uint8)
        expected = at_native(student, core, photo)
        actual = run(photo.permute(1, 2, 0).contiguous())
        worst = max(worst, float((actual - expected).abs().mean() / expected.std().clamp(min=1e-9)))
    if not worst <= limit:
        raise ValueError(f"{named}: with its resize it differs by {worst:.2g} of the map's deviation; do not use it")
    return worst
