"""What `run_export` hands to the parts that write: precision, card, crops, gate, and the forms of the graph."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from distill.app import cli
from distill.app import export as verb
from distill.app.gate import Gate
from distill.core.depth import Kind
from distill.students import checkpoint
from tests.students.test_export import small


@pytest.mark.parametrize(("bits", "stored", "most"), [(32, "float32", 1e-5), (16, "float16", 1e-2), (4, "int4", 0.5)])
def test_a_precision_is_stored_judged_and_scored(tmp_path, monkeypatch, bits, stored, most):
    checkpoint.save(small(), tmp_path / "s")
    gates = []
    monkeypatch.setattr(verb, "_gate", lambda *given: gates.append(given) or "delta1")
    options = verb.ExportOptions(bits=bits, gate=Gate())
    monkeypatch.setattr(verb.export, "difference", lambda *given: 1.01 * most)
    with pytest.raises(ValueError, match="not written: its outputs differ"):
        verb.run_export(tmp_path / "s", tmp_path / "o", options=options)
    assert not gates and not (tmp_path / "o").exists()
    monkeypatch.setattr(verb.export, "difference", lambda *given: 0.99 * most)
    verb.run_export(tmp_path / "s", tmp_path / "o", options=options)
    assert checkpoint.describe(tmp_path / "o")["weights"]["dtype"] == stored
    assert len(gates) == (bits != 32)  # float32 loses nothing


def test_a_card_keeps_what_it_says_and_loses_what_was_said_of_older_graphs(tmp_path, monkeypatch):
    card = {"name": "x", "scores": [{"abs_rel": "card's"}], "model.onnx": "float16", "model.pt2": "for images of ..."}
    monkeypatch.setattr(verb, "scored", lambda *given: {"scores": [{"abs_rel": "run's"}], "cost": [{"GFLOPs": "3"}]})
    checkpoint.save(small(), tmp_path / "s", card=card)
    verb.run_export(tmp_path / "s", tmp_path / "o")
    expected = {"name": "x", "scores": [{"abs_rel": "card's"}], "cost": [{"GFLOPs": "3"}]}
    assert checkpoint.read_card(tmp_path / "o") == expected


def test_four_bits_are_calibrated_on_their_own_crops_and_a_frozen_encoder_stays_out(tmp_path, monkeypatch):
    checkpoint.save(small(), tmp_path / "s")
    student, saved = checkpoint.load(tmp_path / "s"), []
    monkeypatch.setattr(verb, "calibration", lambda labels: [f"crop of {labels}"])
    monkeypatch.setattr(verb.checkpoint, "load", lambda folder, **given: student)
    monkeypatch.setattr(verb.checkpoint, "save", lambda *given, **options: saved.append(options))
    verb.run_export(
        tmp_path / "s",
        tmp_path / "o",
        options=verb.ExportOptions(bits=4, calibrate="A", int8="B"),
        encoder_weights="vit.pth",
    )
    verb.run_export(tmp_path / "s", tmp_path / "o")
    asked = [(one["bits"], one["calibration"], one["exclude_frozen_encoder"]) for one in saved]
    assert asked == [(4, ["crop of A"], True), (None, [], False)]


def test_a_calibration_would_replace_a_students_own_four_bits(tmp_path, capsys):
    own = str(tmp_path / "s")
    checkpoint.save(small(), own, bits=4)
    assert cli.main(["export", own, own, "--bits", "4", "--calibrate", "labels"]) == 2
    assert "whose weights --bits 4 would replace" in " ".join(capsys.readouterr().err.split())


def test_the_forms_of_a_graph_are_those_that_were_asked(tmp_path, monkeypatch):
    forms, gates = [], []

    def write(student, path, *, options, **_):
        forms.append(options)
        path.write_bytes(b"graph")
        return 0.0

    for name, value in (("write_onnx", write), ("run_onnx", lambda *_, **__: None), ("metadata", lambda *_, **__: {})):
        monkeypatch.setattr(verb.onnx_graph, name, value)
    monkeypatch.setattr(verb.onnx_graph, "change_by_table", lambda student: 0.02)
    monkeypatch.setattr(verb.checkpoint, "describe", lambda folder: {})
    monkeypatch.setattr(verb.export, "to_program", lambda student: None)
    monkeypatch.setattr(verb, "_gate", lambda student, network, options, out: gates.append(options.gate) or "delta1")
    for options, bits, resize, browser in (
        (verb.ExportOptions(onnx=True, with_resize=True), 32, True, False),
        (verb.ExportOptions(onnx=True, browser=True, bits=16), 16, False, True),
        (verb.ExportOptions(onnx=True, int8="LABELS"), 8, False, False),
    ):
        lines = verb._write_graphs(None, None, tmp_path, tmp_path / "o", options, ["crop"])
        form = forms.pop()
        assert (form.bits, form.with_resize, form.browser, form.crops) == (bits, resize, browser, ["crop"])
        assert ("changes a 3:4 image's map by 0.02" in lines[0]) is browser
    assert gates == [Gate()], "INT8 has to pass one, whether that was asked or not"
    page = (tmp_path / "index.html").read_text()
    assert "__ANCHORS__" not in page and "[[" in page.partition("ANCHORS")[2]


def red(is_photo, given):
    """A "network" that takes a photo (H,W,3) uint8, or the student's images."""
    return given.float()[..., 0] if is_photo else given[:, 0]


def test_the_gate_shows_each_network_what_it_takes():
    seen = {}
    student = small()
    student.native_size, student.forward = 56, lambda images: images[:, 0]
    gate = SimpleNamespace(check=lambda before, after, kind, out: seen.update(before=before, after=after, kind=kind))
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    for resize in (True, False):
        options = verb.ExportOptions(with_resize=resize, gate=gate)
        verb._gate(student, partial(red, resize), options, "out")
        found = seen["after"](image)
        expected = (image[0] * 255).round() if resize else seen["before"](image)
        torch.testing.assert_close(found, expected)
        assert found.shape == (5, 7)
    assert seen["kind"] is Kind.AFFINE_DISPARITY
    student.max_depth = 20.0
    verb._gate(student, student, options, "out")
    assert seen["kind"] is Kind.METRIC_DEPTH
    student.canonical_focal = 300.0  # the graph has no focal length: each image's scale is fitted
    verb._gate(student, student, options, "out")
    assert seen["kind"] is Kind.SCALE_DEPTH


def test_a_native_folder_has_its_card_and_takes_nobodys_place(tmp_path, monkeypatch):
    student = small()
    student.max_depth, student.canonical_focal, student.native_size = 20.0, 300.0, 56
    monkeypatch.setattr(verb.to_transformers, "write", lambda *given, **options: "DepthAnything")
    options = verb.ExportOptions(transformers="native")
    verb._write_native(student, tmp_path / "o", options, {"name": "x"})
    page = (tmp_path / "o" / "README.md").read_text()
    assert "It predicts depth in metres, larger is farther. Made for images whose short side is 56 pixels." in page
    assert "for a focal length of 300 pixels" in page
    (tmp_path / "o" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds notes.txt; give the export a folder of its own"):
        verb._write_native(student, tmp_path / "o", options, {})
    for other in ({"bits": 16}, {"onnx": True}, {"program": True}):
        with pytest.raises(ValueError, match="--transformers native writes a folder of its own, in 32 bits"):
            verb._write_native(student, tmp_path / "p", verb.ExportOptions(transformers="native", **other), {})
