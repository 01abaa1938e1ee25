"""The objective: region and patches meet to the pixel, and its parts add up."""

from __future__ import annotations

import pytest
import torch

from distill.core.crop_settings import CropSettings
from distill.core.crops import cut_patches, cut_region, plan, sample_boxes, student_blocks
from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import Labels
from distill.losses.objective import Objective
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


def test_labels_that_are_not_disparity_are_refused():
    pred, labels = ramp_labels("affine_depth")
    with pytest.raises(KindError, match="affine_depth"):
        Objective()(pred, labels)
