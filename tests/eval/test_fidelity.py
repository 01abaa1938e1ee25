"""Fidelity and local alignment on maps whose answer is known, and what a run's report says of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.app.local_gain import summary
from distill.core.depth import DepthMap, Kind
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.compare import PROTOCOL
from distill.eval.fidelity import fidelity
from distill.eval.local import LocalError, central, local_error
from distill.eval.protocol import Protocol
from distill.eval.reports.fidelity import fidelity_section, scatter

CLEAN = Protocol(benchmark="maps", max_depth=80.0, num_images=1)


def a_sample(depth: np.ndarray) -> BenchmarkSample:
    truth = DepthMap(torch.tensor(depth)[None], torch.ones(1, *depth.shape, dtype=torch.bool), Kind.METRIC_DEPTH)
    return BenchmarkSample("a", "a.npy", lambda: torch.zeros(3, *depth.shape), lambda: truth)


def stored(folder, values: np.ndarray, kind: str = "affine_disparity") -> None:
    folder.mkdir(parents=True)
    np.save(folder / "a.npy", values.astype(np.float32))
    table = {"model": "m", "kind": kind, "settings": {}}
    (folder / "settings.json").write_text(json.dumps(table))


def test_a_student_that_copies_its_teacher_is_faithful_and_no_better(tmp_path):
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 9, (16, 16)).astype(np.float32)
    wrong = 1 / (depth * rng.uniform(0.7, 1.4, depth.shape).astype(np.float32))
    stored(tmp_path / "teacher", wrong)
    stored(tmp_path / "copy", 3 * wrong - 7)  # the same but for scale and shift
    stored(tmp_path / "right", 1 / depth)
    samples = [a_sample(depth)]
    copy = fidelity(tmp_path / "copy", tmp_path / "teacher", samples, CLEAN)
    right = fidelity(tmp_path / "right", tmp_path / "teacher", samples, CLEAN)
    assert copy["abs_rel"] < 1e-3 and copy["delta1"] == 1.0 and copy["boundary_f1"] == pytest.approx(1.0)
    assert right["abs_rel"] > 0.1 and right["boundary_f1"] < copy["boundary_f1"]  # right, and so unlike its teacher
    assert copy["images"] == 1 and all(a == pytest.approx(b, rel=1e-2) for a, b in copy["points"])
    assert fidelity(tmp_path / "copy", tmp_path / "nobody", samples, CLEAN) is None
    (tmp_path / "fidelity").mkdir()
    table = {"benchmark": "maps", "student": "student", "teacher": "dav2", **right}
    (tmp_path / "fidelity" / "maps--dav2.json").write_text(json.dumps(table))
    html = fidelity_section(tmp_path, [])
    assert "dav2" in html and html.count("<circle") > 10 and f"{right['abs_rel']:.4f}" in html
    assert "depth across: dav2; upwards: student" in html
    assert scatter("nothing", ("student", "dav2"), []) == ""


@pytest.mark.parametrize("points", [2, 7])
def test_the_points_are_spread_over_the_images_and_never_more(tmp_path, monkeypatch, points):
    monkeypatch.setattr("distill.eval.fidelity.POINTS", points)
    depth = np.linspace(1, 9, 256, dtype=np.float32).reshape(16, 16)
    samples = []
    for i in range(5):  # each has depths of its own
        stored(tmp_path / f"{i}", 1 / depth)
        samples.append(replace(a_sample(depth * np.float32(1 + i * 10)), key=f"{i}", prediction_path=f"{i}/a.npy"))
    (tmp_path / "settings.json").write_text((tmp_path / "0" / "settings.json").read_text())
    protocol = replace(CLEAN, max_depth=1e3, num_images=5)
    found = fidelity(tmp_path, tmp_path, samples, protocol)
    assert found["images"] == 5 and len(set(found["points"])) == len(found["points"]) == points
    assert fidelity(tmp_path, tmp_path, samples, protocol) == found


def test_a_fault_elsewhere_spoils_the_global_alignment_of_a_part_and_not_the_local_one():
    rows, columns = central(32, 32)
    depth = np.linspace(2, 8, 32 * 32, dtype=np.float32).reshape(32, 32)
    pred = 1 / depth
    pred[:8] *= 3  # outside of the part
    truth = DepthMap(torch.tensor(depth)[None], torch.ones(1, 32, 32, dtype=torch.bool), Kind.METRIC_DEPTH)
    found = local_error(pred, truth, Kind.AFFINE_DISPARITY, PROTOCOL, patch=5 / depth[rows, columns] + 1)
    assert found.globally > 0.1 and found.locally < 1e-3 and found.patch < 1e-3
    row = summary([found, found])
    assert row["gain"][0] == pytest.approx(1 - found.locally / found.globally) and row["gain"][1] < 1e-9
    assert row["images"] == 2 and summary([LocalError(0.2, 0.1)])["patch"] is None  # a model that is looked up


@pytest.mark.parametrize("kind", [Kind.SCALE_DEPTH, Kind.SCALE_DISPARITY])
def test_an_unknown_scale_is_fitted_too(tmp_path, kind):
    rng = np.random.default_rng(0)
    depth = rng.uniform(2, 8, (32, 32)).astype(np.float32)
    wrong = depth * rng.uniform(0.9, 1.1, depth.shape).astype(np.float32)
    disparity = kind is Kind.SCALE_DISPARITY
    pred = np.float32(0.01) / wrong if disparity else 100 * wrong
    rows, columns = central(32, 32)
    expected = []
    for p, t in ((pred, depth), (pred[rows, columns], depth[rows, columns])):
        truth = 1 / t if disparity else t
        scaled = p.astype(np.float64) * ((p * truth).sum(dtype=np.float64) / np.square(p).sum(dtype=np.float64))
        expected.append(1 / np.maximum(scaled, truth.min()) if disparity else scaled)
    expected = [np.abs(e / depth[rows, columns] - 1).mean() for e in (expected[0][rows, columns], expected[1])]
    found = local_error(pred, a_sample(depth).truth(), kind, PROTOCOL)
    assert (found.globally, found.locally) == (
        pytest.approx(expected[0], rel=1e-4),
        pytest.approx(expected[1], rel=1e-4),
    )
    stored(tmp_path / "teacher", pred, str(kind))
    stored(tmp_path / "copy", 3 * pred, str(kind))
    copy = fidelity(tmp_path / "copy", tmp_path / "teacher", [a_sample(depth)], CLEAN)
    assert copy["abs_rel"] < 1e-5 and copy["delta1"] == 1.0 and copy["boundary_f1"] == pytest.approx(1.0)
    assert all(1.8 < a < 8.2 and b == pytest.approx(a, rel=1e-4) for a, b in copy["points"]), "in metres"
