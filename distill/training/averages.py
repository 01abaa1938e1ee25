"""An exponential moving average of the student's weights that never synchronizes with the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Averages(AveragedModel):
    """Averages of the student's weights; buffers are copied. decay: warms up as (1+t)/(10+t), in steps t.

    torch's own update keeps its step count on the device and reads it back: the host waits at every step.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Moves the averages one step towards `model`; the first call copies it."""
        count = int(self.n_averaged)  # on the host, wherever the weights are
        averages: list[Tensor] = list(self.module.parameters())
        current: list[Tensor] = list(model.parameters())
        if count:
            torch._foreach_lerp_(averages, current, 1.0 - min(self.decay, (1.0 + count) / (10.0 + count)))
        else:
            torch._foreach_copy_(averages, current)
        for buffer, source in zip(self.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(source)
        self.n_averaged += 1
