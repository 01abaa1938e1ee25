"""A student as one graph that does not need this package: torch.export and ONNX, any batch and any image size.

The graph computes `Student.forward`, padding and cropping included, in operations that tracing does not specialise to
the example's size. Surprises: rows and columns are selected by index, because a slice makes torch.export compare
strides and keep the comparison as a guard; timm divides DINOv3's rotary positions by a Python float of the grid's size,
which tracing turns into a constant, so that the graph would run on every size and be right only on the example's.

The program, unlike the ONNX file, rejects images of one or two patches (`smallest`): tracing assumes that every
dimension is at least two, and the grid, or half of it, is one. Padding such images would not help: the ViT sees it.

Each written file is read back, run on other sizes and batches than the traced ones, and compared with torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.core import files
from distill.students import Student
from distill.students.student import in_metres

TOLERANCE = 1e-4
TRACED = (2, 3, 75, 99)  # no multiples of a patch, so that padding is not traced away


class Graph(nn.Module):
    """`Student.forward` for tracers: images (B,3,H,W) float32 in [0,1] to its map (B,H,W), on a copy of the student.

    Raises ValueError if the encoder's rotary positions cannot be exported for every size.
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
    """timm's DINOv3 rotary positions with a symbolic grid size."""

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
        Graph(student), (torch.rand(TRACED),), dynamic_shapes={"images": {0: free, 2: free, 3: free}}, strict=False
    )


def smallest(student: Student) -> int:
    """The smallest height and width in pixels that `write_program`'s file supports: two patches and one pixel."""
    return 2 * int(student.encoder.patch_size) + 1


def write_program(
    student: Student,
    path: str | Path,
    *,
    program: torch.export.ExportedProgram | None = None,
    named: str | Path | None = None,
) -> float:
    """Write the student for `torch.export.load(path).module()`, check it, and return the largest difference (`parity`).

    program: of `to_program`, if already computed. named: the file's name in errors, if `path` is temporary. Raises
    ValueError if the outputs differ; an older file at `path` is then kept.
    """
    path = Path(path)
    with files.writing(path) as new:
        # Open files, because torch.export accepts only names ending in .pt2, and writes the name into the archive.
        with new.open("wb") as file:
            torch.export.save(program or to_program(student), file)
        with new.open("rb") as file:
            return parity(student, torch.export.load(file).module(), named or path)


def parity(
    student: Student,
    exported: Callable[[Tensor], Tensor],
    path: str | Path,
    *,
    sizes: Sequence[tuple[int, int, int]] | None = None,
) -> float:
    """The largest |exported - torch| over several sizes and batches, in units of the output's spread (max - min).

    sizes: (batch, height, width) each; by default a multiple of the patch, one pixel more, one less, wide, tall, and
    the smallest (two patches and one).
    Raises ValueError naming `path` if it is above TOLERANCE, or if an output is not finite.
    """
    frozen_copy = copy.deepcopy(student).float().cpu().eval()
    patch = frozen_copy.encoder.patch_size
    sizes = sizes or [
        (1, 5 * patch, 5 * patch),
        (2, 4 * patch + 1, 7 * patch - 1),
        (3, 6 * patch + 3, 3 * patch),
        (1, 2 * patch + 1, 9 * patch),
    ]
    worst = 0.0
    rng = torch.Generator().manual_seed(0)
    for batch, height, width in sizes:
        images = F.interpolate(torch.rand(batch, 3, 8, 8, generator=rng), (height, width), mode="bicubic").clamp(0, 1)
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


def difference(
    before: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor],
    path: str | Path,
    *,
    images: Sequence[Tensor] | None = None,
) -> float:
    """The mean |after - before| on fixed images, in units of before's standard deviation; the largest of all images.

    images: (B,3,H,W) each. Raises ValueError naming `path`, where `after` lies, if an output of either is not finite.
    """
    worst = 0.0
    for batch in images or [torch.rand(2, 3, 150, 200, generator=torch.Generator().manual_seed(0))]:
        with torch.no_grad():
            expected, actual = before(batch), after(batch)
        if not expected.isfinite().all():
            raise ValueError(
                f"{path}: not written, for the student's own outputs are not finite; its weights are corrupted"
            )
        if not actual.isfinite().all():
            raise ValueError(f"{path}: not written, for its outputs would not be finite")
        worst = max(worst, float((actual - expected).abs().mean() / expected.std().clamp(min=1e-9)))
    return worst


_FLAT = 0.05


def flatness(student: Callable[[Tensor], Tensor]) -> str:
    """Text for an error message if the map hardly varies on a fixed image; else "".

    After a few training steps a decoder's map is nearly constant. float16 keeps three digits of that level, and the
    variation lies below them, so that a large relative difference does not mean that float16 failed.
    """
    with torch.no_grad():
        values = student(torch.rand(2, 3, 150, 200, generator=torch.Generator().manual_seed(0)))
    level, deviation = float(values.mean().abs()), float(values.std())
    if deviation > _FLAT * level:
        return ""
    detail = f"its map deviates by {deviation:.2g} from a level of {level:.2g}"
    return f", which is small: {detail}; train it for longer, or keep 32 bits"
