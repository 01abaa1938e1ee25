"""On a card every loss and its gradient are those of a CPU."""

from __future__ import annotations

import pytest
import torch

from distill.core.depth import DepthMap
from distill.core.labels import Labels
from distill.losses import fused
from distill.losses.losses import anchor_loss, compare, distillation_loss, gradient_loss
from distill.losses.objective import Objective
from distill.losses.settings import LossSettings
from tests.losses.test_losses import NORMALIZATIONS, degenerate, example, large
from tests.losses.test_objective import ramp_labels

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _kernels_that_fail_are_heard_of(monkeypatch):
    monkeypatch.setattr(fused, "raise_faults", True)


def both(loss, pred, *given, device):
    """Losses and gradients of the prediction, of a CPU and of the card."""
    found = []
    for where in ("cpu", device):
        x = pred.to(where, copy=True).requires_grad_()
        value = loss(x, *(part.to(where) for part in given))
        assert value.device.type == torch.device(where).type and value.shape == pred.shape[:1]
        found += [value.detach().cpu(), torch.autograd.grad(value.sum(), x)[0].cpu()]
    return found


def alike(there, here):
    """Of pixels that are one median any may have its gradient, and a residual of nothing has either sign: but few."""
    size = here.abs().mean()
    assert ((there - here).abs() > 1e-3 * size).float().mean() < 5e-3
    total = here.abs().sum((1, 2)).max().item()
    torch.testing.assert_close(there.sum((1, 2)), here.sum((1, 2)), atol=1e-3 * total, rtol=0)


@pytest.mark.parametrize("make", [example, large])
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalizations(name, make, card):
    pred, target, valid = (x.float() if x.is_floating_point() else x for x in make())
    for options in ({}, {"trim_top": 0.1}, {"label_only": True}):
        value, gradient, there, gradient_there = both(
            lambda *given, o=options: distillation_loss(*given, name, **o), pred, target, valid, device=card
        )
        torch.testing.assert_close(there, value, rtol=1e-5, atol=1e-6)
        alike(gradient_there, gradient)
    counted = [compare(*(x.to(where) for x in (pred, target, valid)), name) for where in ("cpu", card)]
    assert counted[0].dead.tolist() == counted[1].dead.tolist() and counted[0].live.tolist() == counted[1].live.tolist()


@pytest.mark.parametrize("case", list(degenerate()))
def test_degenerate_input(case, card):
    pred, target, valid = degenerate()[case]
    for name in NORMALIZATIONS:
        value, _, there, gradient = both(
            lambda *given, name=name: distillation_loss(*given, name), pred, target, valid, device=card
        )
        torch.testing.assert_close(there, value, rtol=1e-4, atol=1e-5)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", [gradient_loss, anchor_loss])
def test_other_losses(loss, card):
    pred, target, valid = (x.float() if x.is_floating_point() else x for x in large())
    value, gradient, there, gradient_there = both(loss, pred, target, valid, device=card)
    torch.testing.assert_close(there, value, rtol=1e-5, atol=1e-6)
    alike(gradient_there, gradient)


@pytest.mark.parametrize("where", ["patch", "student"])
def test_the_objective(where, card):
    pred, labels = ramp_labels()
    pred = pred + 0.05 * torch.rand(pred.shape, generator=torch.Generator().manual_seed(0))

    def objective(x, shared, local, boxes):
        maps = [DepthMap(v, torch.ones_like(v, dtype=torch.bool), labels.shared.kind) for v in (shared, local)]
        return Objective(LossSettings(feature=0.0, patch_resolution=where))(x, Labels(*maps, boxes))[0]

    value, gradient, there, gradient_there = both(
        objective, pred, labels.shared.values, labels.local.values, labels.boxes, device=card
    )
    torch.testing.assert_close(there, value, rtol=1e-4, atol=1e-5)
    alike(gradient_there, gradient)
