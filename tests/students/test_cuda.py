"""On a card a student says what it says on a CPU, and learns from the same gradients."""

from __future__ import annotations

import pytest
import torch

from tests.students.test_decoders import DECODERS
from tests.students.tiny import randomised, tiny

pytestmark = pytest.mark.cuda


def error(there: torch.Tensor, here: torch.Tensor) -> float:
    """The difference as a fraction of what varies."""
    assert there.is_cuda and there.shape == here.shape
    return ((there.cpu() - here).std() / here.std()).item()


@pytest.mark.parametrize("decoder", DECODERS)
def test_maps_are_those_of_a_cpu(decoder, card):
    student, images = randomised(tiny(decoder)).eval(), torch.rand(2, 3, 70, 47)
    with torch.no_grad():
        here = student(images)
        student, images = student.to(card), images.to(card)
        assert error(student(images), here) < 1e-4
        with torch.autocast("cuda", torch.bfloat16):
            rough = student(images)
    assert rough.dtype == torch.float32 and error(rough, here) < 0.15


@pytest.mark.parametrize("decoder", DECODERS)
def test_gradients_are_those_of_a_cpu(decoder, card):
    gradients = []
    for device in ("cpu", card):
        torch.manual_seed(0)
        student = randomised(tiny(decoder)).train().to(device)
        student(torch.rand(2, 3, 40, 40).to(device)).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in student.parameters()]))
    here, there = gradients
    assert (there - here).norm() < 1e-3 * here.norm()
