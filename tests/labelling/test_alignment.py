"""labels.align = "truth": a robust scale and shift to sparse, wrong points; bad fits are dropped and counted."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from distill.app.recipe import parse
from distill.app.strict import RecipeError
from distill.core.depth import DepthMap, Kind
from distill.data.photos import Photo
from distill.data.sources import Entry, Rejected, in_shards
from distill.labelling.alignment import Aligned, align_maps, fit_robustly
from distill.labelling.annotate import annotate
from distill.labelling.jobs import prepare
from distill.labelling.run import CropSettings, LabelSettings, label
from distill.shards.shards import LabelDataset, read_manifest
from tests.labelling.formula import Formula

G = torch.Generator().manual_seed(0)
YS, XS = torch.meshgrid(torch.arange(48) / 48, torch.arange(64) / 64, indexing="ij")
DEPTH = 2 + 5 * XS + 2 * YS + (XS > 0.5) * 3


def sparse(share=0.05, wrong=0.3, depth=DEPTH) -> DepthMap:
    """A twentieth of the pixels, three in ten of them off by a factor of 0.3 to 3."""
    g = torch.Generator().manual_seed(1)
    valid = torch.rand(depth.shape, generator=g) < share
    off = torch.rand(depth.shape, generator=g) < wrong
    factor = torch.exp(torch.rand(depth.shape, generator=g) * 2.2 - 1.1)
    return DepthMap(torch.where(off, depth * factor, depth)[None], valid[None], Kind.METRIC_DEPTH)


@pytest.mark.parametrize("kind", ["affine_disparity", "affine_depth", "scale_depth", "scale_disparity"])
def test_sparse_wrong_points_make_a_dense_metric_map(kind):
    quantity, unknown = Kind(kind).quantity, Kind(kind).unknown
    said = (DEPTH if quantity == "depth" else 1 / DEPTH) * 0.37 + (4 if unknown == "affine" else 0)
    truth = sparse()
    out, [fit] = align_maps(
        DepthMap(said[None], torch.ones_like(said[None], dtype=torch.bool), Kind(kind)),
        truth,
        max_residual=0.3,
        min_inliers=0.5,
    )
    assert out.kind == f"metric_{quantity}" and out.valid.all() and not fit["dropped"]
    metres = out.convert("metric_depth").values[0]
    assert ((metres - DEPTH).abs() / DEPTH).max() < 0.01
    assert fit["inliers"] == pytest.approx(0.7, abs=0.08) and fit["residual"] < 0.01
    assert fit["points"] == int(truth.valid.sum())
    least = np.polyfit(said[truth.valid[0]].numpy(), truth.convert(out.kind).values[truth.valid].numpy(), 1)
    assert abs(least[0] * 0.37 - 1) > 0.05, "plain least squares would have done"


def test_points_are_taken_from_the_whole_map():
    """Three tenths of the rows are of another scale, and the first POINTS pixels are mostly theirs."""
    seen = torch.rand(100, 100, generator=G) + 1
    truth = torch.where(torch.arange(100)[:, None] < 30, seen * 5, seen * 2)
    fit = fit_robustly(seen, truth, torch.ones_like(seen, dtype=torch.bool))
    assert fit.scale == pytest.approx(2) and fit.inliers == pytest.approx(0.7, abs=0.01) and fit.points == 10_000


def test_a_rounded_truth_is_no_outlier():
    """Where most points fit exactly, an error below a hundredth of the truth's spread is still an inlier."""
    off = (torch.rand(48, 64, generator=G) < 0.4) * 0.005 * (DEPTH - DEPTH.median()).abs().mean()
    fit = fit_robustly(DEPTH, DEPTH + off, torch.ones_like(DEPTH, dtype=torch.bool))
    assert fit.inliers == 1 and fit.scale == pytest.approx(1, abs=0.01)


def test_what_would_lie_behind_the_camera_is_invalid():
    said = DEPTH.clone()
    said[0, 0] = -50.0
    truth = sparse(wrong=0.0)
    truth.valid[0, 0, 0] = False
    label_ = DepthMap(said[None], torch.ones_like(said[None], dtype=torch.bool), Kind.AFFINE_DEPTH)
    out, _ = align_maps(label_, truth, max_residual=0.3, min_inliers=0.5)
    assert not out.valid[0, 0, 0] and int(out.valid.sum()) == DEPTH.numel() - 1


def test_what_does_not_fit_is_nowhere_valid():
    noise = torch.rand(3, 48, 64, generator=G)
    noise[1] = 1 / (DEPTH * 2) * -1  # the wrong way round
    noise[2] = 0.5
    label_ = DepthMap(noise, torch.ones_like(noise, dtype=torch.bool), Kind.AFFINE_DISPARITY)
    truth = sparse(wrong=0.0)
    truth = DepthMap(truth.values.repeat(3, 1, 1), truth.valid.repeat(3, 1, 1), truth.kind)
    out, fits = align_maps(label_, truth, max_residual=0.3, min_inliers=0.5)
    assert not out.valid.any() and all(fit["dropped"] for fit in fits)
    assert (fits[1]["scale"], fits[2]["scale"]) == (0.0, 0.0)
    few = fit_robustly(DEPTH, DEPTH, torch.rand(48, 64, generator=G) < 0.003)
    assert few.scale == 0 and few.residual == 1


class Shape(Formula):
    """Disparity of the image's red channel."""

    def predict(self, images):
        return DepthMap(images[:, 0] * 0.5 + 0.1, torch.ones_like(images[:, 0], dtype=torch.bool), self.kind)


def photo(number: int, *, truth: bool = True, fits: bool = True) -> Photo:
    """A photograph whose red is disparity, with sparse truth."""
    disparity = 1 / DEPTH if fits else torch.rand(48, 64, generator=torch.Generator().manual_seed(number))
    red = (disparity / disparity.max() * 255).round().to(torch.uint8)
    return Photo(f"p{number}", torch.stack([red] * 3), sparse(0.2) if truth else None, f"p{number}")


def test_fits_are_written_down_and_bad_ones_are_counted(tmp_path):
    crops = CropSettings(size=32, min_side=32, patches="grid", patch_size=24)
    photos = [photo(0), photo(1, fits=False), photo(2, truth=False), photo(3)]
    shards = in_shards("x", "x", [Entry(p.key, p.origin, partial(lambda p: p, p)) for p in photos], 10)
    teacher = Aligned(Shape(Kind.AFFINE_DISPARITY), 0.3, 0.5)
    settings = LabelSettings(align="truth", threads=0)
    label(shards, [("shape", teacher)], out=tmp_path, crops=crops, labels=settings)
    manifest = read_manifest(tmp_path)
    reasons = {line["key"]: line["reason"] for line in manifest["quarantine"]}
    assert {*reasons} == {"p1-0", "p2-0"} and "fits the truth badly (residual" in reasons["p1-0"]
    assert reasons["p2-0"] == "no ground truth, which shape is fitted to"
    card = manifest["teachers"]["shape"]
    assert card["stored"] == ["metric_disparity"] and card["align"]["dropped"]["regions"] == 0
    sample = LabelDataset(tmp_path)[0]
    shared, record = sample.labels["shape"].shared, sample.record["labels"]["shape"]["align"]
    assert record["shared"]["inliers"] > 0.5 and len(record["local"]) == len(sample.labels["shape"].local)
    job = prepare(photos[0], crops=crops)
    known = job.truth.shared.valid[0]
    near = (shared.convert("metric_depth").values[0] / job.truth.shared.values[0] - 1).abs()[known]
    assert near.median() < 0.02 and shared.valid.float().mean() > 0.99
    again = [s for s in annotate([job], [("shape", teacher)], labels=settings) if not isinstance(s, Rejected)]
    assert again[0].record["labels"]["shape"]["align"] == record


def test_a_recipe_says_what_lacks():
    teachers = [{"name": "depth_anything_v2"}]
    for table, words in (
        ({"images": [{"photos": "x"}], "labels": {"align": "truth"}}, r"images\[0\] has no ground truth, but"),
        ({"labels": {"align": "truth", "bridge": "primary"}}, "remove bridge"),
        ({"labels": {"align_residual": 0.0}}, "align_residual must be in"),
    ):
        with pytest.raises(RecipeError, match=words):
            parse({"run": {"name": "x"}, "teachers": teachers} | table)
    plain = parse({"run": {"name": "x"}, "teachers": teachers}).labels.content
    assert not {key for key in plain if key.startswith("align")}


def test_a_fit_that_few_points_share_is_dropped():
    """Half of the points are of another scene: what fits the other half well may be no label."""
    said = DepthMap(DEPTH[None] * 0.5, torch.ones(1, *DEPTH.shape, dtype=torch.bool), Kind.SCALE_DEPTH)
    for least, dropped in ((0.3, False), (0.6, True)):
        out, [fit] = align_maps(said, sparse(share=0.5, wrong=0.5), max_residual=0.3, min_inliers=least)
        assert fit["dropped"] is dropped and bool(out.valid.any()) is not dropped
        assert fit["residual"] < 0.1 and 0.3 < fit["inliers"] < 0.6


def plain(noise: float = 0.0, size: int = 40):
    """A map, and noise of a normal distribution to add to what is measured."""
    g = torch.Generator().manual_seed(0)
    return torch.rand(size, size, generator=g) + 0.5, noise * torch.randn(size, size, generator=g)


def test_noise_is_no_outlier_and_what_is_not_finite_no_point():
    x, noise = plain(0.05)
    valid = torch.ones_like(x, dtype=torch.bool)
    fit = fit_robustly(x, 2 * x + 1 + noise, valid, key="k")
    assert (fit.scale, fit.shift) == pytest.approx((2.0, 1.0), abs=0.05) and fit.inliers > 0.98
    holes, truth = x.clone(), 2 * x + 1
    holes[:2], truth[3:5] = torch.nan, torch.inf
    fit = fit_robustly(holes, truth, valid, key="k")
    assert (fit.scale, fit.shift, fit.points) == (pytest.approx(2.0), pytest.approx(1.0), 36 * 40)


def test_a_map_that_falls_where_the_truth_rises_is_never_turned_over():
    x, noise = plain(1.0)
    for spread in (0.05, 0.5, 1.0):
        fit = fit_robustly(x, 3 - x + spread * noise, torch.ones_like(x, dtype=torch.bool), key="k")
        assert (fit.scale, fit.residual) == (0.0, 1.0)


@pytest.mark.parametrize(("points", "fitted"), [(31, False), (32, True)])
def test_a_fit_needs_its_points(points, fitted):
    x, _ = plain()
    few = (torch.arange(1600) < points).reshape(40, 40)
    fit = fit_robustly(x, 2 * x + 1, few, key="k")
    assert fit.points == points and (fit.scale > 0) is fitted


def test_a_scale_alone_is_fitted_where_no_shift_is_unknown_and_the_limit_is_the_limit():
    x, noise = plain(0.1)
    valid = torch.ones(1, 40, 40, dtype=torch.bool)
    truth = DepthMap((2 * x + 1 + noise)[None], valid, Kind.METRIC_DEPTH)
    for kind, shift in ((Kind.SCALE_DEPTH, False), (Kind.AFFINE_DEPTH, True)):
        said = DepthMap(x[None], valid, kind)
        [fit] = align_maps(said, truth, max_residual=1.0, min_inliers=0.0)[1]
        assert (fit["shift"] != 0.0) is shift and not fit["dropped"]
        for times, dropped in ((0.99, True), (1.01, False)):
            out, [again] = align_maps(said, truth, max_residual=times * fit["residual"], min_inliers=0.0)
            assert again["dropped"] is dropped and bool(out.valid.any()) is not dropped
