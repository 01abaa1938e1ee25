"""What is tried out before labelling, a batch size and the distance from float32, is kept in the folder."""

from __future__ import annotations

import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from distill.core.depth import DepthMap, Kind
from distill.labelling import tuning
from distill.labelling.annotate import CPU
from distill.labelling.meeting import in_turn
from distill.labelling.objects import Objects
from distill.labelling.settings import LabelSettings


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time passes where a teacher says so."""
    now = [0.0]
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])
    Timed.clock = now


class Timed:
    """A teacher that takes `fixed` seconds a batch and `each` a crop; its memory holds `room` of them."""

    clock: list[float]
    card = SimpleNamespace(kind=Kind.AFFINE_DISPARITY, seeded=False)

    def __init__(self, fixed: float, each: float = 0.0, room: int = 1000, bias: float = 0.0):
        self.fixed, self.each, self.room, self.bias, self.asked = fixed, each, room, bias, []

    def predict(self, images):
        self.asked.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.clock[0] += self.fixed + self.each * len(images)
        values = images.mean(1) + self.bias
        return DepthMap(values, torch.ones_like(values, dtype=torch.bool), Kind.AFFINE_DISPARITY)


def test_the_smallest_batch_that_nothing_larger_beats():
    assert tuning.fastest([("t", Timed(0.0, 0.004))], 8, CPU) == 1, "no gain: no larger batch"
    assert tuning.fastest([("t", Timed(0.01))], 8, CPU, most=8) == 8, "all gain"
    assert tuning.fastest([("t", Timed(0.01, room=4))], 8, CPU) == 4, "memory"


def test_memory_is_given_back_once_nothing_holds_the_batch_that_was_refused(monkeypatch):
    held = []

    class Cramped(Timed):
        def predict(self, images):
            activations = torch.zeros(1)
            if len(images) > 2:
                held.append(weakref.ref(activations))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().predict(images)

    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append([one() is None for one in held]))
    assert tuning.fastest([("t", Cramped(0.01))], 8, CPU) == 2 and freed == [[True]]


def test_what_was_found_is_kept_and_taken_again(tmp_path):
    teacher, labels = Timed(0.003, room=2), LabelSettings(batch_size="auto")
    biased = {"t": lambda: Timed(0.0, bias=0.5)}
    first, told = tuning.tune(tmp_path, [("t", teacher)], labels, size=8, device=CPU, references=biased)
    assert first.batch_size == told["batch_size"] == 2
    assert told["from_float32"]["t"]["median"] > 0.5
    asked = len(teacher.asked)
    again = tuning.tune(tmp_path, [("t", teacher)], labels, size=8, device=CPU, references=biased)
    assert again == (first, told) and len(teacher.asked) == asked, "a resumed run tries nothing"


def test_nothing_is_written_where_nothing_is_asked(tmp_path):
    labels = LabelSettings(batch_size=3)
    assert tuning.tune(tmp_path / "x", [], labels, size=8, device=CPU, references={}) == (labels, {})
    assert not (tmp_path / "x").exists()


def test_auto_needs_a_folder_to_be_kept_in():
    with pytest.raises(ValueError, match="set a number"):
        LabelSettings(batch_size="auto", online=True)
    with pytest.raises(ValueError, match="batch_size must be one of auto, not 'most'"):
        LabelSettings(batch_size="most")
    with pytest.raises(ValueError, match="at least 1"):
        LabelSettings(batch_size=0)


def test_a_batch_size_that_is_lost_is_not_guessed_beside_finished_parts(tmp_path):
    labels, teacher = LabelSettings(batch_size="auto"), [("t", Timed(0.01, room=2))]
    first, _ = tuning.tune(tmp_path, teacher, labels, size=8, device=CPU, references={})
    (tmp_path / tuning.TUNED).write_text("{")
    assert tuning.tune(tmp_path, teacher, labels, size=8, device=CPU, references={})[0] == first, (
        "nothing depends on it"
    )
    (tmp_path / "sa_0-000.tar").touch()
    (tmp_path / tuning.TUNED).write_text("{")
    with pytest.raises(ValueError, match="machine.json is damaged, so the batch size of finished parts is unknown"):
        tuning.tune(tmp_path, teacher, labels, size=8, device=CPU, references={})


def test_workers_that_share_no_disk_take_the_batch_size_of_the_first(tmp_path):
    """Two folders, one store: the second worker's card would have chosen another size."""
    store, sizes = pytest.importorskip("obstore.store").MemoryStore(), []
    for name, room in (("one", 2), ("two", 8)):
        folder = tmp_path / name
        place, teachers = Objects("s3://bucket/labels", folder, store=store), [("t", Timed(0.01, room=room))]
        measure = partial(
            tuning.tune, folder, teachers, LabelSettings(batch_size="auto"), size=8, device=CPU, references={}
        )
        sizes.append(in_turn(place, folder / tuning.TUNED, measure)[0].batch_size)
    assert sizes == [2, 2]
