"""Scoring: the way from a stored map to a number, and what happens where there is no honest number to give."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.core.depth import DepthMap, Kind
from distill.eval.benchmarks import prediction_path
from distill.eval.metrics import METRICS, all_metrics
from distill.eval.protocol import ProtocolError, from_dict, list_hash, require_same
from distill.eval.score import read_scores, score, table, write_scores
from tests.eval.known_maps import CLEAN, MARIGOLD, noisy, numbers, samples, truth


def test_a_protocol_is_its_id():
    same = from_dict(json.loads(json.dumps({**CLEAN.as_dict(), "id": CLEAN.id})))
    assert same == CLEAN and same.id == CLEAN.id and len(CLEAN.id) == 12
    unbounded = replace(CLEAN, max_depth=math.inf)
    assert from_dict(json.loads(json.dumps(unbounded.as_dict()))) == unbounded
    others = [MARIGOLD, unbounded, CLEAN.with_kind("affine_depth"), replace(CLEAN, list_sha256="0")]
    assert len({p.id for p in [CLEAN, *others]}) == 5
    with pytest.raises(ValueError, match="does not match"):
        from_dict({**MARIGOLD.as_dict(), "id": CLEAN.id})
    with pytest.raises(ValueError, match="unknown protocol field colour"):
        from_dict({**CLEAN.as_dict(), "colour": 1})


def test_different_protocols_do_not_compare_but_alignments_may():
    depth, disparity = CLEAN.with_kind("affine_depth"), CLEAN.with_kind("affine_disparity")
    with pytest.raises(ProtocolError, match=r"a and b.*alignment 'scale and shift in depth'"):
        require_same({"a": depth, "b": disparity})
    require_same({"a": depth, "b": disparity}, across_alignments=True)
    with pytest.raises(ProtocolError, match="max_depth"):
        require_same({"a": depth, "b": replace(disparity, max_depth=10.0)}, across_alignments=True)
    assert depth.setting == disparity.setting and depth.id != disparity.id


def test_modes_repair_and_never_unrepair():
    assert replace(MARIGOLD, fit_columns=9, offset_positive=True).in_mode("clean") == CLEAN, "an oddity stays"
    clean = MARIGOLD.in_mode("clean")
    assert clean == CLEAN and MARIGOLD.in_mode("marigold") == MARIGOLD
    with pytest.raises(ProtocolError, match="no published Marigold protocol"):
        CLEAN.in_mode("marigold")
    with pytest.raises(ValueError, match="marigold or clean"):
        CLEAN.in_mode("moge")


# --- scoring a folder -------------------------------------------------------------------------------------------------


def test_names_are_marigolds():
    assert prediction_path("test/kitchen/rgb_0001.png") == "test/kitchen/pred_0001.npy"
    assert prediction_path("a/DSC_0219.JPG") == "a/pred_DSC_0219.npy"


def test_a_score_is_the_mean_of_its_images(store):
    seen = []
    got = score(store, "affine_depth", samples(), CLEAN, report=lambda done, total: seen.append((done, total)))
    each = [numbers(noisy(i), truth(i), "affine_depth") for i in range(5)]
    assert got.metrics == pytest.approx({name: np.mean([row[name] for row in each]) for name in METRICS})
    assert got.groups["odd"]["metrics"]["abs_rel"] == pytest.approx((each[1]["abs_rel"] + each[3]["abs_rel"]) / 2)
    stacked = [torch.cat([getattr(truth(i), field) for i in range(5)]) for field in ("values", "valid")]
    aligned = torch.stack([torch.from_numpy(noisy(i)) * row.scale + row.shift for i, row in enumerate(got.images)])
    limits = [(t[v].min(), t[v].max()) for t, v in zip(*stacked, strict=True)]
    clipped = torch.stack([a.clamp(*limit) for a, limit in zip(aligned, limits, strict=True)])
    pooled = all_metrics(clipped.reshape(1, -1, 1), stacked[0].reshape(1, -1, 1), stacked[1].reshape(1, -1, 1))
    assert got.pooled == pytest.approx({name: float(value) for name, value in pooled.items()}, rel=1e-4)
    assert (got.num_images, got.num_failed, got.num_extra, got.problems()) == (5, 0, 0, [])
    assert got.protocol.list_sha256 == list_hash(s.key for s in samples()) and got.protocol.num_images == 5
    assert seen == [(i, 5) for i in range(1, 6)] and got.model == "store"
    assert score(store, "affine_depth", samples(), CLEAN, workers=3).images == got.images


def broken(path, what: str) -> None:
    pred = noisy(2)
    if what == "missing":
        path.unlink()
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif what == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif what == "zip":
        with path.open("wb") as file:
            np.savez(file, one=pred, two=pred)
    elif what == "nan":
        pred[10, :] = np.nan
        np.save(path, pred)
    elif what == "infinite":
        pred[3, :] = np.inf
        np.save(path, pred)
    elif what == "size":
        np.save(path, pred[:-1])
    elif what == "turned":
        np.save(path, pred.T)
    elif what == "rgb":
        np.save(path, np.stack([pred] * 3))
    elif what == "complex":
        np.save(path, pred.astype(complex))


FAILURES = {
    "missing": r"missing: no part/pred_02\.npy",
    "empty": "not a readable .npy",
    "cut": "not a readable .npy",
    "pickle": "not a readable .npy",
    "zip": "one map is needed",
    "nan": "NaN or infinity in .* scored pixels",
    "infinite": "NaN or infinity",
    "size": r"the map is \(39, 56\), but the truth is \(40, 56\): resize",
    "turned": r"the map is \(56, 40\), but the truth is \(40, 56\): it lies on its side",
    "rgb": r"shape \(3, 40, 56\)",
    "complex": "holds complex64|holds complex128",
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_prediction_that_cannot_be_scored_takes_the_mean_away(store, tmp_path, what):
    broken(store / "part/pred_02.npy", what)
    got = score(store, "affine_depth", samples(), CLEAN)
    assert got.num_failed == 1 and [i.failed for i in got.images] == [False, False, True, False, False]
    assert len(got.problems()) == 1 and "\n" not in got.problems()[0]

    assert re.search(rf"^part/rgb_02\.png: .*({FAILURES[what]})", got.problems()[0])
    assert set(got.metrics.values()) == set(got.pooled.values()) == {None} and not got.partial
    assert got.groups["even"]["metrics"]["abs_rel"] is None and got.groups["odd"]["metrics"]["abs_rel"] > 0
    rest = score(store, "affine_depth", samples(), CLEAN, allow_failed=True)
    each = [numbers(noisy(i), truth(i), "affine_depth")["abs_rel"] for i in (0, 1, 3, 4)]
    assert rest.metrics["abs_rel"] == pytest.approx(np.mean(each)) and rest.partial and rest.num_failed == 1
    write_scores(got, tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["metrics"]["abs_rel"] is None
    assert read_scores(tmp_path / "s.json") == got


def test_a_map_of_what_the_protocol_cuts_off_is_to_be_cut_and_not_resized(store):
    """As aliyun/NeWCRFs#7 and cleinc/bts#125 have it of KITTI: a resized map would be scored, and wrongly."""
    broken(store / "part/pred_02.npy", "size")
    got = score(store, "affine_depth", samples(), replace(CLEAN, crop="middle of image and truth"))
    assert "truth is (40, 56): crop it like the truth (middle of image and truth) before" in got.problems()[0]


def test_a_truth_of_another_size_than_its_image_is_not_the_maps_fault(store):
    """As ScanNet's exported frames are (ScanNet/ScanNet#109): colour of 1296 x 968, depth of 640 x 480."""
    broken(store / "part/pred_02.npy", "size")
    odd = [replace(sample, image=lambda: torch.zeros(3, 39, 56)) for sample in samples()]
    assert (
        "the truth is (40, 56), but its image and the map are (39, 56)"
        in score(store, "affine_depth", odd, CLEAN).problems()[0]
    )


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        (lambda p: (1000 * p).astype(np.uint16), "stored as uint16"),
        (lambda p: (10 * p).astype(np.uint8), "stored as uint8"),
        (lambda p: p.astype(np.float16), "stored as float16"),
        (lambda p: np.full_like(p, 3.0), "constant prediction"),
        (lambda p: -p, "fitted scale is negative.*really affine_depth"),
    ],
)
def test_a_doubtful_prediction_is_scored_with_a_remark(store, change, remark):
    np.save(store / "part/pred_02.npy", change(noisy(2)))
    got = score(store, "affine_depth", samples(), CLEAN)
    assert got.num_failed == 0 and got.metrics["abs_rel"] is not None
    assert len(got.problems()) == 1

    assert re.search(remark, got.problems()[0])


def test_other_layouts_of_the_same_map_are_read(store):
    expected = score(store, "affine_depth", samples(), CLEAN).metrics
    np.save(store / "part/pred_00.npy", noisy(0)[None])
    np.save(store / "part/pred_01.npy", np.asfortranarray(noisy(1))[..., None])
    np.save(store / "part/pred_02.npy", noisy(2).astype(np.float64))
    got = score(store, "affine_depth", samples(), CLEAN)
    assert got.metrics == expected and got.problems() == []


def test_negative_metric_depth_is_remarked_on(store):
    np.save(store / "part/pred_01.npy", np.where(noisy(1) < 4, -1.0, noisy(1)))
    got = score(store, "metric_depth", samples(), CLEAN)
    assert "scored pixels are not positive" in got.images[1].problem and math.isfinite(got.metrics["silog"])


def test_extra_files_are_counted_and_an_empty_folder_is_an_error(store, tmp_path):
    np.save(store / "part/pred_77.npy", noisy(0))
    got = score(store, "affine_depth", samples(), CLEAN)
    assert got.num_extra == 1 and got.problems() == ["1 .npy file belongs to no image of the list"]
    with pytest.raises(FileNotFoundError, match=r"holds none of the 5 predictions.*pred_00\.npy"):
        score(
            tmp_path, "affine_depth", [replace(s, prediction_path="x/" + s.prediction_path) for s in samples()], CLEAN
        )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"there is no map, but 1 .jpg: store the numbers as .npy"):
        score(tmp_path / "other", "affine_depth", samples(), CLEAN)
    with pytest.raises(ValueError, match="two images would be stored as part/pred_00.npy"):
        score(store, "affine_depth", [*samples(), samples()[0]], CLEAN)


def test_an_image_without_truth_is_nobodys_failure_in_clean_and_breaks_the_mean_in_marigold(store):
    blind = samples()
    empty = DepthMap(truth(2).values, torch.zeros_like(truth(2).valid), Kind.METRIC_DEPTH)
    blind[2] = replace(blind[2], truth=lambda: empty)
    clean, marigold = (score(store, "affine_depth", blind, protocol) for protocol in (CLEAN, MARIGOLD))
    each = [numbers(noisy(i), truth(i), "affine_depth")["abs_rel"] for i in (0, 1, 3, 4)]
    assert clean.metrics["abs_rel"] == pytest.approx(np.mean(each)) and clean.num_failed == 0
    assert clean.images[2].problem == "the truth has no valid pixel" == marigold.images[2].problem
    assert marigold.metrics["abs_rel"] is None and marigold.num_failed == 1


def test_an_unreadable_truth_is_a_line_and_not_the_end(store):
    def unreadable() -> DepthMap:
        raise OSError("root.tar: cut short inside depth.png")

    some = samples()
    some[3] = replace(some[3], truth=unreadable)
    got = score(store, "affine_depth", some, CLEAN)
    assert got.num_failed == 1 and got.problems() == ["part/rgb_03.png: root.tar: cut short inside depth.png"]


def test_kinds_must_be_known_and_not_contradict_the_store(store):
    with pytest.raises(ValueError, match=r"give --kind, one of metric_depth, "):
        score(store, None, samples(), CLEAN)
    with pytest.raises(ValueError, match="no kind 'depth'"):
        score(store, "depth", samples(), CLEAN)


def test_score_files_come_back_and_edits_are_noticed(store, tmp_path):
    got = score(store, "affine_depth", samples(), MARIGOLD, model="mine")
    write_scores(got, tmp_path / "deep/mine.json")
    assert read_scores(tmp_path / "deep/mine.json") == got
    rows = (tmp_path / "deep/mine.csv").read_text().splitlines()
    assert len(rows) == 6 and rows[0].startswith("key,group,abs_rel,sq_rel")
    assert float(rows[1].split(",")[2]) == got.images[0].metrics["abs_rel"]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["mine.csv", "mine.json"]
    content = json.loads((tmp_path / "deep/mine.json").read_text())
    content["protocol"]["max_depth"] = 10.0
    (tmp_path / "edited.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"edited\.json: not a score file .*does not match its fields"):
        read_scores(tmp_path / "edited.json")


def test_tables_refuse_what_does_not_compare(store):
    depth = score(store, "affine_depth", samples(), CLEAN, model="a")
    scale = score(store, "scale_depth", samples(), CLEAN, model="b")
    with pytest.raises(ProtocolError, match=r"a \(affine_depth\) and b \(scale_depth\)"):
        table([depth, scale])
    rows = table([depth, scale], across_alignments=True)
    assert rows[0] == ["model", "alignment", "test abs_rel", "test delta1"]
    assert rows[1] == [
        "a",
        "scale and shift in depth",
        f"{depth.metrics['abs_rel']:.4f}",
        f"{depth.metrics['delta1']:.4f}",
    ]
    fewer = score(store, "affine_depth", samples()[:4], CLEAN, model="c")
    with pytest.raises(ProtocolError, match="num_images"):
        table([depth, fewer])
    with pytest.raises(LookupError, match="no metric absrel"):
        table([depth], ["absrel"])
    (store / "part/pred_00.npy").unlink()
    partial = score(store, "affine_depth", samples(), CLEAN, model="d", allow_failed=True)
    assert table([partial])[1][2].endswith("(without 1)")
    assert table([score(store, "affine_depth", samples(), CLEAN)])[1][2] == "-"


def test_a_list_is_its_images_and_not_their_order():
    assert list_hash(["b", "a"]) == list_hash(["a", "b"]) != list_hash(["a"])


def test_edges_are_fitted_for_a_shift_alone_and_take_no_other_alignment():
    edges = CLEAN.of_edges()
    assert [edges.with_kind(kind).alignment for kind in ("metric_depth", "scale_disparity")] == ["none", "none"]
    assert edges.with_kind("affine_disparity").alignment == "scale and shift in disparity"
    with pytest.raises(ValueError, match="test takes no other alignment .* leave it at auto"):
        edges.with_kind("affine_disparity", "scale")


def test_a_constant_is_only_added_where_the_fit_would_leave_pixels_out():
    fitted = MARIGOLD.with_kind("affine_disparity", "median")
    assert fitted.with_offset("affine_disparity") == fitted, "medians cancel no constant"
