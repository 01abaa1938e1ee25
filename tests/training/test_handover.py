"""Batches that go through slots of shared memory are the batches that the reading processes made."""

from __future__ import annotations

import gc
import multiprocessing
import os
import select
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import get_worker_info

from distill.core import machine
from distill.shards.shards import LabelDataset
from distill.training import handover as handover_module
from distill.training.handover import SLOTS, SPARE, Giving, Handed, Handover, handover_for, packed, unpacked
from distill.training.loading import Readers, StreamSamples, loader_of, readers_of
from distill.training.sampling import MicroBatchPositions, make_order
from distill.training.settings import TrainSettings
from distill.training.stored import _on_device, collate_stored, stored_batches
from tests.labelling.formula import Formula, run, two_tars

CPU = torch.device("cpu")
AT_ONCE = 4.5  # seconds, on a busy machine too: PyTorch waits 5 s for a process that does not end
SETTINGS = TrainSettings(steps=9, batch_size=2, warmup_steps=0, workers=2, val_fraction=0.0)


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    run(two_tars(folder), folder / "out", Formula())
    return LabelDataset(folder / "out")


def positions_of(labels):
    order = make_order(list(range(len(labels))), labels.sources, seed=3, weights=(), temperature=1.0)
    return MicroBatchPositions(
        order=order, batch_size=2, accumulate=1, process=0, processes=1, steps=SETTINGS.steps
    )  # fmt: skip


def same(ours, theirs):
    assert ours.keys == theirs.keys
    mine, its = packed(ours)[1], packed(theirs)[1]
    assert len(mine) == len(its) > 5
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, its, strict=True))


@pytest.mark.parametrize("room", [1 << 20, 4096])
def test_the_same_bits(labels, room, monkeypatch):
    """In more batches than there are slots; where none has room they go the usual way."""
    positions = positions_of(labels)
    samples, seen, handover = StreamSamples(labels, SETTINGS, training=True, coded=True), [], Handover(2, room)
    freed, release = [], Handover.release

    def watched_release(self, handed):
        freed.append((handed.reader, handed.slot))
        release(self, handed)

    monkeypatch.setattr(Handover, "release", watched_release)
    given = loader_of(samples, positions, Giving(collate_stored, handover), Readers(2))

    def watched():
        for batch in given:
            seen.append(isinstance(batch, Handed))
            yield batch
        seen.append("asked beyond the end, where a loader waits for its processes")

    with handover.held():
        ours = list(_on_device(watched(), len(positions), handover, SETTINGS, CPU))
    assert seen == [room > 4096] * SETTINGS.steps and SETTINGS.steps > 2 * SLOTS
    in_turn = [(place % 2, place // 2 % SLOTS) for place in range(SETTINGS.steps)]
    assert freed == in_turn * (room > 4096), "a slot that is freed twice is written while it is read"
    for mine, its in zip(ours, stored_batches(labels, positions, settings=SETTINGS, device=CPU), strict=True):
        assert mine.waited is not None and its.waited is None
        same(mine, its)


@pytest.mark.parametrize("close", ["generator", "handover"])
def test_processes_that_wait_for_a_slot_end_with_the_run(labels, close):
    """At once: whoever lets go of the batches first, and with no batch that nobody takes."""
    samples, handover = StreamSamples(labels, SETTINGS, training=True, coded=True), Handover(2, 1 << 20)
    giving = Giving(collate_stored, handover)
    batches = loader_of(samples, positions_of(labels), giving, Readers(2), end=handover.end)
    with handover.held():
        assert isinstance(next(batches), Handed)  # and never given back
        time.sleep(0.5)
        start = time.perf_counter()
        if close == "generator":
            del batches
    if close == "handover":
        with pytest.raises(OSError, match="stopped taking batches"):
            for _ in range(9):
                next(batches)
        del batches
    assert time.perf_counter() - start < AT_ONCE


def test_an_error_ends_the_processes_at_once(labels, forked):
    """That wait for a slot too, and though the error holds the frame that held them."""
    samples, handover = StreamSamples(labels, SETTINGS, training=True, coded=True), Handover(2, 1 << 20)

    class OneBroken:
        def __getitem__(self, place):
            return OSError("cut short") if place is None else samples[place]

    places = [list(one) for one in positions_of(labels)]
    with handover.held(), pytest.raises(OSError, match="cut short"):
        for _ in loader_of(
            OneBroken(), [*places[:4], [None]], Giving(collate_stored, handover), Readers(2), end=handover.end
        ):
            time.sleep(0.1)
            start = time.perf_counter()  # of the last batch before the error
    gc.collect()
    assert time.perf_counter() - start < AT_ONCE


class Slow:
    def __getitem__(self, place):
        time.sleep(20)


def test_reading_processes_end_with_one_that_is_killed():
    """All of them at once, whatever they are at; the pipe ends where nobody has its other end any more."""
    ours, theirs = os.pipe()

    def reads():
        os.close(ours)
        next(loader_of(Slow(), [[0]] * 9, list, Readers(2)))

    parent = multiprocessing.get_context("fork").Process(target=reads)
    parent.start()
    os.close(theirs)
    time.sleep(0.7)
    parent.kill()
    parent.join()
    assert select.select([ours], [], [], 10.0)[0] and os.read(ours, 1) == b""
    os.close(ours)


def test_a_sample_that_cannot_be_read_is_an_error_as_ever(labels, tmp_path, forked):
    class Broken:
        def __getitem__(self, place):
            return OSError("cut short")

    handover = Handover(1, 4096)
    with handover.held(), pytest.raises(OSError, match="cut short"):
        list(loader_of(Broken(), [[0, 1]], Giving(collate_stored, handover), Readers(1)))


class Card:
    """What of a card's interface locks pages. refuses: every request."""

    def __init__(self, refuses):
        self.refuses, self.asked, self.given_back, self.waited_for = refuses, [], [], []

    def cudaHostRegister(self, address, size, flags):  # noqa: N802
        self.asked.append(address)
        return 801 if self.refuses else 0

    def cudaHostUnregister(self, address):  # noqa: N802
        self.given_back.append(address)

    def synchronize(self, device=None):
        self.waited_for.append(device)
        raise RuntimeError("an illegal memory access")


@pytest.mark.parametrize("refuses", [False, True])
def test_pages_are_asked_for_once_and_given_back_by_a_broken_card_too(monkeypatch, caplog, refuses):
    card, handover = Card(refuses), Handover(2, 64)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: card)
    monkeypatch.setattr(torch.cuda, "synchronize", card.synchronize)
    slots = [handover.slot(reader, number) for reader in range(2) for number in range(SLOTS)]
    assert len({slot.untyped_storage().data_ptr() for slot in slots}) == 1  # one descriptor, however many read
    with pytest.raises(KeyError, match="its own"), handover.held():
        for slot in slots * 3:
            assert handover._lock(slot, CPU) is not refuses
        raise KeyError("its own")
    assert [("needs an extra copy" in one.message) for one in caplog.records] == [True] * refuses
    assert card.asked == [slot.data_ptr() for slot in slots]
    assert (card.given_back, card.waited_for) == (([], []) if refuses else (card.asked, [CPU]))


@pytest.mark.parametrize(("batches", "refuses", "locked"), [(3, False, 3), (9, False, 4), (9, True, 1)])
def test_pages_are_locked_while_the_first_batch_is_read(monkeypatch, labels, batches, refuses, locked):
    """In the order in which batches come: every process's first slot, then every second one."""
    card, handover = Card(refuses), Handover(2, 1 << 20)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: card)
    monkeypatch.setattr(torch.cuda, "synchronize", card.synchronize)
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    slots = [handover.slot(reader, number).data_ptr() for number in range(SLOTS) for reader in range(2)]
    samples, before = StreamSamples(labels, SETTINGS, training=True, coded=True), []

    def started():
        handover.lock(torch.device("cuda", 0), batches)
        before.extend(card.asked)

    with handover.held():
        given = loader_of(
            samples,
            positions_of(labels),
            Giving(collate_stored, handover),
            Readers(2),
            started=started,
            end=handover.end,
        )
        first = next(given)
        assert before == slots[:locked] and isinstance(first, Handed) and (first.reader, first.slot) == (0, 0)
        given.close()
    assert card.given_back == ([] if refuses else slots[:locked])


def no_space(size):
    raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")


def no_file(size):
    raise OSError(24, "Too many open files")


def test_slots_are_taken_where_shared_memory_allows(monkeypatch, labels):
    monkeypatch.setattr(machine, "shared_memory", lambda: 1 << 20)
    made = handover_for(2, 10_000)
    assert made is not None and int(10_000 * SPARE) <= made.size < 10_000 * SPARE + 4096
    assert handover_for(2, 1 << 18) is None and handover_for(0, 10) is None
    assert handover_for(2, 100_000) is None, "half of what is free is left to others"
    for refuse in (no_space, no_file):  # another run takes it in between
        with monkeypatch.context() as another:
            another.setattr(torch.UntypedStorage, "_new_shared", refuse)
            assert handover_for(2, 10_000) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert handover_for(2, 10_000) is None
    monkeypatch.undo()
    samples, positions = StreamSamples(labels, SETTINGS, training=True, coded=True), positions_of(labels)
    size = sum(x.nbytes for x in packed(collate_stored([samples[p] for p in next(iter(positions))]))[1])
    assert readers_of(samples, positions, collate_stored, 2, measured=True).size == size > 0
    assert readers_of(samples, positions, collate_stored, 0, measured=True) == Readers(0)


def test_outside_a_reading_process_nothing_is_handed_over():
    assert get_worker_info() is None and Handover(1, 64).give([torch.ones(2)])[0].tolist() == [1.0, 1.0]


def test_numbers_of_any_width_lie_where_they_can_be_read_and_a_slot_is_filled_to_its_end(monkeypatch):
    monkeypatch.setattr(handover_module, "get_worker_info", lambda: SimpleNamespace(id=0))
    handover = Handover(1, 4000)  # in whole pages
    given = [torch.arange(3, dtype=torch.uint8), torch.rand(2, dtype=torch.float64), torch.arange(5)]
    for batch in (
        given,
        [torch.rand(1024)],
        given,
    ):  # of which the second fills its slot, and the third is in the first
        handed = handover.give(batch)
        assert isinstance(handed, Handed)
        assert all(torch.equal(a, b) for a, b in zip(handover.take(handed, CPU)[0], batch, strict=True))
        handover.release(handed)
    too_large = [torch.rand(1025)]
    assert handover.give(too_large) is too_large


def test_what_is_packed_without_its_tensors_takes_others():
    content, tensors = packed({"a": (torch.ones(1000), "b"), "c": SETTINGS})
    assert [x.numel() for x in tensors] == [1000] and len(content) < 2000
    again = unpacked(content, [torch.zeros(1)])
    assert again["a"][0].item() == 0.0 and again["a"][1] == "b" and again["c"] == SETTINGS


def test_a_server_of_processes_imports_torch_once(monkeypatch, forked):
    """As from Python 3.14 on, where each process would import it."""
    preloaded = []
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", preloaded.extend)
    for method, expected in (("fork", []), ("forkserver", ["__main__", "distill.training.loading"])):
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda method=method: method)
        assert len(list(loader_of(list(range(4)), [[0], [1]], list, Readers(1)))) == 2
        assert preloaded == expected
