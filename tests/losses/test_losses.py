"""Losses: exact by definition, invariant where they say so, blind to invalid pixels, finite on degenerate input."""

from __future__ import annotations

import pytest
import torch

from distill.core.crops import cut_patches, cut_region, plan, sample_boxes, student_blocks
from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import Labels
from distill.core.plugins import find, names
from distill.losses.losses import anchor_loss, compare, distillation_loss, feature_loss, gradient_loss
from distill.losses.normalize import _per_image
from distill.losses.normalize._batched import batch_loss
from distill.losses.normalize._contexts import _image_by_image
from distill.losses.objective import Objective, Weights

NORMALIZATIONS = names("distill.losses.normalize")
INVARIANT = [n for n in NORMALIZATIONS if find("distill.losses.normalize", n).INVARIANT]
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


def large(seed: int = 0):
    """Large enough for the bracketed selection and for threads; smooth, with edges and ties."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 1, 9, 9, generator=g, dtype=torch.float64)
    target = torch.nn.functional.interpolate(coarse, size=(192, 200), mode="bicubic")[:, 0]
    pred = target + 0.2 * torch.rand(target.shape, generator=g, dtype=torch.float64)
    pred[:, 40:60] = (pred[:, 40:60] * 8).round() / 8
    target[0, :, 150:] += 1.0
    return pred, target, torch.rand(target.shape, generator=g) > 0.1


@pytest.mark.parametrize("name", list(LEVELS))
def test_large_maps_are_their_definition_too_in_any_number_of_threads(name, monkeypatch):
    pred, target, valid = large()
    losses, gradients = [], []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        x = pred.clone().requires_grad_()
        loss = distillation_loss(x, target, valid, name)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss.sum(), x)[0])
    assert torch.equal(losses[0], losses[1]) and torch.equal(gradients[0], gradients[1])
    expected = torch.stack([plain_reference(pred[b], target[b], valid[b], LEVELS[name]) for b in range(2)])
    torch.testing.assert_close(losses[0], expected)


@pytest.mark.parametrize(
    "values",
    [
        torch.rand(20_000),
        torch.rand(20_000).sort().values,
        torch.rand(20_000).round(decimals=1),
        torch.full((20_000,), 3.0),
        # In step with the sample, which then sees one kind of value only.
        torch.where(torch.arange(20_000) % (20_000 // 1024) == 0, 5.0, torch.rand(20_000)),
        torch.cat([torch.full((10_001,), -torch.inf), torch.rand(9_999)]),
        torch.rand(9),
        torch.tensor([2.0, 1.0]),
    ],
    ids=["random", "sorted", "ties", "constant", "in step", "infinite", "few", "two"],
)
def test_selection_is_exact(values):
    assert float(_per_image.lower_median(values.numpy())) == float(values.median())
    for rank in (0, 1, len(values) // 3, len(values) - 1):
        assert float(_per_image._select(values.numpy(), rank)) == float(values.sort().values[rank])


@pytest.mark.parametrize("options", [{}, {"trim_top": 0.1}, {"label_only": True}, {"weight": True}], ids=str)
@pytest.mark.parametrize("name", list(LEVELS))
def test_the_batched_way_gives_the_same_numbers(name, options):
    """What an accelerator runs, run here: losses, gradients and live contexts of the image by image way."""
    pred, target, valid = example(11, (6, 20, 24))
    target[1] = 4.0
    valid[2] = False
    target[3] = (target[3] * 3).floor()
    pred[4] = 1.0
    valid[5] = False
    valid[5, 3, 4:12] = True
    how = {"levels": LEVELS[name], "trim_top": 0.0, "label_only": False} | options
    weight = (0.1 + torch.rand_like(pred)).flatten(1) if how.pop("weight", False) else None
    flat = [x.flatten(1) for x in (pred, target, valid)]
    ours = _image_by_image(*flat, weight, **how, want_gradient=True)
    theirs = batch_loss(*flat, weight, **how, want_gradient=True)
    torch.testing.assert_close(theirs[0], ours[0])
    assert theirs[2].tolist() == ours[2].tolist()
    # Of several pixels that are the median any may have its gradient: the constant prediction's differs.
    unique = [0, 1, 2, 3, 5]
    torch.testing.assert_close(theirs[1][unique], ours[1][unique])
    torch.testing.assert_close(theirs[1].sum(1), ours[1].sum(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_weights_count_pixels_in_the_mean(name):
    pred, target, valid = example(12)
    loss = distillation_loss(pred, target, valid, name)
    torch.testing.assert_close(distillation_loss(pred, target, valid, name, weight=torch.full_like(pred, 0.3)), loss)
    # The statistics stay those of all pixels, so weights that select halves average to the whole.
    left = torch.zeros_like(pred)
    left[..., :12] = 1.0
    left_loss = distillation_loss(pred, target, valid, name, weight=left)
    right_loss = distillation_loss(pred, target, valid, name, weight=1 - left)
    share = valid[..., :12].sum((-2, -1)) / valid.sum((-2, -1))
    torch.testing.assert_close(share * left_loss + (1 - share) * right_loss, loss)
    assert (left_loss - right_loss).abs().min() > 1e-3
    pred.requires_grad_()
    weight = torch.rand_like(target)
    small = [x[:1, :8, :9] for x in (pred.detach(), target, valid, weight)]
    x = small[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, *small[1:3], name, weight=small[3]), (x,))
    nothing = distillation_loss(pred, target, valid, name, weight=torch.zeros_like(pred))
    assert nothing.tolist() == [0.0] * 3


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
    # One pixel in each quarter of the range, and all the rest in none but the whole.
    lonely = torch.zeros_like(valid)
    lonely[:, 5, 2:6] = True
    steps = target.clone()
    steps[:, 5, 2:6] = torch.tensor([0.0, 0.3, 0.6, 1.0])
    ends = target * 0.2
    ends[:, 0, 0] = 1.0
    return {
        "constant prediction": (pred * 0 + 2.0, target, valid),
        "constant label": (pred, target * 0 + 5.0, valid),
        "zero label": (pred, target * 0, valid),
        "one-pixel contexts": (pred, steps, lonely),
        "one far pixel": (pred, ends, valid | one),
        "infinite label": (pred, torch.where(one, torch.inf, target), valid | one),
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


def ramp_labels(kind: str = "affine_disparity", *, draw: int = 0, size: int = 140, patch: int = 112, how: str = "grid"):
    """A linear ramp over an image, its region as the student's output, and an analytic teacher's labels of it."""
    rows, columns = torch.arange(300) + 0.5, torch.arange(280) + 0.5
    image = (0.2 * rows[:, None] + 0.6 * columns[None])[None] / 300
    p = plan(300, 280, key="k", draw=draw, size=size, min_side=200, patches=how, num_patches=3, patch_size=patch)
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
    objective = Objective(weights=Weights(feature=0.0), patch_resolution=where)
    for draw in range(6):
        pred, labels = ramp_labels(draw=draw, size=size, patch=patch, how=how)
        total, parts = objective(3 * pred - 1, labels)
        assert total.item() < 1e-4, (draw, parts)
        shift = 0.5 / size
        moved = Labels(labels.shared, labels.local, labels.boxes + torch.tensor([shift, -shift, shift, -shift]))
        # Patches of a ramp that lie elsewhere differ by a shift alone, which every normalization forgives.
        raw = Objective(normalization="none", weights=Weights(feature=0.0, gradient=0.0), patch_resolution=where)
        exact = DepthMap((labels.local.values - 1) / 4, labels.local.valid, labels.local.kind)
        right = raw(pred, Labels(labels.shared, exact, labels.boxes))[1]["local_global"]
        wrong = raw(pred, Labels(labels.shared, exact, moved.boxes))[1]["local_global"]
        assert right.item() < 1e-5 and wrong.item() > 50 * right.item(), (draw, right, wrong)


@pytest.mark.parametrize("where", ["patch", "student"])
def test_patches_are_compared_where_both_are_known(where):
    """Invalid label pixels, patches without labels, and what lies beyond the outermost centres never count."""
    pred, labels = ramp_labels()
    objective = Objective(normalization="none", weights=Weights(feature=0.0, gradient=0.0), patch_resolution=where)
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
