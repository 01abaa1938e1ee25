"""The forms with a reproducible gradient give torch's numbers and torch's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.core.resample import read_boxes, read_points, resize_bilinear
from tests.launches import Asked


def both(function, *inputs: Tensor) -> list[list[Tensor]]:
    """The output and the gradients at every input, by torch's kernel and by the reproducible form."""
    found = []
    for exact in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves, exact=exact)
        torch.manual_seed(1)
        (out * torch.randn(out.shape, dtype=out.dtype)).sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    return found


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(14, 10), (3, 9), (13, 17)])
def test_resize(align_corners, size):
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    ours, theirs = both(lambda x, exact: resize_bilinear(x, size, align_corners=align_corners, exact=exact), x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_weights_of_an_inference_serve_training():
    """And no later call makes a tensor on the host, which on a card would wait for its copy."""
    x = torch.randn(1, 2, 6, 7, requires_grad=True)
    with torch.inference_mode():
        resize_bilinear(x, (4, 5), align_corners=False, exact=True)
    with Asked() as counted:
        resize_bilinear(x, (4, 5), align_corners=False, exact=True).sum().backward()
    assert x.grad is not None and "eye" not in counted.launches and "_to_copy" not in counted.launches


def test_boxes():
    maps = torch.randn(2, 9, 11, dtype=torch.float64)
    rows, columns = (torch.rand(2, 3, 6, dtype=torch.float64) for _ in range(2))
    ours, theirs = both(lambda maps, exact: read_boxes(maps, rows, columns, exact=exact), maps)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_points():
    x, points = torch.randn(2, 3, 6, 7, dtype=torch.float64), torch.rand(2, 5, 4, 2, dtype=torch.float64) * 2.4 - 1.2
    ours, theirs = both(read_points, x, points)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
