"""A student as one graph that needs none of this package: torch.export and ONNX, any batch and any image size.

The graph does what `Student.forward` does, padding and cutting included, in operations that no tracer pins to the
example's size. Surprises: rows and columns are picked by index, because a slice makes torch.export compare strides and
keep the comparison as a condition; timm divides DINOv3's rotary positions by a Python float of the grid's size, which
a tracer keeps as a number of the example's, so that the graph would run on every size and be right on one.

The program, not the ONNX file, refuses images of a patch or two (`smallest`): a tracer takes every side for at least
two, and the grid's, or half of it, is a side. Larger images cannot stand in for them, for a ViT sees what was padded.

What is written is read back, run on other sizes and batches than it was traced with, and compared with torch.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.core import files
from distill.students import Student, checkpoint
from distill.students.student import in_metres

ONNX, PROGRAM = checkpoint.EXPORTS
OPSET = 18  # the first whose Resize can antialias, which a learned position table needs
TOLERANCE = 1e-4
_TRACED = (2, 3, 75, 99)  # of no patch's multiple, so that nothing is simplified to "no padding"


class Graph(nn.Module):
    """`Student.forward` for tracers: images (B,3,H,W) float32 in [0,1] to its map (B,H,W), on a copy of the student.

    Raises ValueError where the encoder's rotary positions are of a kind that no size but the example's could have.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        frozen_copy = copy.deepcopy(student).float().cpu().eval().requires_grad_(False)
        rope = getattr(frozen_copy.encoder.backbone, "rope", None)
        if rope is not None:
            frozen_copy.encoder.backbone.rope = _Rotary(rope, frozen_copy.encoder.name)
        self.encoder, self.decoder = frozen_copy.encoder, frozen_copy.decoder
        self.max_depth = student.max_depth

    def forward(self, images: Tensor) -> Tensor:
        """(B,H,W)."""
        height, width = images.shape[-2:]
        patch = self.encoder.patch_size
        rows, columns = (height + patch - 1) // patch * patch, (width + patch - 1) // patch * patch
        top, left = (rows - height) // 2, (columns - width) // 2
        normal = (images - self.encoder.mean) / self.encoder.std
        framed = F.pad(normal, (patch, patch, patch, patch))
        padded = _cut(framed, patch - top, rows, patch - left, columns)
        raw = self.decoder(self.encoder.features(padded))
        raw = F.interpolate(raw, size=(rows, columns), mode="bilinear", align_corners=False)
        return in_metres(_cut(raw, top, height, left, width)[:, 0], self.max_depth)


def _cut(maps: Tensor, top: int, height: int, left: int, width: int) -> Tensor:
    """Rows top.. and columns left.. of (B,C,H,W)."""
    rows = torch.arange(height, device=maps.device) + top
    columns = torch.arange(width, device=maps.device) + left
    return maps.index_select(2, rows).index_select(3, columns)


class _Rotary(nn.Module):
    """timm's DINOv3 rotary positions with the grid's size as a number of the graph."""

    def __init__(self, rope: Any, name: str) -> None:
        super().__init__()
        plain = getattr(rope, "normalize_coords", "") == "separate" and getattr(rope, "grid_indexing", "") == "ij"
        if not plain or rope.grid_offset or not hasattr(rope, "_get_pos_embed_from_coords"):
            raise ValueError(f"{name}: its rotary positions ({type(rope).__name__}) cannot be exported for every size")
        self.rope = rope

    def get_embed(self, shape: tuple[int, int]) -> Tensor:
        """(h*w, 2*head) sines and cosines of a token grid (h, w)."""
        device = self.rope.periods.device
        down, across = (
            (torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side * 2.0 - 1.0 for side in shape
        )
        grid = torch.stack(torch.meshgrid(down, across, indexing="ij"), dim=-1).flatten(0, 1)
        return torch.cat(self.rope._get_pos_embed_from_coords(grid), dim=-1)


def to_program(student: Student) -> torch.export.ExportedProgram:
    """The student as an ExportedProgram of `images` (B,3,H,W) with B, H and W free."""
    free = torch.export.Dim.DYNAMIC
    return torch.export.export(
        Graph(student), (torch.rand(_TRACED),), dynamic_shapes={"images": {0: free, 2: free, 3: free}}, strict=False
    )


def smallest(student: Student) -> int:
    """The least height and width in pixels for which `write_program`'s file is meant: two patches and one pixel."""
    return 2 * int(student.encoder.patch_size) + 1


def write_program(
    student: Student,
    path: str | Path,
    *,
    program: torch.export.ExportedProgram | None = None,
    named: str | Path | None = None,
) -> float:
    """Write the student for `torch.export.load(path).module()` and check it; the largest difference (see `parity`).

    program: of `to_program`, where it is there already. named: what an error calls the file, where `path` is not its
    last place. Raises ValueError where the outputs differ; an older file at `path` then stays.
    """
    path = Path(path)
    with files.writing(path) as new:
        # Open files: torch.export takes the name of no file but a .pt2, and would write it into the archive.
        with new.open("wb") as file:
            torch.export.save(program or to_program(student), file)
        with new.open("rb") as file:
            return parity(student, torch.export.load(file).module(), named or path)


def write_onnx(
    student: Student,
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    program: torch.export.ExportedProgram | None = None,
    named: str | Path | None = None,
) -> float:
    """Write the student as ONNX, in one file, and check it in onnxruntime; the largest difference (see `parity`).

    Input "images" (batch,3,height,width) float32 in [0,1], RGB; output "disparity", or "depth" of a metric student,
    (batch,height,width). metadata: plain values that go into the file. program, named: as for `write_program`. Raises
    ImportError where the extra `export` is not installed, ValueError where the outputs differ; an older file at `path`
    then stays.
    """
    onnx, path = _optional("onnx"), Path(path)
    _optional("onnxscript")
    made = torch.onnx.export(
        program or to_program(student),
        (torch.rand(_TRACED),),
        dynamo=True,
        input_names=["images"],
        output_names=[student.kind.quantity],
        opset_version=OPSET,
        verbose=False,
    )
    assert made is not None
    model = made.model_proto
    for value, names in ((model.graph.input[0], {0: "batch", 2: "height", 3: "width"}), (model.graph.output[0], {})):
        for i, name in (names or {0: "batch", 1: "height", 2: "width"}).items():
            value.type.tensor_type.shape.dim[i].dim_param = name
    del model.graph.value_info[:]  # shapes of inner values, in the tracer's names
    card_text = {
        key: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for key, v in (metadata or {}).items()
    }
    onnx.helper.set_model_props(model, card_text)
    with files.writing(path) as new:
        onnx.save(model, new)
        return parity(student, run_onnx(new, named=named or path), named or path)


def metadata(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a graph should say of itself, from a student's description (distill.students.checkpoint.describe)."""
    card = description["card"]
    card_text = {key: card[key] for key in ("name", "licence", "commercial", "lineage") if key in card}
    output, size = description["output"], description.get("native_size")
    return card_text | {
        "kind": output["kind"],
        "larger_is": output["larger_is"],
        "native_size": size,
        "images": "RGB in [0, 1]",
    }


def write_graphs(student: Student, folder: Path, *, named: Path, onnx: bool, program: bool) -> list[str]:
    """Write the graphs asked for into a student's folder; a line about each. named: the folder's name in them."""
    lines: list[str] = []
    if not onnx and not program:
        return lines
    traced = to_program(student)
    if onnx:
        card_text = metadata(checkpoint.describe(folder))
        off = write_onnx(student, folder / ONNX, metadata=card_text, program=traced, named=named / ONNX)
        size = (folder / ONNX).stat().st_size
        lines.append(f"{named / ONNX}: {size / 1e6:.1f} MB, within {off:.1g} of torch's outputs (of their spread)")
    if program:
        off = write_program(student, folder / PROGRAM, program=traced, named=named / PROGRAM)
        lines.append(f"{named / PROGRAM}: within {off:.1g} of torch's outputs (of their spread)")
    return lines


def run_onnx(path: str | Path, *, named: str | Path | None = None) -> Callable[[Tensor], Tensor]:
    """An exported file as a function from images to maps, on onnxruntime's CPU provider; named: in its errors."""
    runtime = _optional("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    failures = tuple(
        getattr(runtime.capi.onnxruntime_pybind11_state, name)
        for name in ("Fail", "RuntimeException", "InvalidArgument")
    )

    def run(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        except failures as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{named or path}: fails on images {tuple(images.shape)}; do not use it: {reason}"
            ) from error

    return run


def parity(student: Student, exported: Callable[[Tensor], Tensor], path: str | Path) -> float:
    """The largest |exported - torch| over several sizes and batches, in units of the output's spread (max - min).

    The sizes are a multiple of the patch, one pixel more, one less, wide, tall, and the smallest (two patches and one).
    Raises ValueError naming `path` where it is above TOLERANCE, or where an output is not finite.
    """
    frozen_copy = copy.deepcopy(student).float().cpu().eval()
    patch = frozen_copy.encoder.patch_size
    sizes = [
        (1, 5 * patch, 5 * patch),
        (2, 4 * patch + 1, 7 * patch - 1),
        (3, 6 * patch + 3, 3 * patch),
        (1, 2 * patch + 1, 9 * patch),
    ]
    worst = 0.0
    draw = torch.Generator().manual_seed(0)
    for batch, height, width in sizes:
        images = F.interpolate(torch.rand(batch, 3, 8, 8, generator=draw), (height, width), mode="bicubic").clamp(0, 1)
        with torch.no_grad():
            expected, actual = frozen_copy(images), exported(images)
        if actual.shape != expected.shape:
            raise ValueError(f"{path}: gives {tuple(actual.shape)} for images {tuple(images.shape)}; do not use it")
        for whose, values in (("torch's", expected), ("its", actual)):
            if not values.isfinite().all():
                raise ValueError(f"{path}: {whose} outputs are not finite; do not use it")
        spread = (expected.amax() - expected.amin()).clamp(min=1e-12)
        worst = max(worst, float((actual - expected).abs().max() / spread))
    if not worst <= TOLERANCE:
        raise ValueError(f"{path}: differs from torch by {worst:.2g} of the output's spread; do not use it")
    return worst


def difference(before: Student, after: Student, path: str | Path) -> float:
    """The mean |after - before| over a pair of fixed images, in units of before's standard deviation.

    Raises ValueError naming `path`, where `after` lies, if an output of either is not finite.
    """
    images = torch.rand(2, 3, 150, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = before(images), after(images)
    if not expected.isfinite().all():
        raise ValueError(
            f"{path}: not written, for the student's own outputs are not finite; its weights are corrupted"
        )
    if not actual.isfinite().all():
        raise ValueError(f"{path}: not written, for its outputs would not be finite")
    return float((actual - expected).abs().mean() / expected.std().clamp(min=1e-9))


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} is not installed; pip install 'depth-distill[export]' brings it") from error
