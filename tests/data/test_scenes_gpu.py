"""Scenes on a GPU: its kernels by Triton's interpreter and compiled, on a card, and who renders where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from distill.data import scenes, sources
from distill.data.scenes import backends
from distill.labelling.pools import thread_pools

CARD = torch.device("cuda:0")
ASKED = {"seed": 31, "size": (20, 28)}


def run(module, **environment):
    pytest.importorskip("triton")
    here = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run([sys.executable, "-m", module], env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_interpreted_kernels_give_the_bits_of_the_torch_path():
    assert len(run("tests.data.interpreted_scenes", TRITON_INTERPRET="1")) == len(scenes.KINDS) + 2


@pytest.mark.slow
def test_the_kernels_compile_for_an_h100_and_round_as_a_cpu_does():
    lines = run("tests.data.compiled_scenes")
    assert len(lines) == 2 and all(line.endswith("stack 0") for line in lines), lines


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that renders as the CPU does, and a list of what it was asked for."""
    asked = []

    def on_gpu(stage, size, film, device):
        asked.append((size, device))
        return backends.developed(*backends.cpu_path()(stage, size), film)

    monkeypatch.setattr(backends, "_trials", {})
    monkeypatch.setattr(backends, "_on_gpu", on_gpu)
    return asked


def same(view, other):
    assert all(torch.equal(getattr(view, name), getattr(other, name)) for name in ("image", "depth", "valid"))


def test_a_gpu_renders_inside_on_after_it_was_tried(gpu):
    expected = scenes.render_uncached(**ASKED)
    assert gpu == []
    with scenes.render_on(CARD):
        for _ in range(2):
            same(scenes.render_uncached(**ASKED), expected)
        with scenes.render_on(torch.device("cpu")):
            scenes.render_uncached(**ASKED)
    scenes.render_uncached(**ASKED)
    assert [size for size, _ in gpu] == [(40, 56)] * 2 + [ASKED["size"]] * 2
    assert {device for _, device in gpu} == {CARD}


@pytest.mark.parametrize("fault", ["other bits", "no driver"])
def test_where_a_gpu_cannot_the_cpu_renders_after_one_warning(gpu, monkeypatch, fault):
    renders = backends._on_gpu

    def on_gpu(*args):
        image, depth = renders(*args)
        if fault == "no driver":
            raise RuntimeError("no\ndriver")
        return image, torch.nextafter(depth, torch.zeros(()))

    monkeypatch.setattr(backends, "_on_gpu", on_gpu)
    with warnings.catch_warnings(record=True) as said, scenes.render_on(CARD):
        warnings.simplefilter("always")
        views = [scenes.render_uncached(**ASKED) for _ in range(2)]
    same(views[0], views[1])
    same(views[0], scenes.render_uncached(**ASKED))
    told = [str(w.message) for w in said]
    assert len(told) == 1 and "the slower CPU renders them" in told[0] and "\n" not in told[0]
    assert ("differs from the CPU's" if fault == "other bits" else "RuntimeError: no driver") in told[0]
    assert len(gpu) == 1


def test_a_view_that_does_not_fit_on_the_gpu_is_rendered_on_the_cpu(gpu, monkeypatch):
    expected, renders = scenes.render_uncached(**ASKED), backends._on_gpu

    def on_gpu(stage, size, *rest):
        image, depth = renders(stage, size, *rest)
        if size == ASKED["size"]:
            raise torch.OutOfMemoryError("full")
        return image, depth

    monkeypatch.setattr(backends, "_on_gpu", on_gpu)
    with scenes.render_on(CARD), warnings.catch_warnings():
        warnings.simplefilter("error")
        same(scenes.render_uncached(**ASKED), expected)
    assert len(gpu) == 3


def test_a_trial_that_does_not_fit_is_made_again(gpu, monkeypatch):
    """Memory that a teacher holds says nothing of the pictures."""
    expected, renders, full = scenes.render_uncached(**ASKED), backends._on_gpu, [True]

    def on_gpu(*args):
        if full:
            raise torch.OutOfMemoryError("full")
        return renders(*args)

    monkeypatch.setattr(backends, "_on_gpu", on_gpu)
    with scenes.render_on(CARD), warnings.catch_warnings():
        warnings.simplefilter("error")
        same(scenes.render_uncached(**ASKED), expected)
        assert gpu == [] and backends._trials == {}
        full.clear()
        same(scenes.render_uncached(**ASKED), expected)
    assert [size for size, _ in gpu] == [(40, 56)] * 2 + [ASKED["size"]]


def test_threads_that_label_beside_a_gpu_render_on_it(gpu):
    shards = sources.scenes(3, size=(20, 28), seed=5)
    with thread_pools(2, CARD) as pools:
        photos = list(pools.workers.map(lambda entry: entry.load(), shards[0].scan().entries))
    assert [size for size, _ in gpu] == [(40, 56)] * 2 + [(20, 28)] * 3
    for photo, entry in zip(photos, shards[0].scan().entries, strict=True):
        assert torch.equal(photo.rgb, entry.load().rgb)


@pytest.mark.cuda
def test_a_card_gives_the_bits_of_the_cpu(card, monkeypatch):
    """All kinds, several threads, from a size of one pixel on; the card did it, for a fault raises."""
    monkeypatch.setattr(backends, "_try", lambda device: True)
    asked = [
        partial(scenes.render_uncached, seed, size=size, kind=kind, variety=variety)
        for kind in scenes.KINDS
        for seed, size, variety in ((31, (61, 83), False), (24, (224, 224), True), (9, (1, 1), False))
    ]
    expected = [one() for one in asked]
    with scenes.render_on(card), ThreadPoolExecutor(4) as pool:
        views = list(pool.map(lambda one: one(), asked * 2))
    for view, other in zip(views, expected * 2, strict=True):
        same(view, other)


@pytest.mark.cuda
def test_the_trial_on_a_card_passes(card, monkeypatch):
    monkeypatch.setattr(backends, "_trials", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends._trusted(card)
