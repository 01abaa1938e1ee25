"""What "the same depth" means: one file per way of bringing a prediction and a label to a common scale.

A plug-in is a file with

    INVARIANT   True where the loss ignores any positive scale and any shift of the prediction
    compare(pred, target, valid, *, trim_top=0.0, label_only=False) -> Comparison

pred, target: (B,H,W) floating. valid: (B,H,W) bool; a pixel outside it never counts, whatever its value. The
gradient flows to `pred` only: a label is a constant.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Comparison(NamedTuple):
    """loss: (B,) the mean over the pixels that count. live, dead: (B,) contexts with and without information."""

    loss: Tensor
    live: Tensor
    dead: Tensor
