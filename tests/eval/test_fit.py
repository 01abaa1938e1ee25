"""Alignment: what a kind leaves unknown is fitted, and nothing more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.core.align import fit_affine
from distill.core.depth import DepthMap, Kind, KindError
from distill.eval import fit
from distill.eval.fit import aligned_depth, alignment_plan, measure
from distill.eval.metrics import all_metrics, from_sums
from distill.eval.protocol import Protocol, ProtocolError
from distill.eval.score import read_scores, score, table, write_scores
from tests.eval.known_maps import CLEAN, DEPTHS, DISPARITIES, MARIGOLD, SIZE, as_kind, noisy, numbers, samples, truth


@pytest.mark.parametrize("protocol", [CLEAN, MARIGOLD], ids=["clean", "marigold"])
@pytest.mark.parametrize("kind", DEPTHS + DISPARITIES)
def test_the_truth_itself_scores_perfectly_as_every_kind(kind, protocol):
    got = numbers(as_kind(truth(), kind), truth(), kind, protocol)
    assert got["abs_rel"] < 1e-5 and got["delta1"] == 1.0 and got["silog"] < 1e-2


def test_a_disparity_that_is_partly_negative_is_told_of_and_can_be_offset(tmp_path):
    """Marigold's fit drops pixels <= 0; with a constant added it is the fit of all, to the digit."""
    pred = as_kind(truth(), "affine_disparity") * (1 + 0.3 * np.random.default_rng(1).random(SIZE, dtype=np.float32))
    low = pred - np.float32(np.median(pred))
    offset = MARIGOLD.with_offset("affine_disparity")
    assert offset.offset_positive and offset.id != MARIGOLD.id
    assert MARIGOLD.with_offset("affine_depth") == MARIGOLD and CLEAN.with_offset("affine_disparity") == CLEAN
    published, lawful, whole = (
        measure(maps, truth(), Kind.AFFINE_DISPARITY, protocol)
        for maps, protocol in ((low, MARIGOLD), (low, offset), (pred, MARIGOLD))
    )
    assert lawful.scale == pytest.approx(whole.scale, rel=1e-5) and published.scale != pytest.approx(
        whole.scale, rel=1e-3
    )
    assert published.nonpositive == pytest.approx(0.5, abs=0.1) and whole.nonpositive == 0.0
    for sample in samples():
        (tmp_path / sample.prediction_path).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / sample.prediction_path, low)
    told, fitted = (
        score(tmp_path, "affine_disparity", samples(), MARIGOLD, offset_positive=on) for on in (False, True)
    )
    assert "of the scored pixels are <= 0" in told.problems()[0] and not any("<= 0" in p for p in fitted.problems())
    assert (fitted.protocol.offset_positive, told.protocol.offset_positive) == (True, False)
    write_scores(fitted, tmp_path / "s.json")
    assert read_scores(tmp_path / "s.json").nonpositive == fitted.nonpositive > 0.3


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
    p, t = (map_[target.valid].double() for map_ in (pred, target.values))
    assert got.scale == pytest.approx(float(p @ t / (p @ p)), rel=1e-6) and got.shift == 0


def test_a_spread_of_the_last_digits_is_fitted_as_by_numpy():
    """numpy.linalg.lstsq, which the published evaluation calls, takes it for no constant."""
    target = truth()
    for level in (0.5, 1e4):
        step = np.spacing(np.float32(level)) * np.random.default_rng(0).integers(0, 3, SIZE)
        pred = (np.float32(level) + step).astype(np.float32)
        got = measure(pred, target, Kind.AFFINE_DEPTH, MARIGOLD)
        p, t = (a[target.valid[0].numpy()] for a in (pred, target.values[0].numpy()))
        expected = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), t, rcond=None)[0]
        assert abs(got.scale) > 10 and (got.scale, got.shift) == pytest.approx(tuple(map(float, expected)), rel=1e-4)


def test_pixels_that_the_fit_leaves_out_cost_no_digits():
    pred = as_kind(truth(), "affine_disparity")
    first = tuple(truth().valid[0].nonzero()[0].tolist())
    fits = []
    for value in (-1.0, -1e9):
        pred[first] = value
        fits.append(measure(pred, truth(), Kind.AFFINE_DISPARITY, MARIGOLD))
    assert (fits[1].scale, fits[1].shift) == pytest.approx((fits[0].scale, fits[0].shift), rel=1e-5)


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


@pytest.mark.parametrize("far", [False, True])
def test_each_clip_is_applied_where_it_alone_reaches(far):
    disparity = np.linspace(0.01, 1.0, 400, dtype=np.float32).reshape(20, 20)
    depth = DepthMap(torch.from_numpy(1 / disparity)[None], torch.ones(1, 20, 20, dtype=torch.bool), Kind.METRIC_DEPTH)
    pred = disparity.copy()
    pred[(0, 0) if far else (19, 19)] = 0.005 if far else 1.5  # beyond the truth's range at one of its ends
    protocol = Protocol(benchmark="test", max_depth=1000.0)
    got = measure(pred, depth, Kind.AFFINE_DISPARITY, protocol)
    line, target = (got.scale * pred + got.shift).astype(np.float64), 1.0 / disparity.astype(np.float64)

    def abs_rel(floor: float, low: float, high: float) -> float:
        return float((np.abs(np.clip(1 / np.maximum(line, floor), low, high) - target) / target).mean())

    found = {name: float(from_sums(sums[None])["abs_rel"]) for name, sums in {**got.floors, "": got.sums}.items()}
    wanted = {"0.001": abs_rel(1e-3, 1e-6, 1e3), "1/max truth": abs_rel(0.01, 1e-6, 1e3), "": abs_rel(0.01, 1.0, 100.0)}
    assert found == pytest.approx(wanted, rel=1e-4) and wanted["0.001"] > wanted[""]


def test_a_truth_at_the_ends_of_the_range_is_not_scored():
    ends = torch.tensor([[[0.1, 0.2, 50.0, 80.0]]])
    target = DepthMap(ends, torch.ones_like(ends, dtype=torch.bool), Kind.METRIC_DEPTH)
    assert measure(ends[0].numpy(), target, Kind.METRIC_DEPTH, CLEAN).sums[0] == 2


def test_marigolds_fit_sees_the_columns_that_its_upsampling_takes():
    target = truth(size=(4, 10))
    pred = as_kind(target, "affine_depth")
    taken = [0, 2, 5, 7]  # of 10 columns for 4: floor(i * 2.5)
    pred[:, [i for i in range(10) if i not in taken]] = 77.0
    got = measure(pred, target, Kind.AFFINE_DEPTH, replace(MARIGOLD, fit_columns=4))
    assert (got.scale, got.shift) == pytest.approx((1 / 0.3, -2.0 / 0.3), rel=1e-4)


@pytest.mark.parametrize(
    ("size", "limit"), [((2, 18), 14), ((3, 22), 14), ((30, 20), 11), ((2, 40), 40), ((4, 97), 31)]
)
def test_those_columns_are_torchs_to_the_last_bit_of_its_float32(size, limit):
    columns = torch.arange(float(size[1])).expand(1, *size).contiguous()
    taken = torch.nn.Upsample(scale_factor=limit / max(size), mode="nearest")(columns)
    found = fit._fewer_columns(columns[0].numpy(), columns[0].numpy(), np.ones(size, bool), limit)
    assert all(np.array_equal(one, taken.flatten().numpy()) for one in found)


def test_the_valid_pixels_of_a_map_of_several_pieces_are_all_gathered_in_order():
    draw = np.random.default_rng(0)
    first, second = draw.random((2, 700, 900), dtype=np.float32)
    valid = draw.random((700, 900)) < 0.5
    found = fit._gather(valid, first, second)
    assert np.array_equal(found[0], first[valid]) and np.array_equal(found[1], second[valid])


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("against", Kind)
def test_every_pair_of_kinds_has_one_way_or_a_refusal(kind, against):
    if against.unknown == "affine" and kind.unknown == "affine" and kind.quantity != against.quantity:
        with pytest.raises(KindError, match=f"{kind}.*{against}.*metric"):
            alignment_plan(kind, against)
        return
    path = alignment_plan(kind, against)
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
    with pytest.raises(ValueError, match="alignment must be one of auto, affine, scale, median, l1, not 'lstsq'"):
        score(store, "affine_depth", samples(), CLEAN, alignment="lstsq")
    metric = score(store, "metric_depth", samples(), CLEAN, alignment="affine")
    assert metric.metrics == ids["auto"].metrics and metric.protocol == ids["auto"].protocol
    with pytest.raises(KindError, match="median and l1 fit a scale only"):
        alignment_plan(Kind.SCALE_DEPTH, Kind.AFFINE_DEPTH, "scale by medians in depth")


def test_depth_without_its_shift_is_never_scored_in_disparity():
    truth = DepthMap(
        torch.linspace(1, 9, 24).reshape(1, 4, 6), torch.ones(1, 4, 6, dtype=torch.bool), Kind.METRIC_DEPTH
    )
    pred, protocol = truth.values[0].numpy(), replace(CLEAN, space="disparity")
    assert measure(pred, truth, Kind.SCALE_DEPTH, protocol).scale == pytest.approx(1.0)
    with pytest.raises(KindError, match="affine_depth cannot be scored in disparity"):
        measure(pred, truth, Kind.AFFINE_DEPTH, protocol)


def test_a_median_that_is_not_positive_is_remarked_on(store):
    np.save(store / "part/pred_01.npy", -noisy(1))
    got = score(store, "scale_depth", samples(), CLEAN, alignment="median")
    assert got.images[1].scale == 0.0 and "scored pixels are not positive" in got.images[1].problem


def test_the_scale_of_medians_leaves_out_what_is_not_positive_where_marigold_does():
    pred, truth = np.float32([-3, -2, -1, 1, 2, 4]), np.float32([9, 9, 9, 1, 1, 1])
    assert fit._median_scale(pred, truth, invert=True, positive=True) == 0.5
    assert fit._median_scale(pred, truth, invert=True, positive=False) == 0.0
    assert fit._median_scale(pred + 2, truth, invert=False, positive=True) == 2.5, "of depth none"


def test_the_scale_of_least_relative_error_is_the_least_of_all():
    draw = np.random.default_rng(0)
    pred, truth = draw.uniform(0.1, 5, (2, 41)).astype(np.float32)
    pred[::5] *= np.float32(-0.5)  # counts as well, as in MoGe's code
    pred[7] = 0
    found = fit._l1_scale(pred, truth, invert=False)
    tried = found * np.linspace(0.5, 2, 301)
    errors = (np.abs(tried[:, None] * pred - truth) / truth).sum(1)
    assert (np.abs(found * pred - truth) / truth).sum() <= errors.min() + 1e-5


@pytest.mark.parametrize(("times", "said"), [(1000, True), (0.001, True), (3, False), (1, False)])
def test_metres_in_another_unit_are_told_of(times, said):
    pred = as_kind(truth(), "metric_depth") * np.float32(times)
    notes = measure(pred, truth(), Kind.METRIC_DEPTH, CLEAN).notes
    assert any(f"its metres are {times:.3g} times the truth's" in note for note in notes) is said


@pytest.mark.parametrize(("clip", "farthest"), [("truth", 4.0), ("range", 50.0)])
def test_an_aligned_map_is_held_inside_the_truth_that_the_range_leaves(clip, farthest):
    """Four pixels, of which the last one's truth lies beyond the range; there the prediction says 50 m."""
    depth = torch.tensor([[[1.0, 2.0, 4.0, 100.0]]])
    target = DepthMap(depth, depth > 0, Kind.METRIC_DEPTH)
    pred = np.float32([[1.0, 0.5, 0.25, 0.02]]) * np.float32(0.3) + np.float32(2.0)
    protocol = replace(CLEAN, clip=clip, disparity_floor=1e-3)
    found, measured = aligned_depth(pred, target, Kind.AFFINE_DISPARITY, protocol)
    assert found[0].tolist() == pytest.approx([1.0, 2.0, 4.0, farthest], rel=1e-3) and measured.sums[0] == 3


def test_metres_are_aligned_to_nothing():
    pred = as_kind(truth(), "metric_depth") * np.float32(9)
    for scaled in (False, True):
        found, measured = aligned_depth(pred, truth(), Kind.METRIC_DEPTH, CLEAN, scaled=scaled)
        assert np.array_equal(found, pred) and (measured.scale, len(measured.sums)) == (1.0, 0)


def test_a_pixel_at_zero_is_one_that_marigolds_fit_leaves_out():
    pred = as_kind(truth(), "metric_disparity")
    pred[:20] = 0.0
    share = float((pred[truth().valid[0].numpy()] <= 0).mean())
    assert measure(pred, truth(), Kind.AFFINE_DISPARITY, MARIGOLD).nonpositive == pytest.approx(share) and share > 0.4


@pytest.mark.parametrize("kind", DEPTHS + DISPARITIES)
def test_only_what_a_kind_leaves_unknown_is_fitted_by_its_own_protocol(kind):
    got = measure(3 * as_kind(truth(), kind), truth(), Kind(kind), CLEAN.with_kind(kind))
    error = float(from_sums(got.sums[None])["abs_rel"])
    if Kind(kind).unknown == "metric":
        assert error == pytest.approx(2.0 if kind in DEPTHS else 2 / 3, rel=1e-3)
        assert got.scale_error == pytest.approx(2.0 if kind in DEPTHS else -2 / 3, rel=1e-3) and got.scale == 1.0
    else:
        assert error < 1e-4 and got.scale_error is None


def test_a_fit_that_has_positive_pixels_is_not_said_to_have_none():
    pred = as_kind(truth(), "affine_disparity") - np.float32(2.1)
    assert pred.min() < 0 < pred.max()
    notes = measure(pred, truth(), Kind.AFFINE_DISPARITY, MARIGOLD).notes
    assert not any("nothing to fit" in note for note in notes)
    notes = measure(pred - np.float32(9), truth(), Kind.AFFINE_DISPARITY, MARIGOLD).notes
    assert any("nothing to fit" in note for note in notes)


def test_a_prediction_of_another_size_is_not_compared_at_wrong_pixels():
    pred = noisy(0)
    for wrong in (pred[: SIZE[0] // 2], pred.T, pred[None], np.pad(pred, 4)):
        with pytest.raises(ValueError, match=r"must have one size, not .*: resize it first"):
            measure(wrong, truth(), Kind.METRIC_DEPTH, CLEAN.with_kind("metric_depth"))
        with pytest.raises(ValueError, match="must have one size"):
            aligned_depth(wrong, truth(), Kind.METRIC_DEPTH, CLEAN)
    half = pred.astype(np.float16)
    found, expected = (numbers(p, truth(), "metric_depth", CLEAN) for p in (half, half.astype(np.float32)))
    assert found == expected
