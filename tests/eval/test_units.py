"""Depth in a wrong unit that lies within a benchmark's range is doubted, and lawful depth is not."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from distill.eval.benchmarks import BenchmarkSample, _units, eth3d, kitti, nyu, scannet
from distill.eval.benchmarks._files import as_truth, ranged
from distill.eval.completeness import _decoded


def depth(median, shape=(40, 60)):
    return np.linspace(0.5 * median, 1.5 * median, shape[0] * shape[1]).reshape(shape)


@pytest.mark.parametrize(
    ("benchmark", "metres", "wrong"),
    [(kitti, 12.0, 1000 / 256), (nyu, 2.8, 0.1), (scannet, 1.7, 0.1)],
    ids=["kitti in millimetres", "nyu in centimetres", "scannet in centimetres"],
)
def test_another_unit_within_the_range_is_told_once(benchmark, metres, wrong, caplog, monkeypatch):
    monkeypatch.setattr(_units, "_medians", {})
    caplog.set_level(logging.WARNING)
    for number in range(5):
        ranged(depth(metres + 0.1 * number), benchmark.PROTOCOL, f"right: {number}.png")
        _, valid = ranged(depth(wrong * (metres + 0.1 * number)), benchmark.PROTOCOL, f"wrong: {number}.png")
        assert valid.any()
    [record] = caplog.records
    name = benchmark.PROTOCOL.benchmark
    assert record.getMessage().startswith("wrong: the median depth of its first 3 images is ")
    assert f"but {name} mostly lies between" in record.getMessage()


def test_a_few_near_or_far_images_are_not_told_nor_what_has_no_typical_depth(caplog, monkeypatch):
    monkeypatch.setattr(_units, "_medians", {})
    caplog.set_level(logging.WARNING)
    for number, median in enumerate([0.3, 0.3, 2.0, 0.3, 0.3, 0.3]):
        ranged(depth(median), nyu.PROTOCOL, f"root: {number}.png")
        ranged(depth(0.01), eth3d.PROTOCOL, f"root: {number}.png")
    ranged(depth(0.3), nyu.PROTOCOL, "two: 1.png")
    ranged(depth(0.3), nyu.PROTOCOL, "two: 2.png")
    assert not caplog.records


@pytest.mark.parametrize(("scale", "levels"), [(1.0, ["ok"]), (0.1, ["ok", "warn"])])
def test_doctor_doubts_the_unit(scale, levels, monkeypatch):
    monkeypatch.setattr(_units, "_medians", {})

    def truth(number):
        return as_truth(*ranged(depth(scale * (2 + number)), nyu.PROTOCOL, f"root: {number}.png"))

    samples = [
        BenchmarkSample(f"{n}.png", f"{n}.npy", lambda: torch.zeros(3, 40, 60), lambda n=n: truth(n)) for n in range(3)
    ]
    found = _decoded(samples, nyu.PROTOCOL)
    assert [finding.level for finding in found] == levels
    assert ("another unit" in found[-1].what) == (scale != 1)
