"""Division has the same bits on every device: nothing promised equal changes where numbers divide as on CUDA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.core.crops import sample_boxes, student_blocks
from distill.core.division import divide, unit_range
from distill.losses.objective import Objective
from distill.losses.settings import LossSettings
from distill.training.augment import _in_region
from distill.training.stored import StoredBatch, stored_batches
from tests.losses.test_objective import ramp_labels
from tests.training.test_handover import CPU, SETTINGS, labels, positions_of, same

__all__ = ["labels"]  # a fixture


class AsOnCuda(TorchDispatchMode):
    """Divides by a Python number as CUDA's kernel does: times the number's reciprocal in the tensor's dtype."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.div.Tensor and isinstance(args[1], int | float) and args[0].is_floating_point():
            return args[0] * (torch.ones((), dtype=args[0].dtype) / args[1]).item()
        return function(*args, **(kwargs or {}))


def test_every_value_of_a_photograph():
    images = torch.arange(256, dtype=torch.uint8)
    expected = torch.from_numpy(np.arange(256, dtype=np.float32) / np.float32(255))
    with AsOnCuda():
        assert torch.equal(unit_range(images), expected)
        assert not torch.equal(images.float() / 255.0, expected)  # or the mode would show nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_and_their_dtype(dtype):
    values = torch.linspace(-3, 3, 101, dtype=dtype)
    with AsOnCuda():
        assert torch.equal(divide(values, 49), torch.from_numpy(values.numpy() / values.numpy().dtype.type(49)))


def test_batches_decoded_on_a_card(labels, monkeypatch):
    positions = positions_of(labels)
    expected = list(stored_batches(labels, positions, settings=SETTINGS, device=CPU))
    ready = StoredBatch.ready

    def as_on_cuda(batch, settings):
        with AsOnCuda():
            return ready(batch, settings)

    monkeypatch.setattr(StoredBatch, "ready", as_on_cuda)
    there = stored_batches(labels, positions, settings=SETTINGS, device=CPU)
    for ours, theirs in zip(there, expected, strict=True):
        same(ours, theirs)


@pytest.mark.parametrize("where", ["patch", "student"])
def test_the_objective_and_its_gradient(where):
    """A coordinate that is an ulp off moves pixels of a ramp into other contexts: 8 % of the gradient changed."""
    pred, ramp = ramp_labels()
    pred = pred + 0.05 * torch.rand(pred.shape, generator=torch.Generator().manual_seed(0))

    def computed():
        x = pred.clone().requires_grad_()
        loss = Objective(LossSettings(feature=0.0, patch_resolution=where))(x, ramp)[0]
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    expected = computed()
    with AsOnCuda():
        there = computed()
    torch.testing.assert_close(there[0], expected[0], rtol=1e-6, atol=0)
    size = expected[1].abs().mean()
    assert ((there[1] - expected[1]).abs() > 1e-3 * size).float().mean() < 1e-3


def test_the_places_of_patches():
    boxes = torch.tensor([[[0.1, 0.2, 0.5, 0.6], [0.3, 0.1, 0.7, 0.5]]])
    maps = torch.rand(1, 49, 49, generator=torch.Generator().manual_seed(0))
    expected = sample_boxes(maps, boxes, 49), student_blocks(boxes, 49)
    with AsOnCuda():
        there = sample_boxes(maps, boxes, 49), student_blocks(boxes, 49)
    assert all(
        torch.equal(a, b) for a, b in zip((*there[0], *there[1][:2]), (*expected[0], *expected[1][:2]), strict=True)
    )


def test_pixels_of_patches_that_a_crop_leaves():
    """Boxes whose edge is where pixels have their centres: an ulp decides."""
    edges = (torch.arange(49) + 0.5) / 49
    boxes = torch.stack([-edges, -edges, 1 - edges, 1 - edges], -1)[None]
    expected = _in_region(boxes, 49)
    with AsOnCuda():
        assert torch.equal(_in_region(boxes, 49), expected)


@pytest.mark.cuda
def test_a_card_divides_like_a_cpu(card):
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    for number in (3, 49, 255, 560):
        assert torch.equal(divide(values.to(card), number).cpu(), divide(values, number))
