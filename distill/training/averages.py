"""A copy of the student that follows it by an exponential moving average, without a question to the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Averages(AveragedModel):
    """Weights that follow the student's; buffers are copied. decay: warms up as (1+t)/(10+t), in steps t.

    torch's own update copies its count of steps to the device and reads it there: the host waits, at every step.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Follows `model` by one step; the first one copies it."""
        count = int(self.n_averaged)  # on the host, wherever the weights are
        ours: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(model.parameters())
        if count:
            torch._foreach_lerp_(ours, theirs, 1.0 - min(self.decay, (1.0 + count) / (10.0 + count)))
        else:
            torch._foreach_copy_(ours, theirs)
        for mine, its in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(its)
        self.n_averaged += 1
