"""Division by a number, with equal bits on every device.

For `tensor / number` CUDA multiplies by the number's reciprocal, which rounds twice: half of the 256 values of a
photograph would have other bits than on a CPU, and a coordinate an ulp off moves pixels from one context of a loss to
the next. A divisor that is a tensor on the device is divided by.
"""

from __future__ import annotations

import torch
from torch import Tensor


def divide(values: Tensor, number: float) -> Tensor:
    """`values` / number, in the dtype and on the device of `values`, which must be floating."""
    return values / torch.full((), number, dtype=values.dtype, device=values.device)


def unit_range(images: Tensor) -> Tensor:
    """uint8 images of any shape as float32 in [0,1]."""
    return divide(images.float(), 255.0)
