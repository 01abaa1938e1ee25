"""The forms with a reproducible gradient give torch's numbers and torch's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.core import resample
from distill.core.resample import read_boxes, read_points, resize_bilinear
from tests.launches import Asked


def both(monkeypatch, function, *inputs: Tensor) -> list[list[Tensor]]:
    """The output and the gradients at every input, by torch's kernel and by the reproducible form."""
    found = []
    for exact in (False, True):
        monkeypatch.setattr(resample, "exact_gradient", lambda x, exact=exact: exact)
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        torch.manual_seed(1)
        (out * torch.randn(out.shape, dtype=out.dtype)).sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    return found


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(14, 10), (3, 9), (13, 17)])
def test_resize(align_corners, size, monkeypatch):
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    ours, theirs = both(monkeypatch, lambda x: resize_bilinear(x, size, align_corners=align_corners), x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_weights_of_an_inference_serve_training(monkeypatch):
    """And no later call makes a tensor on the host, which on a card would wait for its copy."""
    monkeypatch.setattr(resample, "exact_gradient", lambda x: True)
    x = torch.randn(1, 2, 6, 7, requires_grad=True)
    with torch.inference_mode():
        resize_bilinear(x, (4, 5), align_corners=False)
    with Asked() as counted:
        resize_bilinear(x, (4, 5), align_corners=False).sum().backward()
    assert x.grad is not None and "eye" not in counted.launches and "_to_copy" not in counted.launches


def test_boxes(monkeypatch):
    maps = torch.randn(2, 9, 11, dtype=torch.float64)
    rows, columns = (torch.rand(2, 3, 6, dtype=torch.float64) for _ in range(2))
    ours, theirs = both(monkeypatch, lambda maps: read_boxes(maps, rows, columns), maps)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_points(monkeypatch):
    x, points = torch.randn(2, 3, 6, 7, dtype=torch.float64), torch.rand(2, 5, 4, 2, dtype=torch.float64) * 2.4 - 1.2
    ours, theirs = both(monkeypatch, read_points, x, points)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
