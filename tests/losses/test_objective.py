"""The objective: region and patches meet to the pixel, and its parts add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distill.core.crop_settings import CropSettings
from distill.core.crops import cut_patches, cut_region, plan, sample_boxes, student_blocks
from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import Labels
from distill.losses.losses import compare
from distill.losses.objective import Objective, _nearer, _plus
from distill.losses.settings import LossSettings
from tests.losses.test_losses import INVARIANT


def ramp_labels(kind: str = "affine_disparity", *, draw: int = 0, size: int = 140, patch: int = 112, how: str = "grid"):
    """A linear ramp over an image, its region as the student's output, and an analytic teacher's labels of it."""
    rows, columns = torch.arange(300) + 0.5, torch.arange(280) + 0.5
    image = (0.2 * rows[:, None] + 0.6 * columns[None])[None] / 300
    settings = CropSettings(size=size, min_side=200, patches=how, num_patches=3, patch_size=patch)
    p = plan(300, 280, settings, key="k", draw=draw)
    r = p.region
    grid = (torch.arange(size) + 0.5) / size * r.side
    region = ((r.top + grid)[:, None] * 0.2 + (r.left + grid)[None] * 0.6) / 300
    local = cut_patches(image, p)[:, 0]
    shared = DepthMap(region[None], torch.ones(1, size, size, dtype=torch.bool), Kind(kind))
    patches = DepthMap(local * 4 + 1, torch.ones_like(local, dtype=torch.bool), Kind(kind))
    assert cut_region(image, p).shape == (1, size, size)
    return region[None], Labels(shared, patches, p.boxes()[None])


@pytest.mark.parametrize("where", ["patch", "student"])
@pytest.mark.parametrize(("size", "patch", "how"), [(140, 112, "grid"), (97, 96, "random"), (224, 64, "random")])
def test_a_ramp_has_no_loss_at_any_crop_and_patch(size, patch, how, where):
    """Every region and patch of many draws, wherever labels and student meet; half a pixel off and it would have."""
    objective = Objective(LossSettings(feature=0.0, patch_resolution=where))
    for draw in range(6):
        pred, labels = ramp_labels(draw=draw, size=size, patch=patch, how=how)
        total, parts = objective(3 * pred - 1, labels)
        assert total.item() < 1e-4, (draw, parts)
        shift = 0.5 / size
        moved = Labels(labels.shared, labels.local, labels.boxes + torch.tensor([shift, -shift, shift, -shift]))
        # Patches of a ramp that lie elsewhere differ by a shift alone, which every normalization forgives.
        raw = Objective(LossSettings(normalization="none", feature=0.0, gradient=0.0, patch_resolution=where))
        exact = DepthMap((labels.local.values - 1) / 4, labels.local.valid, labels.local.kind)
        right = raw(pred, Labels(labels.shared, exact, labels.boxes))[1]["local_global"]
        wrong = raw(pred, Labels(labels.shared, exact, moved.boxes))[1]["local_global"]
        assert right.item() < 1e-5 and wrong.item() > 50 * right.item(), (draw, right, wrong)


@pytest.mark.parametrize("where", ["patch", "student"])
def test_patches_are_compared_where_both_are_known(where):
    """Invalid label pixels, patches without labels, and what lies beyond the outermost centres never count."""
    pred, labels = ramp_labels()
    objective = Objective(LossSettings(normalization="none", feature=0.0, gradient=0.0, patch_resolution=where))
    exact = (labels.local.values - 1) / 4
    hole = torch.zeros_like(labels.local.valid)
    hole[:, 30:60, 50:80] = True
    hole[-1] = True
    poisoned = DepthMap(torch.where(hole, torch.nan, exact), ~hole, labels.local.kind)
    pred.requires_grad_()
    loss = objective(pred, Labels(labels.shared, poisoned, labels.boxes))[1]["local_global"]
    assert loss.item() < 1e-5
    wrong = exact + torch.linspace(0, 1, len(exact))[:, None, None]
    loss = objective(pred, Labels(labels.shared, DepthMap(wrong, ~hole, labels.local.kind), labels.boxes))[1]
    grad = torch.autograd.grad(loss["local_global"].sum(), pred)[0]
    assert grad.isfinite().all() and (grad != 0).any()
    expected = torch.linspace(0, 1, len(exact))[:-1].mean()
    assert loss["local_global"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_students_own_pixels_are_not_interpolated():
    """Between its pixels a student may say anything: at its own resolution only what it says at them counts."""
    pred, labels = ramp_labels(size=64)
    blocks, _, number = student_blocks(labels.boxes, 64)
    seen, inside = sample_boxes(pred, blocks, number)
    first = (blocks[..., :2] * 64).round().long()
    for k in range(blocks.shape[1]):
        top, left = first[0, k].tolist()
        torch.testing.assert_close(seen[0, k], pred[0, top : top + number, left : left + number])
    assert inside.all()


@pytest.mark.parametrize("name", INVARIANT)
def test_a_perfect_student_of_an_analytic_teacher_has_no_loss_anywhere(name):
    pred, labels = ramp_labels()
    objective = Objective(LossSettings(normalization=name, feature=0.0, anchor=0.0))
    total, parts = objective(pred * 2 - 5, labels)
    assert set(parts) == {"shared", "local_global", "gradient", "dead_contexts"}
    assert total.shape == (1,) and total.item() < 1e-4
    worse, _ = objective(pred.flip(2), labels)
    assert worse.item() > 0.5


def test_the_objective_is_the_weighted_sum_of_its_named_parts():
    pred, labels = ramp_labels()
    pred = pred + 0.05 * torch.rand_like(pred)
    features, reference = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    weights = LossSettings(shared=0.7, local_global=0.3, feature=1.1, gradient=1.9, anchor=0.2)
    total, parts = Objective(weights)(pred, labels, features, reference)
    expected = sum(getattr(weights, name) * value for name, value in parts.items() if name != "dead_contexts")
    torch.testing.assert_close(total, expected)
    assert LossSettings() == LossSettings(shared=1.0, local_global=0.5, feature=1.0, gradient=2.0, anchor=0.0)


@pytest.mark.parametrize("weight", [1.0, 0.5, 2.0, 0.3, 3.0])
def test_a_sum_in_one_operation_has_the_bits_of_two(weight):
    total, value = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 10_000)
    value.requires_grad_()
    for first, expected in ((None, weight * value), (total, total + weight * value)):
        found = _plus(first, weight, value)
        assert torch.equal(found, expected)
        slopes = [torch.autograd.grad(sum_, value, total)[0] for sum_ in (found + 0.0, expected)]
        assert torch.equal(*slopes)


def test_labels_that_are_not_disparity_are_refused():
    pred, labels = ramp_labels("affine_depth")
    with pytest.raises(KindError, match="affine_depth"):
        Objective()(pred, labels)


@pytest.mark.parametrize("where", ["patch", "student"])
def test_a_pixel_that_an_average_gives_no_weight_says_nothing(where):
    """Of region and patches: the teachers disagree in their lower halves, where the student is wrong."""
    shared = DepthMap(torch.rand(1, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool), Kind.AFFINE_DISPARITY)
    weight = torch.ones(1, 8, 8)
    weight[:, 4:] = 0.0
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    labels = Labels(shared, shared, boxes, weight, weight)
    pred = shared.values.clone()
    pred[:, 4:] += 1.0
    raw = Objective(LossSettings(normalization="none", feature=0.0, gradient=0.0, patch_resolution=where))
    for part in ("shared", "local_global"):
        assert raw(pred, labels)[1][part].item() == pytest.approx(0.0, abs=1e-6)
        assert raw(pred, replace(labels, shared_weight=None, local_weight=None))[1][part].item() > 0.4
    assert raw(pred, replace(labels, local_weight=1 - weight))[1]["local_global"].item() == pytest.approx(1.0)


def test_without_normalization_gradients_are_of_the_maps_as_they_are():
    values = torch.rand(1, 16, 16)
    shared = DepthMap(values, torch.ones_like(values, dtype=torch.bool), Kind.AFFINE_DISPARITY)
    labels = Labels(shared, None, torch.zeros(1, 0, 4))
    for name, scale_counts in (("none", True), ("global", False)):
        parts = Objective(LossSettings(normalization=name, feature=0.0))(3 * values, labels)[1]
        assert (parts["gradient"].item() > 0.1) is scale_counts


def test_a_label_at_the_largest_depth_still_teaches():
    values = torch.tensor([[[10.0, 10.5], [0.0, 5.0]]])
    kept = _nearer(DepthMap(values, torch.ones_like(values, dtype=torch.bool), Kind.METRIC_DEPTH), 10.0)
    assert kept.valid.tolist() == [[[True, False], [False, True]]]
    inverse = torch.tensor([[[0.1, 0.09], [0.0, 0.2]]])
    kept = _nearer(DepthMap(inverse, torch.ones_like(inverse, dtype=torch.bool), Kind.METRIC_DISPARITY), 10.0)
    assert kept.valid.tolist() == [[[True, False], [False, True]]]


@pytest.mark.parametrize(
    "options",
    [{"trim_top": 0.3}, {"label_only": True}, {"reference_hdn": True}, {"reference_hdn": True, "contexts": "dp"}],
)
def test_the_options_of_the_normalization_reach_it(options):
    values, pred = torch.rand(2, 1, 24, 24)
    shared = DepthMap(values, torch.ones_like(values, dtype=torch.bool), Kind.AFFINE_DISPARITY)
    labels = Labels(shared, None, torch.zeros(1, 0, 4))
    settings = LossSettings(normalization="hybrid", feature=0.0, gradient=0.0, **options)
    found = Objective(settings)(pred, labels)[1]["shared"]
    assert torch.equal(found, compare(pred, values, shared.valid, "hybrid", **options).loss)
    assert not torch.isclose(found, compare(pred, values, shared.valid, "hybrid").loss, rtol=1e-4)


def test_only_metres_are_beyond_the_largest_depth():
    objective = Objective(kind=Kind.METRIC_DEPTH, max_depth=10.0)
    for kind, known in ((Kind.METRIC_DEPTH, False), (Kind.SCALE_DEPTH, True), (Kind.AFFINE_DISPARITY, True)):
        shared = DepthMap(torch.full((1, 2, 2), 50.0), torch.ones(1, 2, 2, dtype=torch.bool), kind)
        kept = objective._within(Labels(shared, shared, torch.zeros(1, 1, 4)))
        assert bool(kept.shared.valid.any()) is bool(kept.local.valid.any()) is known


def test_nothing_of_a_loss_is_computed_under_autocast(monkeypatch):
    pred, labels = ramp_labels()
    seen = lambda self, pred, *rest: (torch.is_autocast_enabled("cpu"), pred.dtype)  # noqa: E731
    monkeypatch.setattr(Objective, "_sum", seen)
    with torch.autocast("cpu", torch.bfloat16):
        assert Objective()(pred.bfloat16(), labels) == (False, torch.float32)
