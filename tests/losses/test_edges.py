"""Losses at the edges of their definitions: the smallest context, labels that are flat for their size, rounding."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from distill.losses.latent import aligned_l1
from distill.losses.losses import (
    anchor_loss,
    compare,
    distillation_loss,
    gradient_loss,
    hdn_loss,
    median_and_mean_abs_dev,
    squared_loss,
)
from distill.losses.normalize import _contexts

G = torch.Generator().manual_seed(0)


def row(*values: float) -> torch.Tensor:
    """(1,1,N)."""
    return torch.tensor(values)[None, None]


def everywhere(values: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def test_a_context_of_five_pixels_counts_and_one_of_four_does_not():
    target = row(0.0, 0.05, 0.1, 0.15, 0.2, 0.8, 0.9, 0.95, 1.0)
    found = compare(torch.rand(target.shape, generator=G), target, everywhere(target), "local")
    assert (found.live.item(), found.dead.item()) == (1, 3)


def test_a_label_is_flat_by_its_magnitude_whatever_its_sign():
    far = row(*[-1e6] * 9, *torch.linspace(-0.1, 0.1, 9).tolist())
    assert compare(torch.rand(far.shape, generator=G), far, everywhere(far), "local").live.item() == 0
    rounding = 1000 + 1e-4 * torch.rand(1, 8, 8, generator=G)
    assert anchor_loss(torch.rand(1, 8, 8, generator=G), rounding, everywhere(rounding)).item() == 0


def test_a_prediction_that_is_nearly_constant_has_the_gradient_of_a_fixed_scale():
    pred = (1e-9 * torch.rand(1, 6, 6, generator=G, dtype=torch.float64)).requires_grad_()
    target = torch.rand(1, 6, 6, generator=G, dtype=torch.float64)
    normal = [(x - x.median()) / (x - x.median()).abs().mean().clamp(min=1e-6) for x in (pred, target)]
    expected = torch.autograd.grad((normal[0] - normal[1]).abs().mean(), pred)[0]
    found = torch.autograd.grad(distillation_loss(pred, target, everywhere(target), "global").sum(), pred)[0]
    torch.testing.assert_close(found, expected)


def test_a_prediction_a_thousand_times_smaller_is_the_same():
    pred, target = torch.rand(2, 1, 16, 16, generator=G)
    for loss in (squared_loss, gradient_loss):
        torch.testing.assert_close(
            loss(1e-3 * pred, target, everywhere(target)), loss(pred, target, everywhere(target))
        )


def test_each_scale_of_the_gradient_is_divided_by_its_own_valid_pixels():
    pred, target = torch.rand(2, 9, 10, generator=G, dtype=torch.float64)
    valid = torch.rand(9, 10, generator=G) > 0.4
    expected = 0.0
    for step in (1, 2, 4, 8):
        d, v = (pred - target)[::step, ::step], valid[::step, ::step]
        places = [(i, j) for i in range(v.shape[0]) for j in range(v.shape[1]) if v[i, j]]
        pairs = [((i, j), n) for i, j in places for n in ((i + 1, j), (i, j + 1)) if n in places]
        expected += sum(abs(d[a] - d[b]).item() for a, b in pairs) / max(1, len(places))
    found = gradient_loss(pred[None], target[None], valid[None], normalize=False)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


def test_raw_losses_are_trimmed_to_the_nearest_number_of_pixels():
    """A quarter of five: 3.75 stay, that is four."""
    pred = row(1.0, 2.0, 3.0, 4.0, 5.0)
    assert distillation_loss(pred, 0 * pred, everywhere(pred), "none", trim_top=0.25).item() == 2.5


def test_a_label_that_varies_by_a_hundred_thousandth_is_not_flat():
    target = 1 + 1e-5 * torch.rand(1, 8, 8, generator=G)
    assert compare(torch.rand(1, 8, 8, generator=G), target, everywhere(target), "global").live.item() == 1


def test_a_label_that_is_not_finite_is_not_valid():
    pred, target = torch.rand(2, 2, 6, 6, generator=G)
    known = torch.rand(2, 6, 6, generator=G) > 0.2
    expected = compare(pred, target, known, "hybrid")
    for number in (torch.inf, -torch.inf, torch.nan):
        found = compare(pred, torch.where(known, target, number), everywhere(target), "hybrid")
        assert torch.equal(found.loss, expected.loss) and torch.equal(found.live, expected.live)


def test_images_that_threads_share_keep_their_places(monkeypatch):
    pred, target = torch.rand(2, 5, 6, 6, generator=G)
    ones = [(pred[i : i + 1], target[i : i + 1], everywhere(pred[:1])) for i in range(5)]
    alone = torch.cat([distillation_loss(*one, "hybrid") for one in ones])
    monkeypatch.setattr(_contexts, "_WORTH_THREADS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(distillation_loss(pred, target, everywhere(pred), "hybrid"), alone)


LOSSES = {
    **{name: partial(distillation_loss, normalization=name) for name in ("global", "hybrid", "local", "none")},
    "hdn": hdn_loss,
    "gradient": gradient_loss,
    "raw gradient": partial(gradient_loss, normalize=False),
    "squared": squared_loss,
    "anchor": anchor_loss,
    "aligned": aligned_l1,
}


@pytest.mark.parametrize("name", LOSSES)
def test_maps_that_would_be_broadcast_or_compared_at_wrong_pixels_are_refused(name):
    """(B,1,H,W) gave the right loss and B times the gradient; (B,1,H,W) beside (B,H,W) every pair of images."""
    pred, target = torch.rand(2, 3, 6, 8, generator=G)
    valid, loss = everywhere(target), LOSSES[name]
    for wrong in [
        (pred[:, None], target[:, None], valid[:, None]),
        (pred[:, None], target, valid),
        (pred, target[:, :3], valid[:, :3]),
        (pred[:1], target, valid),
        (pred, target, valid.to(torch.uint8)),
    ]:
        with pytest.raises(ValueError, match=r"of one shape|valid must be bool"):
            loss(*wrong)
    assert loss(pred[:0], target[:0], valid[:0]).shape == (0,)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "aligned"])
def test_no_label_has_a_gradient(name):
    pred, target = torch.rand(2, 1, 6, 6, generator=G)
    assert not LOSSES[name](pred, target.requires_grad_(), everywhere(target)).requires_grad
    LOSSES[name](pred.requires_grad_(), target, everywhere(target)).sum().backward()
    assert target.grad is None and pred.grad is not None


def test_a_share_to_trim_is_no_percentage():
    pred, target = torch.rand(2, 1, 6, 6, generator=G)
    for wrong in (-0.1, 1.0, 10):
        with pytest.raises(ValueError, match=r"trim_top must be in \[0, 1\), not"):
            distillation_loss(pred, target, everywhere(target), "hybrid", trim_top=wrong)


def test_the_deviation_of_a_large_half_precision_map_does_not_overflow():
    values = torch.arange(40000.0).remainder(9).reshape(1, 200, 200)
    expected = median_and_mean_abs_dev(values, everywhere(values))
    found = median_and_mean_abs_dev(values.half(), everywhere(values))
    assert [x.dtype for x in found] == [torch.float32] * 2 and [x.item() for x in found] == [x.item() for x in expected]
