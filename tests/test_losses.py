"""Losses: exact by definition, invariant where they say so, blind to invalid pixels, finite on degenerate input."""

from __future__ import annotations

import pytest
import torch

from distill.crops import cut_patches, cut_region, plan
from distill.depth import DepthMap, Kind, KindError
from distill.labels import Labels
from distill.losses import anchor_loss, compare, distillation_loss, feature_loss, gradient_loss
from distill.objective import Objective, Weights
from distill.plugins import find, names

NORMALIZATIONS = names("distill.normalize")
INVARIANT = [n for n in NORMALIZATIONS if find("distill.normalize", n).INVARIANT]
LEVELS = {"global": (1,), "hybrid": (1, 2, 4), "local": (4,)}


def example(seed: int = 0, size: tuple[int, int, int] = (3, 20, 24), dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(seed)
    pred, target = torch.rand(size, generator=g, dtype=dtype), torch.rand(size, generator=g, dtype=dtype)
    return pred, target, torch.rand(size, generator=g) > 0.25


def plain_reference(pred, target, valid, levels):
    """The definition, pixel by pixel: contexts by label range, medians and deviations by sorting. One image."""
    p, t = pred[valid], target[valid]
    low, high = t.min(), t.max()
    total, member = torch.zeros_like(p), torch.zeros_like(p)
    for level in levels:
        part = ((t - low) / (high - low) * level).floor().clamp(max=level - 1)
        for k in range(level):
            inside = part == k
            if inside.sum() < 5:
                continue
            normal = []
            for x in (p[inside], t[inside]):
                median = x.sort().values[(len(x) - 1) // 2]
                normal.append((x - median) / (x - median).abs().mean())
            total[inside] += (normal[0] - normal[1]).abs()
            member[inside] += 1
    seen = member > 0
    return (total[seen] / member[seen]).mean()


@pytest.mark.parametrize("name", list(LEVELS))
def test_loss_is_its_definition_and_its_gradient_is_the_definitions(name):
    pred, target, valid = example()
    pred.requires_grad_()
    loss = distillation_loss(pred, target, valid, name)
    expected = torch.stack([plain_reference(pred[b], target[b], valid[b], LEVELS[name]) for b in range(3)])
    torch.testing.assert_close(loss, expected)
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    ours = torch.autograd.grad((loss * weight).sum(), pred)[0]
    theirs = torch.autograd.grad((expected * weight).sum(), pred)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NORMALIZATIONS)
@pytest.mark.parametrize("options", [{}, {"trim_top": 0.1}, {"label_only": True}], ids=str)
def test_gradcheck(name, options):
    pred, target, valid = example(1, (2, 8, 9))
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, target, valid, name, **options), (pred,))


@pytest.mark.parametrize("other", [gradient_loss, anchor_loss])
def test_gradcheck_of_the_other_losses(other):
    pred, target, valid = example(2, (2, 16, 17))
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: other(x, target, valid), (pred,))


@pytest.mark.parametrize("name", INVARIANT)
def test_scale_and_shift_of_the_prediction_do_not_matter(name):
    pred, target, valid = example(3)
    loss = distillation_loss(pred, target, valid, name)
    torch.testing.assert_close(distillation_loss(7.0 * pred - 3.0, target, valid, name), loss)
    torch.testing.assert_close(distillation_loss(pred, 0.1 * target + 40.0, valid, name), loss)
    assert (distillation_loss(5.0 * target + 2.0, target, valid, name) < 1e-9).all()
    assert (distillation_loss(-target, target, valid, name) > 0.5).all()


def test_no_normalization_is_the_mean_absolute_difference():
    pred, target, valid = example(4)
    expected = torch.stack([(pred[b] - target[b]).abs()[valid[b]].mean() for b in range(3)])
    torch.testing.assert_close(distillation_loss(pred, target, valid, "none"), expected)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_invalid_pixels_cannot_leak_and_images_do_not_see_each_other(name):
    pred, target, valid = example(5)
    pred.requires_grad_()
    loss = distillation_loss(pred, target, valid, name)
    poison = torch.where(valid, target, torch.nan)
    bad = torch.where(valid, pred, torch.inf)
    torch.testing.assert_close(distillation_loss(bad, poison, valid, name), loss)
    grad = torch.autograd.grad(distillation_loss(pred, poison, valid, name).sum(), pred)[0]
    assert torch.isfinite(grad).all() and (grad[~valid] == 0).all()
    alone = torch.cat([distillation_loss(pred[b : b + 1], target[b : b + 1], valid[b : b + 1], name) for b in range(3)])
    torch.testing.assert_close(alone, loss)
    for other in (gradient_loss, anchor_loss):
        torch.testing.assert_close(other(bad, poison, valid), other(pred, target, valid))


def degenerate() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    pred, target, valid = example(6, (2, 12, 12), torch.float32)
    one = torch.zeros_like(valid)
    one[:, 3, 4] = True
    ties = (target * 4).floor()
    sky = target.clone()
    sky[:, :6] = 0.0
    return {
        "constant prediction": (pred * 0 + 2.0, target, valid),
        "constant label": (pred, target * 0 + 5.0, valid),
        "zero label": (pred, target * 0, valid),
        "one pixel": (pred, target, one),
        "no pixel": (pred, target, one & ~one),
        "ties": (pred, ties, valid),
        "tied prediction": ((pred * 3).floor(), target, valid),
        "sky": (pred, sky, valid),
        "half precision": (pred.half(), target.half(), valid),
        "bfloat16": (pred.bfloat16(), target.bfloat16(), valid),
        "huge": (pred * 1e6, target * 1e-6, valid),
    }


@pytest.mark.parametrize("case", list(degenerate()))
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_degenerate_input_stays_finite(name, case):
    pred, target, valid = degenerate()[case]
    pred = pred.clone().requires_grad_()
    for trim in (0.0, 0.1):
        loss = distillation_loss(pred, target, valid, name, trim_top=trim)
        loss = loss + gradient_loss(pred, target, valid) + anchor_loss(pred, target, valid)
        assert loss.dtype == torch.float32 and torch.isfinite(loss).all(), case
        grad = torch.autograd.grad(loss.sum(), pred)[0]
        assert torch.isfinite(grad).all(), case


def test_contexts_without_information_are_left_out_and_counted():
    pred, target, valid = example(7, (1, 30, 30))
    assert compare(pred, target, valid, "hybrid").dead.tolist() == [0]
    nothing = compare(pred, target * 0 + 3.0, valid, "hybrid")
    assert nothing.dead.tolist() == [7] and nothing.loss.tolist() == [0.0]
    # A label whose top quarter is one constant value (sky): that context is dead, the others live.
    sky = target.clone() * 0.7
    sky[:, :10] = 1.0
    assert compare(pred, sky, torch.ones_like(valid), "local").dead.tolist() == [1]
    # Two values only: halves and quarters are constant, the whole is not.
    two = (target > 0.5).double()
    assert compare(pred, two, valid, "hybrid").live.tolist() == [1]


def test_the_maximum_belongs_to_the_last_context():
    target = torch.linspace(0, 1, 40, dtype=torch.float64).reshape(1, 5, 8)
    pred = torch.rand(1, 5, 8, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(1, 5, 8, dtype=torch.bool)
    distillation_loss(pred, target, valid, "local").sum().backward()
    assert pred.grad is not None and pred.grad[0, -1, -1] != 0


def test_trim_drops_the_largest_losses():
    target = torch.linspace(0, 1, 100).reshape(1, 10, 10)
    pred = target.clone()
    pred[0, 0, 0] += 50.0
    valid = torch.ones(1, 10, 10, dtype=torch.bool)
    assert distillation_loss(pred, target, valid, "none", trim_top=0.1).item() == 0.0
    assert distillation_loss(pred, target, valid, "none").item() > 0.4
    assert distillation_loss(pred, target, valid, "global", label_only=True, trim_top=0.1).item() < 1e-6


def test_gradient_loss_sums_four_scales_of_neighbour_differences():
    target = torch.zeros(1, 8, 8)
    target[0, :, 4:] = 1.0
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    pred = target.clone()
    pred[0, 2, 2] += 1.0
    raw = gradient_loss(pred, target, valid, normalize=False)
    # The spike at (2,2) has four neighbours at step 1 (64 pixels) and at step 2 (16); steps 4 and 8 do not see it.
    assert raw.item() == pytest.approx(4 / 64 + 4 / 16)
    assert gradient_loss(target * 3 + 1, target, valid).item() < 1e-6


def test_feature_loss_ignores_tokens_above_the_margin():
    a = torch.zeros(1, 2, 1, 2)
    a[0, 0] = 1.0
    b = a.clone()
    b[0, :, 0, 1] = torch.tensor([0.0, 1.0])
    assert feature_loss(a, b).item() == pytest.approx(1.0)
    assert feature_loss(a, a).item() == 0.0


def test_anchor_pulls_the_magnitude_to_the_labels():
    pred, target, valid = example(8)
    assert (anchor_loss(target + 9.0, target, valid) < 1e-9).all()
    torch.testing.assert_close(anchor_loss(target * torch.e, target, valid), torch.ones(3, dtype=torch.float64))
    pred = (target * 10).requires_grad_()
    grad = torch.autograd.grad(anchor_loss(pred, target, valid).sum(), pred)[0]
    assert ((grad * pred).sum((-2, -1)) > 0).all()


def ramp_labels(kind: str = "affine_disparity"):
    """A linear ramp over an image, its region as the student's output, and an analytic teacher's labels of it."""
    rows, columns = torch.arange(300) + 0.5, torch.arange(280) + 0.5
    image = (0.2 * rows[:, None] + 0.6 * columns[None])[None] / 300
    p = plan(300, 280, key="k", size=140, min_side=200, patches="grid", patch_size=112)
    r = p.region
    grid = (torch.arange(140) + 0.5) / 140 * r.side
    region = ((r.top + grid)[:, None] * 0.2 + (r.left + grid)[None] * 0.6) / 300
    local = cut_patches(image, p)[:, 0]
    shared = DepthMap(region[None], torch.ones(1, 140, 140, dtype=torch.bool), Kind(kind))
    patches = DepthMap(local * 4 + 1, torch.ones_like(local, dtype=torch.bool), Kind(kind))
    assert cut_region(image, p).shape == (1, 140, 140)
    return region[None], Labels(shared, patches, p.boxes()[None])


@pytest.mark.parametrize("name", INVARIANT)
def test_a_perfect_student_of_an_analytic_teacher_has_no_loss_anywhere(name):
    pred, labels = ramp_labels()
    objective = Objective(normalization=name, weights=Weights(feature=0.0, anchor=0.0))
    total, parts = objective(pred * 2 - 5, labels)
    assert set(parts) == {"shared", "local_global", "gradient", "dead_contexts"}
    assert total.shape == (1,) and total.item() < 1e-4
    worse, _ = objective(pred.flip(2), labels)
    assert worse.item() > 0.5


def test_the_objective_is_the_weighted_sum_of_its_named_parts():
    pred, labels = ramp_labels()
    pred = pred + 0.05 * torch.rand_like(pred)
    features, reference = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    weights = Weights(shared=0.7, local_global=0.3, feature=1.1, gradient=1.9, anchor=0.2)
    total, parts = Objective(weights=weights)(pred, labels, features, reference)
    expected = sum(getattr(weights, name) * value for name, value in parts.items() if name != "dead_contexts")
    torch.testing.assert_close(total, expected)
    assert Weights() == Weights(shared=1.0, local_global=0.5, feature=1.0, gradient=2.0, anchor=0.0)


def test_labels_that_are_not_disparity_are_refused():
    pred, labels = ramp_labels("affine_depth")
    with pytest.raises(KindError, match="affine_depth"):
        Objective()(pred, labels)


def test_unknown_normalization_names_the_known_ones():
    pred, target, valid = example()
    with pytest.raises(LookupError, match="did you mean hybrid.*global, hybrid, local, none"):
        distillation_loss(pred, target, valid, "hybird")
