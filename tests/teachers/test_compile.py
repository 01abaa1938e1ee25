"""Compiled networks: for every shape that labelling asks about."""

from __future__ import annotations

from functools import partialmethod
from types import SimpleNamespace

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounter

from distill.teachers._compile import compile_networks


class Network(nn.Module):
    """Not an nn.Sequential: older torch does not compile the modules of torch.nn themselves."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x).relu()


def test_more_sizes_than_a_trial_tries_are_compiled(monkeypatch):
    compiled = CompileCounter()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=compiled))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    teacher = SimpleNamespace(network=Network())
    compile_networks(teacher)
    with torch.no_grad():
        for count in range(2, 14):
            teacher.network(torch.ones(count, 3))
    assert compiled.frame_count == 12
