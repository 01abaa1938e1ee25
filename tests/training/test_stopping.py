"""A run that is told to stop ends its step, writes a checkpoint and obeys; the rerun equals a run that was not told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest

from distill.training import checkpoints, loading, stopping
from distill.training.stopping import StopNotice, Stopped
from tests.ranks import ended_as, ranks_of_two
from tests.training.toys import assert_same_run, l1, run

STEP = 7


@pytest.fixture(autouse=True)
def handlers():
    """Signals whose default would end the test run raise instead, and are put back."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def tell_in(step, number):
    """A report that sends this process a signal after a step."""

    def report(done, total, **numbers):
        if done == step:
            os.kill(os.getpid(), number)

    return report


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_run_that_is_told_to_stop_writes_a_checkpoint_and_the_rerun_equals_a_straight_one(number, tmp_path):
    run(tmp_path / "straight", save_every=0)
    told = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", save_every=0, report=tell_in(STEP, number), tell=told.append)
    ours = ["stopping after this step and a checkpoint; once more: at once"]
    assert told == [*ours, f"a checkpoint of step {STEP + 1} is written"]
    assert checkpoints.find(tmp_path / "out")[-1].step == STEP + 1
    assert not (tmp_path / "out" / "student").exists()
    assert signal.getsignal(number) is signal.default_int_handler
    run(tmp_path / "out", save_every=0)
    assert_same_run(tmp_path / "out", tmp_path / "straight")


def test_a_notice_in_the_last_step_is_obeyed_once_the_student_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(tmp_path, report=tell_in(20, signal.SIGINT))
    assert not isinstance(stopped.value, Stopped)
    assert checkpoints.find(tmp_path)[-1].step == 20


def one_of_two(out, environment):
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ours = environment["RANK"] == "1"
    try:
        run(out, save_every=0, val_fraction=0.0, objective=_Telling() if ours else l1)
    except KeyboardInterrupt:
        os._exit(3)
    os._exit(4)


class _Telling:
    """The objective of a process that is told to stop in its step; the other one is not."""

    calls = 0

    def __call__(self, *given):
        self.calls += 1
        if self.calls == STEP:
            os.kill(os.getpid(), signal.SIGTERM)
        return l1(*given)


def test_processes_stop_at_the_same_step_whichever_was_told(tmp_path, processes):
    ranks = ranks_of_two(machines=2)  # which share the folder
    assert ended_as([(one_of_two, tmp_path, rank) for rank in ranks], processes) == [3, 3]
    (saved,) = checkpoints.find(tmp_path)
    assert saved.step == STEP


def test_a_second_signal_acts_at_once_unless_it_is_the_first_one_passed_on(monkeypatch):
    with pytest.raises(KeyboardInterrupt), StopNotice() as notice:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.given
        monkeypatch.setattr(stopping, "SAME_S", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        raise AssertionError("not reached")


def test_signals_that_are_ignored_stay_so_and_threads_hold_back_nothing():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seen = []

    def elsewhere():
        with StopNotice():
            seen.append(signal.getsignal(signal.SIGTERM))

    with StopNotice() as notice:
        os.kill(os.getpid(), signal.SIGINT)
        assert not notice.given and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    (thread := threading.Thread(target=elsewhere)).start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_an_error_after_a_notice_is_the_error():
    with pytest.raises(OSError, match="full"), StopNotice():
        os.kill(os.getpid(), signal.SIGINT)
        raise OSError("full")


def test_reading_processes_leave_the_decision_to_the_training_process(tmp_path):
    pids = []

    def report(done, total, **numbers):
        if done == STEP:
            children = [child.pid for child in multiprocessing.active_children()]
            pids.extend(children)
            for pid in [*children, os.getpid()]:  # as a terminal does
                os.kill(pid, signal.SIGINT)
                os.kill(pid, signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, workers=2, val_fraction=0.0, report=report)
    assert len(pids) == 2
    assert checkpoints.find(tmp_path)[-1].step == STEP + 1


def test_a_reading_process_ignores_both_however_it_was_started():
    """A fork has the training process's handlers; one of a server, as of Python 3.14, has none."""
    loading._init_worker(0)
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == [signal.SIG_IGN] * 2


def ends_with_batches_left():
    global batches
    loader = loading.loader_of([1.0, 2.0, 3.0], [[0], [1], [2]], list, loading.Readers(1))
    batches = next(loader), loader  # as a stored traceback keeps them


def test_a_process_that_ends_with_batches_left_does_not_wait_for_its_reader(processes):
    ending = processes.Process(target=ends_with_batches_left)
    ending.start()
    ending.join(timeout=60)
    ending.kill()
    assert ending.exitcode == 0


def test_a_stop_that_is_obeyed_is_delivered_and_another_signal_is_itself(monkeypatch):
    monkeypatch.setattr(stopping, "SAME_S", 0.0)
    got: list[int] = []
    for number in stopping.SIGNALS:
        signal.signal(number, lambda given, _: got.append(given))
    with pytest.raises(Stopped), StopNotice():
        signal.raise_signal(signal.SIGINT)
        raise Stopped
    assert got == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt), StopNotice():
        signal.raise_signal(signal.SIGINT)
        raise KeyboardInterrupt  # of something else: the notice was not obeyed
    assert got == [signal.SIGINT]
    with StopNotice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert got[1:] == [signal.SIGTERM, signal.SIGINT]
