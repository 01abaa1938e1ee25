"""Scoring: the way from a stored map to a number, and what happens where there is no honest number to give."""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from distill.app import commands
from distill.app.build import prediction_settings
from distill.app.cli import main
from distill.app.recipe import parse
from distill.core.align import fit_affine, fit_scale
from distill.core.depth import DepthMap, Kind, KindError
from distill.eval.benchmarks import BenchmarkSample, prediction_path
from distill.eval.fit import measure, way
from distill.eval.metrics import METRICS, all_metrics, from_sums
from distill.eval.prior import Constant, PlanePrior, fit_plane
from distill.eval.protocol import Protocol, ProtocolError, from_dict, list_hash, require_same
from distill.eval.score import predict, read_scores, score, score_predictions, table, write_scores
from distill.teachers import Card

CLEAN = Protocol(benchmark="test", min_depth=0.1, max_depth=80.0)
MARIGOLD = replace(CLEAN, mode="marigold", fit_positive=True, disparity_floor=1e-3, clip="range", mask_range=False)
SIZE = (40, 56)
DEPTHS = ("metric_depth", "scale_depth", "affine_depth")
DISPARITIES = ("metric_disparity", "scale_disparity", "affine_disparity")


def truth(seed: int = 0, size: tuple[int, int] = SIZE, kind: str = "metric_depth") -> DepthMap:
    rng = torch.Generator().manual_seed(seed)  # several threads ask for truths at once
    values = 1.0 + 20.0 * torch.rand(1, *size, generator=rng) ** 2
    return DepthMap(values, torch.rand(1, *size, generator=rng) < 0.8, Kind(kind))


def as_kind(depth: DepthMap, kind: str) -> np.ndarray:
    """The truth itself as a prediction of a kind, with its own scale and shift made up."""
    values = depth.values[0] if kind in DEPTHS else 1.0 / depth.values[0]
    scale, shift = {"metric": (1.0, 0.0), "scale": (0.3, 0.0), "affine": (0.3, 2.0)}[Kind(kind).unknown]
    return (scale * values + shift).numpy()


def numbers(pred: np.ndarray, target: DepthMap, kind: str, protocol: Protocol = CLEAN) -> dict[str, float]:
    measured = measure(pred, target, Kind(kind), protocol)
    return {name: float(value) for name, value in from_sums(measured.sums[None]).items()}


# --- alignment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [CLEAN, MARIGOLD], ids=["clean", "marigold"])
@pytest.mark.parametrize("kind", DEPTHS + DISPARITIES)
def test_the_truth_itself_scores_perfectly_as_every_kind(kind, protocol):
    got = numbers(as_kind(truth(), kind), truth(), kind, protocol)
    assert got["abs_rel"] < 1e-5 and got["delta1"] == 1.0 and got["silog"] < 1e-2


@pytest.mark.parametrize(
    ("kind", "warp"), [("affine_depth", (7.0, 3.0)), ("affine_disparity", (0.2, 0.1)), ("scale_depth", (4.0, 0))]
)
def test_a_score_does_not_know_what_its_kind_leaves_unknown(kind, warp):
    pred = as_kind(truth(), kind) * (1 + 0.2 * np.random.default_rng(0).random(SIZE, dtype=np.float32))
    one, other = numbers(pred, truth(), kind), numbers(warp[0] * pred + np.float32(warp[1]), truth(), kind)
    assert one["abs_rel"] > 0.01
    assert other == pytest.approx(one, rel=1e-4)


def test_metric_and_scale_predictions_are_not_given_more_than_they_lack():
    twice = 2 * as_kind(truth(), "metric_depth")
    assert numbers(twice, truth(), "metric_depth")["abs_rel"] == pytest.approx(1.0, abs=1e-5)
    assert numbers(twice, truth(), "scale_depth")["abs_rel"] < 1e-5
    shifted = as_kind(truth(), "metric_depth") + 5
    assert numbers(shifted, truth(), "scale_depth")["abs_rel"] > 0.1
    assert numbers(shifted, truth(), "affine_depth")["abs_rel"] < 1e-5


def test_the_fit_is_the_one_of_the_losses():
    pred = torch.randn(1, 300, 300) * 0.02 + 5.0
    target = DepthMap(2 * pred + torch.rand_like(pred), torch.rand_like(pred) < 0.5, Kind.METRIC_DEPTH)
    got = measure(pred[0].numpy(), target, Kind.AFFINE_DEPTH, CLEAN)
    scale, shift = fit_affine(pred, target.values, target.valid)
    assert (got.scale, got.shift) == pytest.approx((float(scale), float(shift)), rel=1e-6)
    got = measure(pred[0].numpy(), target, Kind.SCALE_DEPTH, CLEAN)
    assert got.scale == pytest.approx(float(fit_scale(pred, target.values, target.valid)), rel=1e-6) and got.shift == 0


def test_disparity_is_fitted_in_disparity_and_inverted():
    target = truth()
    pred = 0.5 / target.values + 0.3 + 0.05 * torch.rand_like(target.values)
    scale, shift = fit_affine(pred, 1 / target.values, target.valid)
    depth = (1 / (pred * scale + shift).clamp(min=1e-3)).clamp(0.1, 80.0)
    expected = all_metrics(depth, target.values, target.valid)
    got = numbers(pred[0].numpy(), target, "affine_disparity", MARIGOLD)
    assert got == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4)


def test_marigold_fits_disparity_only_where_it_is_positive_and_clean_everywhere():
    pred = as_kind(truth(), "affine_disparity") - 2.0
    pred[:10] = -abs(pred[:10])
    got = {p.mode: measure(pred, truth(), Kind.AFFINE_DISPARITY, p).scale for p in (CLEAN, MARIGOLD)}
    assert got["marigold"] != pytest.approx(got["clean"], rel=1e-3)


def test_both_floors_are_reported_and_the_protocol_chooses():
    target = truth()
    pred = as_kind(target, "metric_disparity")
    pred[:, ::7] = 0.0  # far away: only a floor keeps it finite
    marigold = measure(pred, target, Kind.METRIC_DISPARITY, MARIGOLD)
    clean = measure(pred, target, Kind.METRIC_DISPARITY, CLEAN)
    assert set(marigold.floors) == set(clean.floors) == {"0.001", "1/max truth"}
    assert torch.equal(marigold.sums, marigold.floors["0.001"]) and torch.equal(clean.sums, clean.floors["1/max truth"])
    low, high = (float(from_sums(marigold.floors[f][None])["abs_rel"]) for f in ("1/max truth", "0.001"))
    assert low < high
    assert measure(as_kind(target, "affine_depth"), target, Kind.AFFINE_DEPTH, MARIGOLD).floors == {}


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("against", Kind)
def test_every_pair_of_kinds_has_one_way_or_a_refusal(kind, against):
    if against.unknown == "affine" and kind.unknown == "affine" and kind.quantity != against.quantity:
        with pytest.raises(KindError, match=f"{kind}.*{against}.*metric"):
            way(kind, against)
        return
    path = way(kind, against)
    assert path.quantity == ("depth" if against.unknown != "affine" else against.quantity)
    order = ["metric", "scale", "affine"]
    assert path.unknown == max(kind.unknown, against.unknown, key=order.index)


def test_a_truth_of_unknown_offset_is_scored_in_its_own_space():
    metric = truth()
    own = DepthMap(5 / metric.values + 40, metric.valid, Kind.AFFINE_DISPARITY)
    for kind in ("affine_disparity", "scale_disparity", "metric_depth", "scale_depth"):
        assert numbers(as_kind(metric, kind), own, kind)["abs_rel"] < 1e-5, kind
    relative = DepthMap(metric.values * 1000, metric.valid, Kind.SCALE_DEPTH)
    for kind in DEPTHS + DISPARITIES:
        assert numbers(as_kind(metric, kind), relative, kind)["abs_rel"] < 1e-4, kind


def test_clean_holds_an_aligned_map_inside_the_truths_own_range():
    target = truth()
    pred = as_kind(target, "affine_depth")
    pred[0, :5] = pred.min() - 1.0  # as near as a camera's lens, once aligned
    assert (
        numbers(pred, target, "affine_depth", MARIGOLD)["i_rmse"] > 5 * numbers(pred, target, "affine_depth")["i_rmse"]
    )


@pytest.mark.parametrize("kind", DEPTHS + DISPARITIES)
def test_medians_give_a_scale_and_nothing_else(kind):
    target = truth()
    median = CLEAN.with_kind(kind, "median")
    assert median.alignment == f"scale by medians in {Kind(kind).quantity}"
    pred = as_kind(target, kind)
    pred[::3] *= 3.0  # a third is far off: least squares would follow it
    got = measure(pred, target, Kind(kind), median)
    values = target.values[0][target.valid[0]].numpy()
    values = values if kind in DEPTHS else 1 / values
    assert got.scale == pytest.approx(np.median(values) / np.median(pred[target.valid[0].numpy()]), rel=1e-5)
    assert got.shift == 0
    if Kind(kind).unknown != "affine":
        assert measure(2 * pred, target, Kind(kind), median).sums[1] == pytest.approx(float(got.sums[1]), rel=1e-5)
        exact = measure(7 * as_kind(target, kind), target, Kind(kind), median)
        assert float(from_sums(exact.sums[None])["abs_rel"]) < 1e-4


def test_an_alignment_may_be_chosen_and_never_mixes_with_another(store, tmp_path):
    ids = {}
    for choice in ("auto", "affine", "scale", "median"):
        got = score(store, "affine_depth", samples(), CLEAN, alignment=choice, model=choice)
        ids[choice] = got
        write_scores(got, tmp_path / f"{choice}.json")
        assert read_scores(tmp_path / f"{choice}.json") == got
    assert ids["auto"].protocol == ids["affine"].protocol and len({s.protocol.id for s in ids.values()}) == 3
    assert ids["scale"].images[0].shift == 0.0 and ids["affine"].images[0].shift != 0.0
    with pytest.raises(ProtocolError, match="'scale and shift in depth' against 'scale by medians in depth'"):
        table([ids["auto"], ids["median"]])
    with pytest.raises(ValueError, match="alignment must be one of auto, affine, scale, median, not 'lstsq'"):
        score(store, "affine_depth", samples(), CLEAN, alignment="lstsq")
    metric = score(store, "metric_depth", samples(), CLEAN, alignment="affine")
    assert metric.metrics == ids["auto"].metrics and metric.protocol == ids["auto"].protocol
    with pytest.raises(KindError, match="medians give a scale"):
        way(Kind.SCALE_DEPTH, Kind.AFFINE_DEPTH, "scale by medians in depth")


def test_a_median_that_is_not_positive_is_remarked_on(store):
    np.save(store / "part/pred_01.npy", -noisy(1))
    got = score(store, "scale_depth", samples(), CLEAN, alignment="median")
    assert got.images[1].scale == 0.0 and "scored pixels are not positive" in got.images[1].problem


# --- protocols --------------------------------------------------------------------------------------------------------


def test_a_protocol_is_its_id():
    same = from_dict(json.loads(json.dumps({**CLEAN.as_dict(), "id": CLEAN.id})))
    assert same == CLEAN and same.id == CLEAN.id and len(CLEAN.id) == 12
    unbounded = replace(CLEAN, max_depth=math.inf)
    assert from_dict(json.loads(json.dumps(unbounded.as_dict()))) == unbounded
    others = [MARIGOLD, unbounded, CLEAN.with_kind("affine_depth"), replace(CLEAN, list_sha256="0")]
    assert len({p.id for p in [CLEAN, *others]}) == 5
    with pytest.raises(ValueError, match="does not belong"):
        from_dict({**MARIGOLD.as_dict(), "id": CLEAN.id})
    with pytest.raises(ValueError, match="no colour"):
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
    clean = MARIGOLD.in_mode("clean")
    assert clean == CLEAN and MARIGOLD.in_mode("marigold") == MARIGOLD
    with pytest.raises(ProtocolError, match="no published Marigold protocol"):
        CLEAN.in_mode("marigold")
    with pytest.raises(ValueError, match="marigold or clean"):
        CLEAN.in_mode("moge")


# --- scoring a folder -------------------------------------------------------------------------------------------------


def samples(count: int = 5) -> list[BenchmarkSample]:
    return [
        BenchmarkSample(
            f"part/rgb_{i:02d}.png",
            prediction_path(f"part/rgb_{i:02d}.png"),
            lambda i=i: truth(i).values.expand(3, -1, -1) / 21,
            lambda i=i: truth(i),
            "odd" if i % 2 else "even",
        )
        for i in range(count)
    ]


def noisy(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return as_kind(truth(seed), "affine_depth") * (1 + 0.1 * rng.random(SIZE, dtype=np.float32))


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "store"
    (folder / "part").mkdir(parents=True)
    for i in range(5):
        np.save(folder / f"part/pred_{i:02d}.npy", noisy(i))
    return folder


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
            np.savez(file, pred=pred)
    elif what == "nan":
        pred[10, :] = np.nan
        np.save(path, pred)
    elif what == "infinite":
        pred[3, :] = np.inf
        np.save(path, pred)
    elif what == "size":
        np.save(path, pred[:-1])
    elif what == "rgb":
        np.save(path, np.stack([pred] * 3))
    elif what == "complex":
        np.save(path, pred.astype(complex))


FAILURES = {
    "missing": r"missing: no part/pred_02\.npy",
    "empty": "not a readable .npy",
    "cut": "not a readable .npy",
    "pickle": "not a readable .npy",
    "zip": "an archive",
    "nan": "NaN or infinity in .* scored pixels",
    "infinite": "NaN or infinity",
    "size": r"shape \(39, 56\), the truth \(40, 56\): resize",
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
    assert got.num_extra == 1 and got.problems() == ["1 .npy files belong to no image of the list"]
    with pytest.raises(FileNotFoundError, match=r"holds none of the 5 predictions.*pred_00\.npy"):
        score(
            tmp_path, "affine_depth", [replace(s, prediction_path="x/" + s.prediction_path) for s in samples()], CLEAN
        )
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
    with pytest.raises(ValueError, match=r"edited\.json: not a score file .*does not belong"):
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


# --- predicting into a store ------------------------------------------------------------------------------------------


class Echo:
    """A teacher whose depth is the image's mean, counted."""

    def __init__(self, kind: Kind = Kind.SCALE_DEPTH, seeded: bool = False) -> None:
        self.card = Card(
            name="echo", weights="", kind=kind, licence="", code_licence="", commercial=True, seeded=seeded
        )
        self.seen: list[object] = []

    def predict(self, images, *, keys=None):
        self.seen.append(keys)
        values = images.mean(1) + 0.1
        return DepthMap(values, images[:, 0] > 0.06, self.card.kind)


def test_predictions_are_stored_resumed_and_scored(tmp_path):
    store, teacher, seen = tmp_path / "p", Echo(), []
    assert predict(teacher, samples()[:3], store, settings={"size": 5}, report=lambda d, t: seen.append((d, t))) == 3
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)] and teacher.seen == [None] * 3
    assert predict(teacher, samples(), store, settings={"size": 5}) == 2 and len(teacher.seen) == 5
    stored = np.load(store / "part/pred_04.npy")
    assert stored.dtype == np.float32 and stored.shape == SIZE
    invalid = (truth(4).values[0] / 21 <= 0.06).numpy()
    assert invalid.any() and np.array_equal(np.isnan(stored), invalid)
    got = score(store, None, samples(), CLEAN, allow_failed=True)
    assert got.model == "echo" and got.kind == Kind.SCALE_DEPTH
    with pytest.raises(ValueError, match="holds scale_depth, which cannot be scored as affine_disparity"):
        score(store, "affine_disparity", samples(), CLEAN)
    assert not list(store.rglob("*.part"))


def test_a_damaged_map_is_predicted_again_and_told(tmp_path):
    store, teacher, told = tmp_path / "p", Echo(), []
    predict(teacher, samples(), store, settings={})
    good = (store / "part/pred_01.npy").read_bytes()
    (store / "part/pred_01.npy").write_bytes(good[: len(good) // 2])
    (store / "part/pred_02.npy").write_bytes(b"")
    np.save(store / "part/pred_03.npy", np.zeros((2, 3, 4)))
    assert predict(teacher, samples(), store, settings={}, tell=told.append) == 3
    assert [re.sub(r".*part/|: not a .*;", "", line) for line in told] == [
        f"pred_0{i}.npy predicted again" for i in (1, 2, 3)
    ]
    assert (store / "part/pred_01.npy").read_bytes() == good
    assert predict(teacher, samples(), store, settings={}) == 0


def test_scoring_a_recipe_mends_maps_and_fails_where_truth_is_lost(tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def models(_):
        yield [("bright", Echo())]

    monkeypatch.setattr(commands, "models", models)
    rows = ["name\trgb\tdepth\tscale_to_metres"]
    for i in range(2):
        pixels = np.random.default_rng(i).integers(30, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        np.save(tmp_path / f"{i}.npy", truth(i).values[0].numpy())
        rows.append(f"a{i}\t{i}.png\t{i}.npy\t1")
    (tmp_path / "INDEX.tsv").write_text("\n".join(rows))
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'[run]\nname = "x"\nout = "{tmp_path}/run"\n[score]\nplane_prior = false\n'
        f'[[benchmarks]]\nname = "pairs"\nroot = "{tmp_path}"\n'
    )
    assert main(["score", str(recipe)]) == 0
    before = capsys.readouterr().out
    stored = tmp_path / "run/predictions/bright/pairs/pred_a1.npy"
    stored.write_bytes(stored.read_bytes()[:300])
    assert main(["score", str(recipe)]) == 0
    after = capsys.readouterr()
    assert after.out == before and "pred_a1.npy: not a readable .npy" in after.err
    (tmp_path / "0.npy").write_bytes(b"gone")
    assert main(["score", str(recipe)]) == 1
    said = capsys.readouterr().err
    assert "1 of 2 images of pairs could not be scored for bright; no mean" in said
    assert "pred_a0.npy: " in said and "0.npy: not a readable depth map" in said and "score again" in said


def test_an_out_that_cannot_be_written_is_refused_before_scoring(store, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.eval.score.score", lambda *_, **__: pytest.fail("scored"))
    given = {"kind": "affine_depth", "benchmark": "scenes", "root": None}
    (tmp_path / "scores").mkdir()
    (tmp_path / "b.csv").mkdir()
    (tmp_path / "file").write_text("")
    for out, message in {
        "scores": r"scores is a folder; name a file, such as .*scores/scores\.json",
        "b.json": r"b\.csv is a folder",
        "file/y.json": r"file/y\.json: cannot be written \(.*\); name another file",
        "a.csv": r"a\.csv: the scores are JSON",
    }.items():
        with pytest.raises((OSError, ValueError), match=message) as caught:
            score_predictions(store, out=tmp_path / out, **given)
        assert "Errno" not in str(caught.value)
    assert not list(tmp_path.rglob("*.part"))


def test_stored_predictions_of_other_settings_are_not_mixed_with(tmp_path, store):
    predict(Echo(), samples()[:1], tmp_path / "p", settings={"size": 5, "steps": 1})
    with pytest.raises(
        ValueError, match=r"p holds predictions of other settings \(size 5, now 6\); use another folder"
    ):
        predict(Echo(), samples(), tmp_path / "p", settings={"size": 6, "steps": 1})
    with pytest.raises(ValueError, match="kind 'scale_depth', now 'affine_depth'"):
        predict(Echo(Kind.AFFINE_DEPTH), samples(), tmp_path / "p", settings={"size": 5, "steps": 1})
    with pytest.raises(ValueError, match="made by somebody else"):
        predict(Echo(), samples(), store, settings={})
    assert len(list((tmp_path / "p").rglob("*.npy"))) == 1


def test_a_teachers_options_are_settings_of_its_predictions(tmp_path):
    recipe = parse(
        {
            "run": {"name": "x"},
            "teachers": [
                {"name": "marigold", "alias": "four", "options": {"steps": 4}, "dtype": "bfloat16"},
                {"name": "genpercept"},
            ],
        }
    )
    four = prediction_settings(recipe, "four")
    assert four == {"options": {"steps": 4}, "dtype": "bfloat16"}
    assert prediction_settings(recipe, "genpercept") == prediction_settings(recipe, "student") == {}
    predict(Echo(), samples()[:1], tmp_path / "p", settings={"weights": "w", **four})
    with pytest.raises(ValueError, match="other settings .*steps"):
        predict(Echo(), samples()[:1], tmp_path / "p", settings={"weights": "w", "options": {"steps": 10}})


def test_a_seeded_teacher_is_told_the_image(tmp_path):
    teacher = Echo(seeded=True)
    predict(teacher, samples()[:2], tmp_path / "p", settings={})
    assert teacher.seen == [["part/rgb_00.png"], ["part/rgb_01.png"]]


# --- baselines --------------------------------------------------------------------------------------------------------


def ground(seed: int) -> BenchmarkSample:
    """A road: disparity falls from the bottom row to the horizon, the same way in every image, in units of its own."""
    rows = torch.linspace(0.02, 1.0, 48)[:, None].expand(48, 64)
    values = (1 + seed) / rows
    return BenchmarkSample(
        str(seed),
        f"pred_{seed}.npy",
        lambda: torch.zeros(3, 48, 64),
        lambda: DepthMap(values[None], values[None] < 30 * (1 + seed), Kind.METRIC_DEPTH),
    )


def test_the_plane_prior_is_what_images_have_in_common(tmp_path):
    corridor = DepthMap(
        1e-3 / torch.linspace(0.02, 1.0, 64).expand(1, 48, 64), torch.ones(1, 48, 64) > 0, Kind.METRIC_DEPTH
    )
    # One image of another shape whose disparities are a thousand times as large: standardised, it is one of five.
    prior = fit_plane([*(ground(i) for i in range(4)), replace(ground(0), truth=lambda: corridor)])
    prior.save(tmp_path / "prior.json")
    again = PlanePrior.load(tmp_path / "prior.json")
    assert again.num_images == 5 and torch.allclose(again.grid, prior.grid, atol=1e-5)
    results = {}
    for teacher in (prior, Constant()):
        predict(teacher, [ground(9)], tmp_path / teacher.card.name, settings={})
        results[teacher.card.name] = score(tmp_path / teacher.card.name, None, [ground(9)], CLEAN).metrics["delta1"]
    assert results["plane_prior"] > 0.8 > 0.5 > results["constant"]
    assert prior.predict(torch.zeros(2, 3, 30, 50)).values.shape == (2, 30, 50)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: not a stored plane prior"):
        PlanePrior.load(tmp_path / "bad.json")
    with pytest.raises(KindError):
        fit_plane([replace(ground(0), truth=lambda: truth(kind="affine_depth"))])


def test_the_command_lines_function_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder of predictions"):
        score_predictions(tmp_path / "none", kind="affine_depth", benchmark="nyu", root=tmp_path)
    with pytest.raises(LookupError, match="nyu"):
        score_predictions(tmp_path, kind="affine_depth", benchmark="nyu2", root=tmp_path)
    with pytest.raises(ValueError, match="nyu needs a root"):
        score_predictions(tmp_path, kind="affine_depth", benchmark="nyu", root=None)
