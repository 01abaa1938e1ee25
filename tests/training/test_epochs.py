"""Epochs are steps of the samples that there are, and AnyDepth's schedule in them."""

from __future__ import annotations

import pytest

from distill.training.schedule import factor, in_steps
from distill.training.settings import TrainSettings
from tests.training.toys import Toys, run, steps_of


def test_an_epoch_is_every_sample_once(tmp_path):
    asked = TrainSettings(epochs=5, warmup_epochs=2, batch_size=16, schedule="poly", warmup_steps=9, steps=5)
    told = in_steps(asked, 369_297)
    assert (told.steps, told.warmup_steps) == (115_405, 46_162) and in_steps(told, 369_297) == told
    assert factor(0, told) == pytest.approx(1 / 46_162) and factor(46_162, told) == 1.0
    middle = (46_162 + 115_405) // 2
    assert factor(middle, told) == pytest.approx(0.5**0.9, rel=1e-4)
    assert in_steps(TrainSettings(epochs=0.01, warmup_epochs=0.001, warmup_steps=0), 8).steps == 1
    assert in_steps(TrainSettings(), 100) == TrainSettings()
    result, _ = run(tmp_path, epochs=1.5, val_fraction=0.0, batch_size=8)
    assert result.step == 4 and len(steps_of(tmp_path)) == 4  # 24 samples by 8, one and a half times, rounded
    with pytest.raises(ValueError, match="warmup_epochs .2. must be fewer than epochs .1."):
        TrainSettings(epochs=1, warmup_epochs=2)


def test_an_epoch_is_of_the_sources_that_are_learnt_from(tmp_path):
    dataset = Toys(24)
    dataset.sources = [0] * 6 + [1] * 18
    given = {"val_fraction": 0.0, "batch_size": 2, "source_weights": (1.0, 0.0)}
    assert run(tmp_path, dataset=dataset, epochs=2, **given)[0].step == 6
