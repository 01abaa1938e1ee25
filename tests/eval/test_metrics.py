"""The ten metrics: against plain float64, against the published functions, and what must never leak into them."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.core.depth import DepthMap, Kind
from distill.eval.boundary import boundary_f1
from distill.eval.fit import measure
from distill.eval.metrics import METRICS, all_metrics, block_sums, from_sums, sums
from distill.eval.protocol import Protocol

# Names of the published functions.
PUBLISHED = {
    "abs_relative_difference": "abs_rel",
    "squared_relative_difference": "sq_rel",
    "rmse_linear": "rmse",
    "rmse_log": "rmse_log",
    "log10": "log10",
    "delta1_acc": "delta1",
    "delta2_acc": "delta2",
    "delta3_acc": "delta3",
    "i_rmse": "i_rmse",
    "silog_rmse": "silog",
}
MARIGOLD = Protocol(
    benchmark="golden",
    mode="marigold",
    fit_positive=True,
    disparity_floor=1e-3,
    min_depth=1e-3,
    max_depth=6.0,
    clip="range",
    mask_range=False,
)


def maps(height: int = 300, width: int = 400, batch: int = 2):
    target = torch.rand(batch, height, width) * 9 + 0.5
    pred = target * (1 + 0.6 * (torch.rand_like(target) - 0.5))
    return pred, target, torch.rand_like(target) < 0.7


def plainly(pred, target, valid) -> dict[str, float]:
    p, t = pred[valid].double().numpy(), target[valid].double().numpy()
    log, worst = np.log(p) - np.log(t), np.maximum(p / t, t / p)
    return {
        "abs_rel": np.mean(abs(p - t) / t),
        "sq_rel": np.mean((p - t) ** 2 / t),
        "rmse": np.sqrt(np.mean((p - t) ** 2)),
        "rmse_log": np.sqrt(np.mean(log**2)),
        "log10": np.mean(abs(np.log10(p) - np.log10(t))),
        "delta1": np.mean(worst < 1.25),
        "delta2": np.mean(worst < 1.25**2),
        "delta3": np.mean(worst < 1.25**3),
        "i_rmse": np.sqrt(np.mean((1 / p - 1 / t) ** 2)),
        "silog": 100 * np.std(log),
    }


def test_metrics_are_their_definitions_on_maps_larger_than_a_block():
    pred, target, valid = maps()
    got = all_metrics(pred, target, valid)
    for image in range(2):
        for name, value in plainly(pred[image], target[image], valid[image]).items():
            assert float(got[name][image]) == pytest.approx(value, rel=2e-6), name


@pytest.mark.parametrize("name", METRICS)
def test_every_row_of_the_table_knows_which_way_is_better(name):
    pred, target, valid = maps(20, 30)
    row = METRICS[name]
    alone, perfect, worse = (all_metrics(p, target, valid)[name] for p in (pred, target, 3 * pred * pred))
    assert alone.shape == (2,) and alone.dtype == torch.float32
    assert torch.equal(perfect, torch.full((2,), 0.0 if row.lower_is_better else 1.0))
    assert (worse > alone).all() if row.lower_is_better else (worse < alone).all()
    assert float(row.format.format(0.5)) == 0.5


def test_invalid_pixels_do_not_leak():
    pred, target, valid = maps()
    clean = all_metrics(pred, target, valid)
    for poison in (math.nan, math.inf, -1.0, 0.0):
        dirty = all_metrics(torch.where(valid, pred, poison), torch.where(valid, target, poison), valid)
        assert all(torch.equal(clean[name], dirty[name]) for name in METRICS)


def test_a_batch_is_its_images():
    pred, target, valid = maps(90, 110, batch=3)
    together = all_metrics(pred, target, valid)
    for image in range(3):
        one = slice(image, image + 1)
        alone = all_metrics(pred[one], target[one], valid[one])
        assert all(torch.equal(together[name][one], alone[name]) for name in METRICS)


def test_an_image_without_valid_pixels_is_nan_and_its_neighbour_is_not():
    pred, target, valid = maps(8, 9)
    valid[0] = False
    got = all_metrics(pred, target, valid)
    assert all(got[name][0].isnan() and got[name][1].isfinite() for name in METRICS)


def test_deltas_are_strict():
    target = torch.ones(1, 1, 4)
    pred = torch.tensor([[[1.25, 0.8, 1.25**2, 1.25**3]]])
    got = all_metrics(pred, target, torch.ones(1, 1, 4, dtype=torch.bool))
    assert [float(got[f"delta{i}"]) for i in (1, 2, 3)] == [0.0, 0.5, 0.75]


def test_silog_outlasts_a_wrong_scale_and_is_zero_of_one_pixel():
    """Float32 sums would lose the variance beside the squared mean: 0.03 in place of 0, and 2e-4 of the value."""
    pred, target, valid = maps(60, 70, batch=1)
    assert float(all_metrics(1e-6 * pred, target, valid)["silog"]) == pytest.approx(
        plainly(1e-6 * pred[0], target[0], valid[0])["silog"], rel=1e-6
    )
    valid = torch.zeros_like(valid).index_put_((torch.tensor(0), torch.tensor(7), torch.tensor(9)), torch.tensor(True))
    assert float(all_metrics(1e-3 * pred, target, valid)["silog"]) == 0.0


def test_sums_of_images_add_up_to_their_union():
    pred, target, valid = maps()
    pooled = from_sums(sums(pred, target, valid).sum(0, keepdim=True))
    union = plainly(pred, target, valid)
    assert all(float(pooled[name]) == pytest.approx(union[name], rel=2e-6) for name in METRICS)
    assert torch.equal(block_sums(pred[0, 0], target[0, 0]), sums(pred[:1, :1], target[:1, :1])[0])


# --- against the published functions ----------------------------------------------------------------------------------


def truth_of(data, name: str) -> DepthMap:
    gt, mask = torch.from_numpy(data[f"{name}.gt"]), torch.from_numpy(data[f"{name}.mask"])
    return DepthMap(gt[None], mask[None], Kind.METRIC_DEPTH)


def close(got: dict, expected: dict[str, float], rel: float = 1e-5) -> None:
    for published, value in expected.items():
        assert float(got[PUBLISHED[published]]) == pytest.approx(value, rel=rel), published


@pytest.mark.parametrize("item", ["dense", "sparse", "portrait", "real_like", "three_pixels"])
def test_alignment_and_metrics_are_the_published_ones(golden, item):
    case, data = golden("eval_metrics")
    expected = next(entry for entry in case["items"] if entry["id"] == item)
    truth = truth_of(data, item)
    depth = measure(data[f"{item}.pred"], truth, Kind.AFFINE_DEPTH, MARIGOLD)
    close(from_sums(depth.sums[None]), expected["metrics_aligned_clipped"])
    disparity = measure(data[f"{item}.disp"], truth, Kind.AFFINE_DISPARITY, MARIGOLD)
    close(from_sums(disparity.sums[None]), expected["metrics_disparity_path"])
    fitted = expected["disparity_align"]
    assert (disparity.scale, disparity.shift) == pytest.approx((fitted["scale"], fitted["shift"]), rel=1e-6)
    for columns in (None, 1024, 32, 17):
        fitted = expected[f"align_maxres_{columns}"]
        got = measure(data[f"{item}.pred"], truth, Kind.AFFINE_DEPTH, replace(MARIGOLD, fit_columns=columns))
        assert (got.scale, got.shift) == pytest.approx((fitted["scale"], fitted["shift"]), rel=1e-6), columns


def test_degenerate_alignments_are_the_published_ones(golden):
    case, data = golden("eval_metrics")
    for name in ("constant_pred", "one_valid"):
        got = measure(data[f"deg.{name}.pred"], truth_of(data, f"deg.{name}"), Kind.AFFINE_DEPTH, MARIGOLD)
        expected = case["degenerate"][name]
        assert (got.scale, got.shift) == pytest.approx((expected["scale"], expected["shift"]), rel=1e-6)
    with pytest.raises(ValueError, match="no valid pixel"):
        measure(data["deg.no_valid.pred"], truth_of(data, "deg.no_valid"), Kind.AFFINE_DEPTH, MARIGOLD)


def test_batches_and_maps_without_a_mask_are_the_published_ones(golden):
    case, data = golden("eval_metrics")
    pred, gt = (torch.from_numpy(data[f"nomask.{name}"])[None] for name in ("pred", "gt"))
    close(from_sums(sums(pred, gt)), case["no_mask"])
    got = all_metrics(*(torch.from_numpy(data[f"batch.{name}"]) for name in ("pred", "gt", "mask")))
    # Over a batch, the published log10 and silog are not means of per-image values; every other metric is.
    expected = {k: v for k, v in case["batch_of_two_mean"].items() if k not in ("log10", "silog_rmse")}
    close({name: value.mean() for name, value in got.items()}, expected)


def test_the_units_are_those_of_metres():
    assert {name: row.unit for name, row in METRICS.items() if row.unit} == {
        "sq_rel": "m",
        "rmse": "m",
        "i_rmse": "1/m",
    }


def test_half_precision_counts_all_its_pixels():
    """In float16 the number of pixels, and the sums over them, would be infinite: a delta1 of 0."""
    target = torch.arange(90000.0).remainder(7).reshape(1, 300, 300) + 1
    pred, valid = target.flip(2), target > 0
    expected = all_metrics(pred, target, valid)
    assert all(
        torch.equal(value, expected[name]) for name, value in all_metrics(pred.half(), target.half(), valid).items()
    )


@pytest.mark.parametrize("measured", [sums, boundary_f1])
def test_maps_of_different_shapes_are_not_compared(measured):
    pred, target = torch.rand(2, 3, 5, 6) + 1
    valid = target > 0
    wrong = [(pred, target.mT, valid), (pred[:, None], target, valid), (pred[:1], target, valid)]
    for maps in [*wrong, (pred, target, valid.long())]:
        with pytest.raises(ValueError, match="of one shape|valid must be bool"):
            measured(*maps)


@pytest.mark.parametrize("fault", [{"task": "normals"}, {"mode": "dirty"}, {"space": "depth"}])
def test_a_protocol_of_no_known_task_mode_or_space_is_refused(fault):
    ((name, value),) = fault.items()
    with pytest.raises(ValueError, match=f"a protocol's {name} must be .*, not '{value}'"):
        Protocol(benchmark="maps", **fault)


def test_a_protocols_setting_is_its_id_without_the_alignment():
    plain, fitted = (Protocol(benchmark="maps", alignment=words) for words in ("", "scale and shift"))
    assert plain.id != fitted.id and plain.setting == fitted.setting == plain.id
    assert re.fullmatch("[0-9a-f]{12}", plain.id) and Protocol(benchmark="maps", num_images=1).setting != plain.setting
    assert plain.as_dict()["max_depth"] == "inf"
