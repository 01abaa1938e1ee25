"""Losses: exact by definition, invariant where they say so, blind to invalid pixels, finite on degenerate input."""

from __future__ import annotations

import pytest
import torch

from distill.core.plugins import find, names
from distill.losses.losses import anchor_loss, compare, distillation_loss, feature_loss, gradient_loss
from distill.losses.normalize import _per_image
from distill.losses.normalize._batched import batch_loss
from distill.losses.normalize._contexts import _image_by_image

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
    assert torch.autograd.gradcheck(
        lambda x: distillation_loss(x, *small[1:3], name, weight=small[3]), (x,), fast_mode=True
    )
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
    pred, target, valid = example(1, (1, 8, 9))
    pred.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: distillation_loss(x, target, valid, name, **options), (pred,), fast_mode=True
    )


@pytest.mark.parametrize("other", [gradient_loss, anchor_loss])
def test_gradcheck_of_the_other_losses(other):
    pred, target, valid = example(2, (2, 10, 11))  # the fourth scale is every eighth pixel
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: other(x, target, valid), (pred,), fast_mode=True)


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
    near = torch.tensor([0.87, (1 - 0.87**2) ** 0.5])[None, :, None, None]  # a cosine of 0.87 with the first axis
    axis = torch.tensor([1.0, 0.0])[None, :, None, None].requires_grad_()
    assert feature_loss(near, axis).item() == 0.0 and not feature_loss(near, axis).requires_grad
    assert feature_loss(near, axis, margin=0.9).item() == pytest.approx(0.13)


def test_anchor_pulls_the_magnitude_to_the_labels():
    pred, target, valid = example(8)
    assert (anchor_loss(target + 9.0, target, valid) < 1e-9).all()
    torch.testing.assert_close(anchor_loss(target * torch.e, target, valid), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(anchor_loss(target * torch.e**2, target, valid), 4 * torch.ones(3, dtype=torch.float64))
    pred = (target * 10).requires_grad_()
    grad = torch.autograd.grad(anchor_loss(pred, target, valid).sum(), pred)[0]
    assert ((grad * pred).sum((-2, -1)) > 0).all()


def test_unknown_normalization_names_the_known_ones():
    pred, target, valid = example()
    with pytest.raises(LookupError, match="did you mean hybrid.*global, hybrid, local, none"):
        distillation_loss(pred, target, valid, "hybird")


def test_a_normalization_needs_only_the_keywords_that_are_asked_for(tmp_path):
    (tmp_path / "plain.py").write_text(
        "from distill.losses.normalize import none\n\n\ndef compare(pred, target, valid):\n"
        "    return none.compare(pred, target, valid)\n\n\nLEVELS = ()\nINVARIANT = False\n"
    )
    maps, name = example(), str(tmp_path / "plain.py")
    assert torch.equal(distillation_loss(*maps, name), distillation_loss(*maps, "none"))
    with pytest.raises(ValueError, match="plain.py': its compare takes no trim_top, which is asked for"):
        distillation_loss(*maps, name, trim_top=0.1)


@pytest.mark.parametrize(("contexts", "number"), [("dr", 7), ("dp", 7), ("ds", 1 + 4 + 16)])
def test_the_released_loss_says_how_many_contexts_it_has(contexts, number):
    found = compare(*example(1, (1, 24, 24)), "hybrid", reference_hdn=True, contexts=contexts)
    assert found.live.tolist() == [number] and found.dead.tolist() == [0]
