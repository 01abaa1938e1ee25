"""A training step on a card never waits for it, and launches few kernels beyond those of the student."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from distill.losses.losses import compare, gradient_loss
from distill.losses.objective import Objective
from distill.training import step
from distill.training.batches import MicroBatch
from distill.training.parallel import accelerator_of, new_run
from distill.training.stored import StoredBatch, stored_batches
from distill.training.train import set_mode
from tests.launches import Asked, pretended_card
from tests.training.test_handover import SETTINGS, labels, positions_of
from tests.training.toys import Toy

__all__ = ["labels"]  # a fixture
SETTINGS = replace(SETTINGS, fused=True, log_every=100, save_every=0, eval_every=0)


@pytest.fixture
def card():
    pytest.importorskip("triton")
    with pretended_card():
        yield


def asked(call):
    call()  # tables that are made once
    with Asked() as counted:
        call()
    return counted


@pytest.fixture
def micro(labels, card, monkeypatch):
    """A batch decoded as on a card, and what that asked of it."""
    ready, seen = StoredBatch.ready, []

    def counted(self, given):
        with Asked() as mode:
            batch = ready(self, given)
        seen.append((batch, mode))
        return batch

    monkeypatch.setattr(StoredBatch, "ready", counted)
    list(stored_batches(labels, positions_of(labels), settings=SETTINGS, device=torch.device("cpu")))
    return seen[-1]


@pytest.mark.parametrize(("name", "kernels"), [("hybrid", 4), ("global", 4), ("local", 4), ("gradient", 5)])
def test_a_loss_is_a_few_kernels(name, kernels, card):
    """And the mean over the batch, with its gradient, as of a masked L1: that has 15 in all."""
    pred = torch.rand(2, 12, 16, requires_grad=True)
    target, valid = torch.rand(2, 12, 16), torch.ones(2, 12, 16, dtype=torch.bool)

    def loss():
        values = gradient_loss(pred, target, valid) if name == "gradient" else compare(pred, target, valid, name).loss
        return torch.autograd.grad(values.mean(), pred)

    counted = asked(loss)
    assert counted.launches["triton"] == kernels and counted.total == kernels + 3
    assert not counted.waits and not counted.uploads


@pytest.mark.parametrize("name", ["hybrid", "gradient"])
def test_the_gradient_of_a_sum_is_not_copied_for_the_kernel(name, card):
    """It is one number for all images; the trainer takes such a sum."""
    pred = torch.rand(2, 12, 16, requires_grad=True)
    target, valid = torch.rand(2, 12, 16), torch.ones(2, 12, 16, dtype=torch.bool)
    losses = gradient_loss(pred, target, valid) if name == "gradient" else compare(pred, target, valid, name).loss
    with Asked() as counted:
        torch.autograd.grad(losses.sum(), pred)
    assert counted.launches == {"sum": 1, "ones_like": 1, "triton": 1}


def test_the_objective_never_waits(micro):
    """Four kernels for the region, four for its patches, two to sample those, three for the gradient."""
    learnt = micro[0].taught[0].labels
    assert learnt.local is not None
    pred, objective = torch.rand(learnt.shared.values.shape, requires_grad=True), Objective()
    counted = asked(lambda: torch.autograd.grad(objective(pred, learnt)[0].mean(), pred))
    assert counted.launches["triton"] == 13 and counted.total <= 34
    assert not counted.waits and not counted.uploads


def test_a_batch_is_decoded_without_waiting(micro):
    batch, counted = micro
    assert any(batch.mirrored)
    assert counted.launches["triton"] == 2 and counted.total <= 20, "regions, patches; the rest is mirroring"
    assert not counted.waits
    assert [line.partition(":")[0] for line in counted.uploads] == ["distill/training/augment.py"]


def test_a_step_without_a_line_never_waits(micro, tmp_path, monkeypatch):
    """Beside the bare step it launches the norm, the clipping, the guard of the optimizer and of its four groups."""
    monkeypatch.setattr(step, "_seed", lambda seed, device: None)
    monkeypatch.setattr(MicroBatch, "to", lambda self, device: self)
    student = Toy()
    accelerator = accelerator_of(student, SETTINGS, tmp_path, device="cpu")
    given = {"objective": Objective(), "reference": None, "features": None, "save_student": None, "card": {}}
    training = new_run(student, accelerator, SETTINGS, out=tmp_path, **given)
    training.processes = replace(training.processes, device=SimpleNamespace(type="cuda"))
    set_mode(training)

    def bare():
        losses, _ = training.objective(student(micro[0].images), micro[0].taught[0].labels)
        training.optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        training.optimizer.step()

    least = asked(bare)
    counted = asked(lambda: step.take_step(training, iter([micro[0]])))
    assert not counted.waits and not counted.uploads
    assert counted.total - least.total <= 17, counted.launches - least.launches
