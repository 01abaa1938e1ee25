"""Protocols of other people, on maps whose error is known in each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.app.cli import main
from distill.core.depth import DepthMap, Kind, KindError
from distill.eval.benchmarks import motorcycle
from distill.eval.completeness import check_benchmark
from distill.eval.fit import measure
from distill.eval.metrics import from_sums
from distill.eval.protocol import RIVAL_MODES, Protocol, ProtocolError
from distill.eval.rivals import NAMES, RIVALS, rival_protocol, score_under_all

ETH3D = Protocol(
    benchmark="eth3d",
    mode="marigold",
    fit_columns=1024,
    fit_positive=True,
    disparity_floor=1e-3,
    min_depth=1e-5,
    clip="range",
)


def abs_rel(pred, truth, name, kind):
    protocol, choice = rival_protocol(ETH3D, name, kind)
    depth = DepthMap(torch.tensor(truth)[None], torch.ones(1, *np.shape(truth), dtype=torch.bool), Kind.METRIC_DEPTH)
    made = measure(np.array(pred, np.float32), depth, kind, protocol.with_kind(kind, choice))
    return float(from_sums(made.sums[None])["abs_rel"]), made


def test_every_rival_has_its_name_in_the_protocols():
    assert tuple(RIVALS) == RIVAL_MODES and NAMES[:2] == ("marigold", "clean")
    ids = {
        rival_protocol(ETH3D, name, Kind.AFFINE_DISPARITY)[0].id for name in ("marigold", "zipdepth", "moge_disparity")
    }
    assert len(ids) == 3


def test_a_truth_beyond_sixty_metres_is_no_truth_for_zipdepth():
    truth = [[1.0, 2.0, 4.0, 100.0]]
    pred = [[1.0, 0.5, 0.25, 0.5]]  # right but for the farthest pixel
    assert abs_rel(pred, truth, "zipdepth", Kind.AFFINE_DISPARITY)[0] == pytest.approx(0.0, abs=1e-5)
    assert abs_rel(pred, truth, "moge_disparity", Kind.AFFINE_DISPARITY)[0] > 0.3


def test_the_floor_of_moge_is_the_farthest_truth_and_marigolds_is_a_kilometre():
    truth = [[1.0, 2.0, 5.0, 10.0]]
    pred = [[1.0, 0.5, 0.2, -0.5]]  # the fitted line is below zero at the farthest pixel
    marigold, moge = (abs_rel(pred, truth, name, Kind.AFFINE_DISPARITY)[1] for name in ("marigold", "moge_disparity"))
    assert marigold.scale != moge.scale  # marigold's fit leaves the negative pixel out
    assert abs_rel(pred, truth, "marigold", Kind.AFFINE_DISPARITY)[0] > 20  # 1000 m instead of 10
    assert abs_rel(pred, truth, "moge_disparity", Kind.AFFINE_DISPARITY)[0] < 1


def test_the_page_of_protocols_has_the_numbers_of_its_example():
    """Depth of 0.5 to 30 m, a tenth of the pixels 30 to 60 m; disparity with noise of 0.5 % of its range."""
    random = np.random.default_rng(0)
    truth = random.uniform(0.5, 30.0, (500, 800))
    truth[:50] = random.uniform(30.0, 60.0, (50, 800))
    disparity = 1 / truth
    pred = disparity + 0.005 * np.ptp(disparity) * random.normal(size=truth.shape)
    kind = Kind.AFFINE_DISPARITY
    marigold, made = abs_rel(pred, truth, "marigold", kind)
    depth = DepthMap(torch.tensor(truth)[None], torch.ones(1, *truth.shape, dtype=torch.bool), Kind.METRIC_DEPTH)
    clipped = measure(pred.astype(np.float32), depth, kind, replace(ETH3D, max_depth=350.0).with_kind(kind))
    values = marigold, float(from_sums(clipped.sums[None])["abs_rel"]), abs_rel(pred, truth, "moge_disparity", kind)[0]
    at_floor = (pred * made.scale + made.shift < 1e-3).mean()
    page = " ".join((Path(__file__).parents[2] / "docs/protocols.md").read_text().split())
    said = "AbsRel is {} under Marigold's floor without a largest depth, {} with a clip at 350 m, and {} under MoGe's"
    assert said.format(*(f"{value:.2f}"[1:] for value in values)) in page
    assert f"{at_floor:.1%}".replace("%", " %") + " of the pixels are at Marigold's floor" in page


def test_errors_of_disparity_are_not_errors_of_depth():
    truth = [[1.0, 2.0, 4.0, 8.0]]
    pred = [[2.0, 1.0, 0.5, 0.25]]  # exact, but for the scale
    assert abs_rel(pred, truth, "depth_anything", Kind.SCALE_DISPARITY)[0] == pytest.approx(0, abs=1e-6)
    off = [[2.0, 1.0, 0.5, 0.125]]
    disparity, made = abs_rel(off, truth, "depth_anything", Kind.AFFINE_DISPARITY)
    fitted = made.scale * np.array(off[0]) + made.shift
    assert disparity == pytest.approx(np.mean(np.abs(fitted - 1 / np.array(truth[0])) * np.array(truth[0])), rel=1e-4)


def test_the_scale_of_least_relative_error_is_a_weighted_median():
    truth, depth = [[1.0, 2.0, 3.0, 10.0]], [[1.0, 2.0, 3.0, 1.0]]
    error, made = abs_rel(depth, truth, "moge_scale", Kind.SCALE_DEPTH)
    assert made.scale == 1.0 and error == pytest.approx(0.9 / 4)
    scales = np.linspace(0.5, 12, 4000)
    brute = np.abs(scales[:, None] * np.array(depth[0]) - truth[0]) / truth[0]
    assert error <= brute.mean(1).min() + 1e-6
    inverse = [[1 / d for d in depth[0]]]
    assert abs_rel(inverse, truth, "moge_scale", Kind.SCALE_DISPARITY)[0] == pytest.approx(error, rel=1e-5)


def test_the_ratio_of_medians_for_ultralytics_and_what_is_not_defined():
    truth, depth = [[1.0, 2.0, 3.0, 200.0]], [[2.0, 4.0, 6.0, 1.0]]
    assert abs_rel(depth, truth, "ultralytics", Kind.SCALE_DEPTH)[0] == pytest.approx(0, abs=1e-6)  # 200 m is too far
    with pytest.raises(KindError, match="ultralytics is not defined for affine_disparity"):
        rival_protocol(ETH3D, "ultralytics", Kind.AFFINE_DISPARITY)
    with pytest.raises(ProtocolError, match="scores depth in metres, which .* does not have"):
        rival_protocol(Protocol(benchmark="mattes", task="boundary_recall"), "zipdepth", Kind.AFFINE_DISPARITY)


def test_one_model_under_all_of_them_on_the_command_line(tmp_path, capsys):
    [sample] = motorcycle.samples(None)
    truth = sample.truth()
    disparity = torch.where(truth.valid, 1.0 / truth.values.clamp(min=1e-6), 0.5)[0].numpy()
    path = tmp_path / "maps" / sample.prediction_path
    path.parent.mkdir(parents=True)
    np.save(path, disparity.astype(np.float32))
    asked = [
        "--benchmark",
        "motorcycle",
        "--kind",
        "affine_disparity",
        "--protocol",
        "all",
        "--out",
        str(tmp_path / "s.json"),
    ]
    assert main(["score", "--predictions", str(tmp_path / "maps"), *asked]) == 0
    said = capsys.readouterr()
    assert "moge_disparity" in said.out and "ultralytics: not available: ultralytics is not defined" in said.err
    assert (tmp_path / "s-clean.json").is_file() and (tmp_path / "s-zipdepth.json").is_file()
    asked[asked.index("affine_disparity")] = "affine_depth"  # which it is not
    assert main(["score", "--predictions", str(tmp_path / "maps"), *asked[:-2]]) == 0
    assert "is the prediction really affine_depth?" in capsys.readouterr().err


def test_a_table_of_pairs_in_metres_has_them_too(tmp_path):
    depth = 1 + np.arange(64, dtype=np.float32).reshape(8, 8) / 8
    (tmp_path / "maps").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        np.save(tmp_path / f"{name}_depth.npy", 1000 * depth)
        np.save(tmp_path / "maps" / f"{name}.npy", 2 / depth + 1)
    rows = "name,rgb,depth,scale_to_metres\na,a.png,a_depth.npy,0.001\nb,b.png,b_depth.npy,{}\n"
    table, asked = tmp_path / "INDEX.tsv", {"kind": "affine_disparity", "benchmark": "pairs", "root": tmp_path}
    table.write_text(rows.format("mm"))
    found = score_under_all(tmp_path / "maps", **asked)
    assert found["moge_disparity"].metrics["abs_rel"] == pytest.approx(0, abs=1e-4)
    assert "ultralytics is not defined for affine_disparity" in found["ultralytics"]
    assert "8 x 8, 100% valid, 1 to 8.875 m" in check_benchmark("pairs", tmp_path)[1].what
    table.write_text(rows.format(""))
    found = score_under_all(tmp_path / "maps", **asked, names=("moge_disparity",))
    assert "metres, which pairs does not have for all of its images" in found["moge_disparity"]
    table.write_text(rows.format(1000))
    [bad] = [finding for finding in check_benchmark("pairs", tmp_path) if finding.level == "bad"]
    assert "may be its inverse" in bad.what and not bad.remedy
