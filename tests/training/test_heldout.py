"""Held-out losses are those of the weights that are saved."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from distill.training import train as train_module
from distill.training.heldout import HeldOutSamples, evaluate, is_best, split
from distill.training.settings import TrainSettings
from tests.training.toys import Toy, Toys, collate, run, settings


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_every_process_evaluates_the_buffers_that_are_saved(tmp_path, monkeypatch, ema):
    kept = []
    monkeypatch.setattr(train_module, "_finish", lambda made: kept.append(made))
    run(tmp_path, student=Toy(batchnorm=True), steps=4, ema=ema)
    (made,) = kept
    saved = [buffer.clone() for buffer in made.evaluated_network.buffers()]
    made.processes = replace(made.processes, index=1, count=2, share=lambda value: saved)
    for buffer in made.evaluated_network.buffers():
        buffer.add_(1)  # as another process's own images have left them
    samples = Toys()
    held = HeldOutSamples(samples, range(12), collate)  # of two batches of 8 and 4 the second is this process's
    line = evaluate(made, held)
    assert all(map(torch.equal, made.evaluated_network.buffers(), saved))
    network, losses = made.evaluated_network.eval(), []
    for index in range(8, 12):
        _, image, maps = samples[index]
        pred = network(image[None])[0]
        penalty = 0.1 * pred.square().mean()
        losses.append(
            sum(w * ((pred - maps[n]).abs().mean() + penalty) for n, w in made.settings.teacher_shares.items())
        )
    assert line["heldout"] == pytest.approx(sum(losses).item() / 4, rel=1e-5)


def test_a_dataset_that_replaces_images_knows_which_are_held_out():
    told = []

    class Replacing(Toys):
        def keep_apart(self, heldout):
            told.append(list(heldout))

    settings = TrainSettings(steps=2, warmup_steps=0, val_fraction=0.3)
    train, heldout = split(Replacing(), None, settings)
    assert told == [heldout] and heldout and not {*train} & {*heldout}
    split(Replacing(), Toys(), settings)
    assert told == [heldout], "another dataset is held out"


def test_patience_counts_evaluations_since_the_best():
    run_ = SimpleNamespace(step=0, best=None, evaluations_since_best=0)
    counted = []
    for step, loss in enumerate((3.0, 2.0, 2.0, float("nan"), 1.5)):
        run_.step = step
        counted.append((is_best(run_, {"heldout": loss}), run_.evaluations_since_best, run_.best["step"]))
    assert counted == [(True, 0, 0), (True, 0, 1), (False, 1, 1), (False, 2, 1), (True, 0, 4)]


def test_only_sources_of_no_weight_are_left_out_of_what_is_held_out():
    toys = Toys(6, per_image=1)
    toys.sources = [0, 1, 2] * 2
    assert split(toys, toys, settings(source_weights=(1.0, 0.0, 0.5)))[1] == [0, 2, 3, 5]
