"""What "the same depth" means: one file per way of bringing a prediction and a label to a common scale.

A plug-in is a file with

    INVARIANT   True where the loss ignores any positive scale and any shift of the prediction
    LEVELS      in how many parts the label's range is cut, or () for none; what reference_hdn hands to HDN's
                arithmetic
    compare(pred, target, valid, *, trim_top=0.0, label_only=False, weight=None) -> Comparison

pred, target: (B,H,W) floating. valid: (B,H,W) bool; a pixel outside it never counts, whatever its value. weight:
(B,H,W) not negative, how much each pixel counts in the mean (not in medians and deviations); None: all alike. The
gradient flows to `pred` only: a label is a constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Comparison(NamedTuple):
    """loss: (B,) the mean over the pixels that count. live, dead: (B,) contexts with and without information.

    whole: statistics of the whole image that were found on the way, for `gradient_loss` of the same maps; or None.
    """

    loss: Tensor
    live: Tensor
    dead: Tensor
    whole: Any = None
