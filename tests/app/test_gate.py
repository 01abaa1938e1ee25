"""The quality gate: a loss of more than a tenth of a point is refused, by name and in points."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill.app import export as verb
from distill.app import gate
from distill.app.cli import main
from distill.core.depth import DepthMap, Kind
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.protocol import Protocol

PROTOCOL = Protocol(benchmark="ramp", max_depth=100.0)


def ramp(n):
    """Disparity that rises along the rows, and its depth in metres."""
    disparity = torch.linspace(0.1, 1.0, 400).reshape(1, 20, 20) + 0.01 * n
    truth = DepthMap(1 / disparity, torch.ones(1, 20, 20, dtype=torch.bool), Kind.METRIC_DEPTH)
    return BenchmarkSample(f"{n}", f"{n}.npy", lambda: disparity.expand(3, -1, -1), lambda: truth)


@pytest.fixture
def samples(monkeypatch):
    made = [ramp(n) for n in range(3)]
    monkeypatch.setattr(gate.Gate, "samples", lambda self: (made, PROTOCOL))
    return made


def exact(image):
    return 3 * image[0] + 1


def worse(image):
    out = exact(image).clone()
    out[:, :2] += 3.0  # a tenth of the pixels
    return out


def test_delta1_is_one_for_the_truth_itself(samples):
    assert gate.delta1(exact, samples, PROTOCOL, Kind.AFFINE_DISPARITY) == 1.0


def test_an_image_without_truth_counts_for_nobody_and_none_is_a_line(samples):
    plain = samples[0].truth()
    nowhere = DepthMap(plain.values, torch.zeros_like(plain.valid), plain.kind)
    samples.append(replace(samples[0], truth=lambda: nowhere))
    assert gate.delta1(exact, samples, PROTOCOL, Kind.AFFINE_DISPARITY) == 1.0
    for none in (samples[-1:], []):
        with pytest.raises(ValueError, match="none of the gate's images has valid ground truth"):
            gate.delta1(exact, none, PROTOCOL, Kind.AFFINE_DISPARITY)


def test_a_loss_is_refused_and_allowed_where_that_is_asked(samples):
    line = gate.Gate("ramp").check(exact, exact, Kind.AFFINE_DISPARITY, "out")
    assert line == "delta1 1.0000, float32 1.0000 (ramp, 3 images)"
    with pytest.raises(
        ValueError, match=r"out: not written: delta1 0\.\d+, float32 1\.0000 .* is a loss of \d\d\.\d\d points, more"
    ):
        gate.Gate("ramp").check(exact, worse, Kind.AFFINE_DISPARITY, "out")
    assert "delta1 0." in gate.Gate("ramp", allow_drop=True).check(exact, worse, Kind.AFFINE_DISPARITY, "out")
    with pytest.raises(ValueError, match="NaN"):  # a map that is not finite is no map
        gate.Gate("ramp").check(exact, lambda image: exact(image) * torch.nan, Kind.AFFINE_DISPARITY, "out")


def test_a_tenth_of_a_point_is_the_most_that_may_be_lost(monkeypatch):
    monkeypatch.setattr(gate.Gate, "samples", lambda self: ([ramp(0)], PROTOCOL))
    scores = {"before": 0.95, "just": 0.9491, "more": 0.9489, "none": float("nan")}
    monkeypatch.setattr(gate, "delta1", lambda run, *_: scores[run])
    gate.Gate("ramp").check("before", "just", Kind.AFFINE_DISPARITY, "out")
    gate.Gate("ramp").check("more", "before", Kind.AFFINE_DISPARITY, "out")
    for name in ("more", "none"):
        with pytest.raises(gate.QualityError, match="not written"):
            gate.Gate("ramp").check("before", name, Kind.AFFINE_DISPARITY, "out")


def test_samples_of_a_labels_folder_are_its_first_teachers_maps(tmp_path, monkeypatch):
    class Labels:
        keys, teachers = ("a", "b", "c"), ("one", "two")

        def __init__(self, folder):
            assert folder == tmp_path

        def __len__(self):
            return 3

        def teachers_of(self, i):
            return ("two",) if i == 1 else self.teachers

        def get(self, i, names):
            labels = {name: SimpleNamespace(shared=f"{name} of {i}") for name in names}
            return SimpleNamespace(image=torch.full((3, 2, 2), 51 * i, dtype=torch.uint8), labels=labels)

    (tmp_path / "manifest.json").touch()
    monkeypatch.setattr(gate, "LabelDataset", Labels)
    found, protocol = gate.Gate(str(tmp_path)).samples()
    assert [(one.key, one.truth()) for one in found] == [("a", "one of 0"), ("c", "one of 2")]
    assert [float(one.image().mean()) for one in found] == pytest.approx([0, 0.4]) and protocol.benchmark == "labels"


def test_many_samples_are_spread_evenly():
    assert gate._spread(3) == [0, 1, 2]
    spread = gate._spread(1000)
    assert len(set(spread)) == gate.MAX_IMAGES and spread[0] == 0 and spread[-1] == 999


def test_int8_that_is_refused_is_tried_again_with_the_weights_alone(tmp_path, monkeypatch):
    tried: list[str] = []
    refused: set[str] = {"int8"}

    said: list[str] = []

    def write(student, path, *, options, metadata, **_):
        tried.append(options.matrices)
        said.append(metadata["precision"])
        path.write_bytes(b"graph")
        return 0.01

    def judged(*_):
        if tried[-1] in refused:
            raise gate.QualityError("out: not written")
        return "delta1"

    for name, value in (("write_onnx", write), ("run_onnx", lambda *_, **__: None), ("metadata", lambda *_, **__: {})):
        monkeypatch.setattr(verb.onnx_graph, name, value)
    monkeypatch.setattr(verb.checkpoint, "describe", lambda folder: {})
    monkeypatch.setattr(verb.export, "to_program", lambda student: None)
    monkeypatch.setattr(verb, "_gate", judged)
    options = verb.ExportOptions(onnx=True, int8="LABELS")
    for expected in (["int8", "weights"], ["int8"]):
        tried.clear()
        (line,) = verb._write_graphs(None, None, tmp_path, tmp_path, options, [torch.zeros(3, 2, 2)])
        assert tried == expected and line.endswith("delta1")
        assert said.pop() == ("INT8" if expected[-1] == "int8" else "weights in eight bits, computed in float32")
        refused.clear()
    refused.add("int8")
    tried.clear()
    with pytest.raises(gate.QualityError):  # another precision has no second form
        verb._write_graphs(None, None, tmp_path, tmp_path, verb.ExportOptions(onnx=True, bits=16, gate=gate.Gate()), [])
    assert tried == ["int8"]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("--bits 4 --calibrate L", {"bits": 4, "calibrate": "L"}),
        ("--onnx --overwrite", {"onnx": True, "overwrite": True}),
        ("--browser", {"onnx": True, "browser": True}),
        ("--with-resize --program", {"onnx": True, "with_resize": True, "program": True}),
        ("--int8 L --allow-drop", {"onnx": True, "int8": "L", "gate": gate.Gate("scenes", None, None, True)}),
        ("--bits 16 --gate nyu --root R --list F", {"bits": 16, "gate": gate.Gate("nyu", "R", "F", False)}),
    ],
)
def test_what_is_asked_of_an_export_is_what_is_done(monkeypatch, words, asked):
    done = []
    monkeypatch.setattr(verb.checkpoint, "fetch", lambda name: Path(name))
    monkeypatch.setattr(verb, "run_export", lambda *places, **given: done.append((places, given)))
    assert main(["export", "student", "out", *words.split()]) == 0
    ((places, given),) = done
    assert places == (Path("student"), Path("out")) and given["overwrite"] is asked.pop("overwrite", False)
    assert given["options"] == verb.ExportOptions(**asked)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--int8 LABELS --bits 16", "--int8 is a precision of the ONNX graph, and --bits 16 another: give one of them"),
        ("--gate scenes", "this export is neither"),
        ("--gate scenes --transformers", "this export is neither"),
        ("--onnx --root data/nyu", "--root: no effect without a gate; give --gate BENCHMARK, or leave it out"),
        ("--allow-drop --list nyu.txt", "--list, --allow-drop: no effect without a gate; give --gate BENCHMARK"),
        ("--int8 LABELS --root data/nyu", "--root: no effect without a gate"),
    ],
)
def test_what_would_not_be_used_of_a_gate_is_refused_before_anything_is_loaded(capsys, monkeypatch, words, said):
    monkeypatch.setattr(verb.checkpoint, "fetch", lambda name: pytest.fail("loaded"))
    assert main(["export", "pocket", "out", *words.split()]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
