"""The export command: a student in another precision, with another card, or as a graph, checked before it is stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.app.card_scores import scored
from distill.app.console import note, say
from distill.app.gate import Gate, QualityError, calibration
from distill.core import files
from distill.core.depth import Kind
from distill.core.private import without_places
from distill.eval.reports.figures import NEARNESS
from distill.students import Student, checkpoint, export, onnx_graph, to_transformers
from distill.students.modelcard import model_card, read_card_file
from distill.students.onnx_graph import OnnxOptions
from distill.teachers import revision_of

_WORDS = {32: "float32", 16: "float16", "int8": "INT8", "weights": "weights in eight bits, computed in float32"}
_STORED = {16: "float16", 4: "int4"}
ONNX, PROGRAM, PAGE = "model.onnx", "model.pt2", "index.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What is written beside a student, and how.

    bits: 32, 16 (matrices in float16, the ONNX graph too) or 4 (large ones in four bits). calibrate: a labels folder
    on whose crops the four-bit weights should change the outputs least. onnx, program: also as model.onnx, model.pt2.
    int8: a labels folder on whose crops the ONNX graph is calibrated for INT8. with_resize, browser: forms of the ONNX
    graph (students.onnx_graph.OnnxOptions); browser also writes index.html. transformers: "", "auto", "native" or
    "code" (students.to_transformers). gate: what outputs are scored on, before and after.
    """

    bits: int = 32
    calibrate: str = ""
    onnx: bool = False
    program: bool = False
    int8: str = ""
    with_resize: bool = False
    browser: bool = False
    transformers: str = ""
    gate: Gate | None = None


def run_export(
    folder: Path,
    out: Path,
    *,
    options: ExportOptions | None = None,
    overwrite: bool = False,
    card: Path | None = None,
    encoder_weights: str | None = None,
) -> Path:
    """Writes the student in `folder` to `out`: another precision, another card, the same outputs.

    overwrite: replace what `out` holds. card: a TOML file of plain values instead of the student's own card; of local
    paths in either only names stay. encoder_weights: of a student that is stored without its frozen encoder; the export
    leaves it out too. Everything is written to a temporary folder, read back and compared before it is put in place.
    Raises ValueError if outputs differ by more than the precision explains, are not finite, or lose too much at the
    gate; `out` is then unchanged.
    """
    options = options or ExportOptions()
    if not overwrite:
        _check_not_replaced(folder, out, options)
    crops = calibration(options.int8) if options.int8 else []
    four_bit_crops = calibration(options.calibrate) if options.calibrate else []
    student = checkpoint.load(folder, encoder_weights=encoder_weights)
    metadata = read_card_file(card) if card else checkpoint.read_card(folder)
    metadata = scored(folder, revision_of(folder)) | metadata
    metadata = {key: value for key, value in metadata.items() if key not in (ONNX, PROGRAM)}  # of an earlier export
    metadata = without_places(metadata) | _graph_entries(student, options)  # an export is what others are given
    if options.transformers == "native" or (options.transformers == "auto" and to_transformers.native(student)):
        if out.resolve() == folder.resolve() and not overwrite:
            raise ValueError(_replace_message(out, "--transformers native"))
        return _write_native(student, out, options, metadata)
    if options.transformers:
        _check_whole(out, options, encoder_weights)
    lines: list[str] = []

    def check(aside: Path) -> None:
        reloaded = checkpoint.load(aside, encoder_weights=encoder_weights)
        deviation = export.difference(student, reloaded, out)
        if not deviation <= {32: 1e-5, 16: 1e-2, 4: 0.5}[options.bits]:
            reason = export.flatness(student)
            raise ValueError(
                f"{out}: not written: its outputs differ from {folder}'s by {deviation:.2g} of their spread{reason}"
            )
        size = (aside / checkpoint.WEIGHTS).stat().st_size
        line = f"{out}: {size / 1e6:.2f} MB, outputs differ by {deviation:.1g} of their spread"
        if options.gate and options.bits != 32:
            line += f"; {_gate(student, reloaded, options, out)}"
        lines.append(line)
        lines.extend(_write_graphs(student, reloaded, aside, out, options, crops))
        if options.transformers:
            lines.append(f"{out}: {to_transformers.write(reloaded, aside, how='code', named=out)}")

    checkpoint.save(
        student,
        out,
        card=metadata,
        dtype=torch.float32 if options.bits == 32 else torch.float16,
        bits=4 if options.bits == 4 else None,
        calibration=four_bit_crops,
        exclude_frozen_encoder=encoder_weights is not None,
        check=check,
    )
    for line in lines:
        say(line)
    return out


def _check_not_replaced(folder: Path, out: Path, options: ExportOptions) -> None:
    """Raises ValueError if `out` holds another student, or this one's weights, which 16 or 4 bits would change."""
    if not (out / checkpoint.WEIGHTS).is_file():
        return
    if out.resolve() != folder.resolve():
        raise ValueError(f"{out} holds a student already: export to another folder, or replace it with --overwrite")
    stored = checkpoint.describe(folder)["weights"].get("dtype")
    if options.bits != 32 and (stored != _STORED[options.bits] or options.calibrate):
        raise ValueError(_replace_message(out, f"--bits {options.bits}"))


def _check_whole(out: Path, options: ExportOptions, encoder_weights: str | None) -> None:
    """Raises ValueError if transformers could not read the weights that will be stored."""
    if options.bits == 4:
        raise ValueError(f"{out}: transformers reads weights in 32 or 16 bits: leave out --bits 4")
    if encoder_weights:
        raise ValueError(f"{out}: transformers reads whole students; export it again with its encoder")


def _replace_message(out: Path, why: str) -> str:
    return (
        f"{out} is the student's own folder, whose weights {why} would replace: export to another folder, or replace "
        "them with --overwrite"
    )


def _graph_entries(student: Student, options: ExportOptions) -> dict[str, str]:
    """The card's entries for the graphs beside the student."""
    rows = {}
    if options.onnx:
        size, multiple = student.native_size, student.encoder.patch_size
        precision = "float16" if options.bits == 16 else "float32"
        if options.int8:
            precision = "eight bits (INT8, or the weights alone where the gate refused that; `precision` in the file)"
        how = "takes the photo, uint8 H x W x 3, and gives its map H x W"
        if not options.with_resize:
            how = f"resize first: short side to {size}, each side the nearest multiple of {multiple}, antialias"
        rows[ONNX] = f"{precision}; {how}" if size else precision
    if options.program:
        least = export.smallest(student)
        rows[PROGRAM] = f"for images of at least {least} x {least} pixels"
    return rows


def _write_graphs(
    student: Student, again: Student, aside: Path, out: Path, options: ExportOptions, crops: list[Tensor]
) -> list[str]:
    """Writes the requested graphs into a student's folder; returns a line for each. again: the student as stored."""
    lines: list[str] = []
    program = export.to_program(again) if options.program or (options.onnx and not options.browser) else None
    if options.onnx:
        bits = 8 if options.int8 else 16 if options.bits == 16 else 32
        form = OnnxOptions(bits=bits, with_resize=options.with_resize, browser=options.browser, crops=crops)
        properties = onnx_graph.metadata(checkpoint.describe(aside), with_resize=options.with_resize)
        path, named = aside / ONNX, out / ONNX
        gate = options.gate or (Gate() if bits == 8 else None)

        def write(form: OnnxOptions) -> str:
            about = properties | {"precision": _WORDS[form.matrices if bits == 8 else bits]}
            off = onnx_graph.write_onnx(again, path, options=form, metadata=about, program=program, named=named)
            line = f"{named}: {path.stat().st_size / 1e6:.1f} MB, within {off:.1g} of torch's outputs (of their spread)"
            if form.browser and (change := onnx_graph.change_by_table(again)) > export.TOLERANCE:
                line += f" with the position table of the native size, which changes a 3:4 image's map by {change:.1g}"
            if gate:
                network = onnx_graph.run_onnx(path, named=named)
                line += f"; {_gate(student, network, replace(options, gate=gate), out)}"
            return line

        try:
            lines.append(write(form))
        except QualityError as error:
            if bits != 8:
                raise
            note(f"the graph in INT8 is refused ({error}); now only its weights in eight bits, computed in float32")
            lines.append(write(replace(form, matrices="weights")))
    if options.browser:
        page = (Path(onnx_graph.__file__).parent / "demo.html").read_text(encoding="utf-8")
        page = page.replace("__ANCHORS__", json.dumps(NEARNESS))
        (aside / PAGE).write_text(page, encoding="utf-8")
        serve = f"python -m http.server --bind 127.0.0.1, then open http://localhost:8000/{out.resolve().name}/"
        lines.append(f"{out / PAGE}: in the folder above, npm install onnxruntime-web and {serve}")
    if options.program:
        off = export.write_program(again, aside / PROGRAM, program=program, named=out / PROGRAM)
        lines.append(f"{out / PROGRAM}: within {off:.1g} of torch's outputs (of their spread)")
    return lines


def _gate(student: Student, network: Callable[[Tensor], Tensor], options: ExportOptions, out: Path) -> str:
    """The gate's line for a network that takes the student's input, or a photo if the graph resizes."""

    def before(image: Tensor) -> Tensor:
        return onnx_graph.at_native(student, student, image)

    def after(image: Tensor) -> Tensor:
        if options.with_resize and not isinstance(network, Student):
            return network((image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous())
        return onnx_graph.at_native(student, network, image)

    assert options.gate is not None
    with torch.no_grad():
        # The graph has no focal length: for canonical depth the gate fits each image's scale.
        kind = Kind.SCALE_DEPTH if student.canonical_focal else student.kind
        return options.gate.check(before, after, kind, out)


def _write_native(student: Student, out: Path, options: ExportOptions, card: Mapping[str, Any]) -> Path:
    """Writes transformers' own class to a folder of its own, which cannot hold graphs or other precisions."""
    if options.onnx or options.program or options.bits != 32:
        raise ValueError(
            f"{out}: --transformers native writes a folder of its own, in 32 bits: export it without --onnx, "
            "--program and --bits, or use --transformers code"
        )
    known = {checkpoint.WEIGHTS, checkpoint.DESCRIPTION, checkpoint.CARD, *checkpoint.EXPORTS}
    if out.exists() and (others := sorted(p.name for p in out.iterdir() if p.name not in known)):
        raise FileExistsError(f"{out} holds {others[0]}; give the export a folder of its own")
    with files.writing_folder(out) as aside:
        line = to_transformers.write(student, aside, how="native", named=out)
        about: dict[str, Any] = {"native_size": student.native_size, "kind": student.kind}
        about["canonical_focal"] = student.canonical_focal
        page = model_card(out.name, card, library="transformers", **about)
        (aside / checkpoint.CARD).write_text(page, encoding="utf-8")
    say(f"{out}: {line}")
    return out
