"""Averaged weights are torch's to the last bit, and are followed without asking a device for a number."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from distill.training.averages import Averages
from tests.training.toys import Toy


def move(student: nn.Module, step: int) -> None:
    with torch.no_grad():
        for value in (*student.parameters(), *(b for b in student.buffers() if b.is_floating_point())):
            value += torch.randn(value.shape, generator=torch.Generator().manual_seed(step))


def test_they_are_torchs_to_the_bit():
    def follow(averages, current, count):
        torch._foreach_lerp_(averages, current, 1.0 - min(0.5, (1.0 + float(count)) / (10.0 + float(count))))

    student = Toy(batchnorm=True)
    ours, theirs = Averages(student, 0.5), AveragedModel(student, multi_avg_fn=follow)
    for step in range(12):
        move(student, step)
        ours.update_parameters(student)
        theirs.update_parameters(student)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert not any(torch.equal(a, b) for a, b in zip(ours.module.parameters(), student.parameters(), strict=True))


def test_no_number_is_read_from_the_device():
    """A tensor on meta has none."""
    student = Toy(batchnorm=True).to("meta")
    averages = Averages(student, 0.9)
    for _ in range(2):
        averages.update_parameters(student)
    assert int(averages.n_averaged) == 2
