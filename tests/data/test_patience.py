"""A read that fails for a moment is tried again; one that fails for good is not."""

from __future__ import annotations

import errno
import json
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from distill.app.filtering import Scored, Source, score_line
from distill.core.crop_settings import CropSettings
from distill.data import patience
from distill.data.patience import patiently
from distill.data.photos import BadImageError
from distill.labelling.annotate import Rejected
from distill.labelling.run import PartSettings


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    slept = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    monkeypatch.setattr(patience, "_vain", deque(maxlen=patience.VAIN))
    return slept


class Failing:
    """Raises the errors, one a call, and then returns `result`."""

    def __init__(self, *errors, result="read"):
        self.errors, self.result = list(errors), result

    def __call__(self, *given):
        if self.errors:
            error = self.errors.pop(0)
            if isinstance(error, tuple):  # as the readers wrap it
                raise error[0] from error[1]
            raise error
        return self.result


BUSY = OSError(errno.EIO, "Input/output error")


def test_what_passes_is_tried_three_times(waits):
    assert patiently(Failing(BUSY, (BadImageError("cannot be read"), OSError(errno.ESTALE, "Stale")))) == "read"
    assert waits == [0.5, 2.0]
    with pytest.raises(OSError, match="Input/output"):
        patiently(Failing(BUSY, BUSY, BUSY))
    assert patiently(Failing(TimeoutError("no answer"))) == "read"


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "none"), BadImageError("truncated"), OSError("x")])
def test_what_stays_is_not(error, waits):
    with pytest.raises(type(error)):
        patiently(Failing(error))
    assert waits == []


def test_a_broken_disk_is_not_waited_for_at_each_of_its_photographs(waits, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    for _ in range(10_000):
        with pytest.raises(OSError, match="Input/output"):
            patiently(Failing(BUSY, BUSY, BUSY))
    assert len(waits) == 2 * patience.VAIN
    with pytest.raises(OSError, match="Input/output"):  # the others are read once
        patiently(Failing(BUSY))
    now[0] = patience.VAIN_S + 1
    assert patiently(Failing(BUSY)) == "read" and not patience._vain


def test_waiting_that_helps_goes_on(waits):
    for _ in range(100):
        assert patiently(Failing(BUSY, BUSY)) == "read"
    assert len(waits) == 200


def test_filter_scores_a_sample_whose_disk_did_not_answer():
    depth = np.linspace(1, 2, 64 * 64, dtype=np.float32).reshape(64, 64)
    image = np.zeros((64, 64, 3), np.uint8)
    load = Failing(BUSY, result=Scored(image, depth, depth > 0, False))
    line = json.loads(score_line(Source("a", "a", ["one"], load, key=""), 0, with_image=False))
    assert "error" not in line and line["valid"] == 1.0


def test_labelling_reads_it_too():
    entry = SimpleNamespace(load=Failing(BUSY, BadImageError("truncated")), origin="o", key="k")
    work = PartSettings([], CropSettings(), None, 0, None, (), None)
    assert work.jobs(entry) == [Rejected("o", "k", "truncated")] and entry.load.errors == []
