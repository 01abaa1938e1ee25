"""The measurements of the losses on a card run to their end on a pretended one, whose numbers mean nothing."""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import pytest
import torch

from tests.launches import pretended_card
from tests.speed import losses


class Event:
    def __init__(self, **how):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Profile:
    def __init__(self, **how):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def key_averages(self):
        return [SimpleNamespace(self_device_time_total=5.0, count=1, key="a kernel")]


def test_every_row_is_printed(monkeypatch, capsys):
    pytest.importorskip("triton")
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *given: "pretended")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(losses, "graph_time", lambda call: 1.0)
    time_of, example = losses.card_time, losses.example
    monkeypatch.setattr(losses, "card_time", lambda call, repeats=1: time_of(call, 1))
    monkeypatch.setattr(losses, "example", lambda batch, size, device: example(batch, size, "cpu"))
    with pretended_card():
        losses.on_card(argparse.Namespace(batch=2, size=24, compile=None, profile=True))
    said = capsys.readouterr().out
    assert all(f"\n{name} " in said for name in losses.VARIANTS)
    rows = {line[:20].strip(): line for line in said.splitlines() if "launches:" in line}
    assert "_select" in rows["hybrid"] and "_edges" in rows["gradient"] and "_sample" in rows["objective"]
    assert "launches   a kernel" in said
