"""The normalizations: one file per way of bringing a prediction and a label to a common scale.

A plug-in is a file with

    INVARIANT   True where the loss ignores any positive scale and any shift of the prediction
    LEVELS      the numbers of parts into which the label's range is cut, or () for none; reference_hdn passes them to
                HDN's loss
    compare(pred, target, valid, *, trim_top=0.0, label_only=False, weight=None) -> Comparison

pred, target: (B,H,W) floating. valid: (B,H,W) bool; a pixel outside it never counts, whatever its value. weight:
(B,H,W) not negative, each pixel's weight in the mean (not in medians and deviations); None: all equal. Only keywords
that a recipe sets are passed. The gradient flows to `pred` only: a label is a constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def single_or_double(values: Tensor) -> Tensor:
    """The values in float32, or as they are in float64."""
    return values if values.dtype == torch.float64 else values.float()


class Comparison(NamedTuple):
    """loss: (B,) the mean over the pixels that count. live, dead: (B,) contexts with and without information.

    whole_image: statistics of the whole image, a by-product for `gradient_loss` of the same maps; or None.
    """

    loss: Tensor
    live: Tensor
    dead: Tensor
    whole_image: Any = None
