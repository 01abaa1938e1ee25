"""The verb export: a student in another precision, with another card, as a graph; checked before it takes its place."""

from __future__ import annotations

from pathlib import Path

import torch

from distill.app.card_scores import scored
from distill.app.console import say
from distill.students import checkpoint, export
from distill.students.modelcard import read_card_file
from distill.teachers import revision_of


def run_export(
    folder: Path,
    out: Path,
    *,
    overwrite: bool = False,
    bits: int = 32,
    card: Path | None = None,
    encoder_weights: str | None = None,
    onnx: bool = False,
    program: bool = False,
) -> Path:
    """Writes the student in `folder` to `out`: another precision, another card, the same outputs.

    overwrite: another student in `out` is replaced. bits: 32, 16 (matrices in float16) or 4 (large ones in four bits).
    card: a TOML file of plain values instead of the student's own card. encoder_weights: for a student whose frozen
    encoder was left out, and is left out again. onnx, program: also as model.onnx, model.pt2. All is written aside,
    read back, compared, and only then put in place.
    Raises ValueError where outputs differ by more than the precision explains, or are not finite; `out` is as it was.
    """
    if (out / checkpoint.WEIGHTS).is_file() and not overwrite and out.resolve() != folder.resolve():
        raise ValueError(f"{out} holds another student: export to another folder, or replace it with --overwrite")
    student = checkpoint.load(folder, encoder_weights=encoder_weights)
    metadata = read_card_file(card) if card else checkpoint.read_card(folder)
    metadata = scored(folder, revision_of(folder)) | metadata
    metadata.pop(export.PROGRAM, None)  # of an earlier export, which a save takes away
    if program:
        least = export.smallest(student)
        metadata[export.PROGRAM] = f"for images of at least {least} x {least} pixels"
    lines: list[str] = []

    def check(aside: Path) -> None:
        again = checkpoint.load(aside, encoder_weights=encoder_weights)
        off = export.difference(student, again, out)
        if not off <= {32: 1e-5, 16: 1e-2, 4: 0.5}[bits]:
            raise ValueError(f"{out}: not written, for its outputs differ from {folder}'s by {off:.2g} of their spread")
        size = (aside / checkpoint.WEIGHTS).stat().st_size
        lines.append(f"{out}: {size / 1e6:.2f} MB, outputs differ by {off:.1g} of their spread")
        lines.extend(export.write_graphs(again, aside, named=out, onnx=onnx, program=program))

    checkpoint.save(
        student,
        out,
        card=metadata,
        dtype=torch.float32 if bits == 32 else torch.float16,
        bits=4 if bits == 4 else None,
        exclude_frozen_encoder=encoder_weights is not None,
        check=check,
    )
    for line in lines:
        say(line)
    return out
