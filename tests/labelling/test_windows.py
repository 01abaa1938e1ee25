"""What another process does exactly between two steps of ours: a hook does it there, at once and every time."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill.core import files
from distill.labelling import leases, lock, manifest, worker
from distill.labelling.leases import NOTES, disk_time
from distill.labelling.lock import RunLockedError, refuse_run, run_lock
from distill.labelling.meeting import LAST, Folder
from distill.labelling.objects import Objects
from distill.labelling.tuning import TUNED, tune
from distill.labelling.worker_costs import records, settle
from distill.shards.shards import SETTINGS, read_json
from tests.labelling.formula import Formula, LabelSettings, contents, run, work

CARD = {"host": "a", "pid": 1, "device": "cuda", "part": "", "ended": False, "parts": 0, "lost": 0, "seconds": 1800.0}


@pytest.fixture
def store():
    pytest.importorskip("obstore")
    from obstore.store import MemoryStore

    return MemoryStore()


def test_workers_that_ask_at_once_about_a_killed_runs_claim_are_not_told_that_it_lives(tmp_path, monkeypatch):
    (tmp_path / ".claim-0-of-2").touch()
    plain, asked = files.fcntl.flock, []

    def locks(file, how):
        plain(file, how)
        if not asked:
            asked.append(how)
            refuse_run(tmp_path)  # another worker, while this one looks at the claim
            with run_lock(tmp_path, rank=1, world=2):  # and a run that begins
                asked.append(how)

    monkeypatch.setattr(files.fcntl, "flock", locks)
    refuse_run(tmp_path)
    assert len(asked) == 2
    monkeypatch.setattr(files.fcntl, "flock", plain)
    with run_lock(tmp_path, rank=0, world=2), pytest.raises(RunLockedError, match="is being labelled by process"):
        refuse_run(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (3, 1), (3, 10)])
def test_a_run_is_refused_where_another_is_of_another_size_or_has_its_rank(tmp_path, rank, world):
    claim = files.take_lock(tmp_path / ".claim-3-of-10")
    for text, who in (("", "a process that is starting"), ("process 7 on a", "process 7 on a")):
        claim.write(text)
        said = f"^{re.escape(str(tmp_path))} is being labelled by {who}: wait for it, stop it"
        with pytest.raises(RunLockedError, match=said), run_lock(tmp_path, rank=rank, world=world):
            pass
    claim.release()
    with run_lock(tmp_path, rank=rank, world=world):
        assert (
            tmp_path / f".claim-{rank}-of-{world}"
        ).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert not list(tmp_path.iterdir())


def test_a_run_waits_for_workers_that_live_and_for_no_others(tmp_path, monkeypatch):
    holders = [SimpleNamespace(dead=True, pid=6, host="a")]
    monkeypatch.setattr(lock, "FolderLeases", lambda folder: SimpleNamespace(holders=lambda: holders))
    with run_lock(tmp_path, rank=0, world=1):
        pass
    holders.append(SimpleNamespace(dead=False, pid=7, host="b"))
    with pytest.raises(RunLockedError, match="is being labelled by worker 7 on b: join it"):
        with run_lock(tmp_path, rank=0, world=1):
            pass
    assert not list(tmp_path.iterdir())


def test_a_folder_where_no_lock_can_be_written_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"cannot write in the labels folder {re.escape(str(tmp_path))}/gone: No"
    ):
        with lock.mutex(tmp_path / "gone"):
            pass


def test_a_claim_that_is_looked_at_is_taken_all_the_same(tmp_path, monkeypatch):
    (tmp_path / ".claim-0-of-1").touch()
    plain, runs, ended = files.fcntl.flock, [], []

    def begin():
        try:
            with run_lock(tmp_path, rank=0, world=1):
                ended.append("had it")
        except RunLockedError as error:
            ended.append(str(error))

    def locks(file, how):
        plain(file, how)
        if not runs:  # a run begins while a worker looks at its claim
            runs.append(threading.Thread(target=begin))
            runs[0].start()
            runs[0].join(0.05)

    monkeypatch.setattr(files.fcntl, "flock", locks)
    refuse_run(tmp_path)
    runs[0].join(10)
    assert ended == ["had it"]


def test_ranks_that_begin_at_once_after_a_run_of_another_size_do_not_refuse_each_other(tmp_path, monkeypatch):
    (tmp_path / ".claim-0-of-4").touch()
    plain, others, ended = lock._take, [], []

    def rank_1():
        try:
            with run_lock(tmp_path, rank=1, world=2):
                ended.append("had it")
        except RunLockedError as error:
            ended.append(str(error))

    def takes(path, *, wait):
        found = plain(path, wait=wait)
        if path.name == ".claim-0-of-4" and not others:
            others.append(threading.Thread(target=rank_1))
            others[0].start()
            others[0].join(0.05)  # it ends by now, or waits for its turn
        return found

    monkeypatch.setattr(lock, "_take", takes)
    with run_lock(tmp_path, rank=0, world=2):
        others[0].join(10)
    assert ended == ["had it"] and not list(tmp_path.iterdir())


def test_a_run_that_workers_refuse_ends_none_of_them(tmp_path, monkeypatch):
    claim, taken = Folder(tmp_path, lease_s=60.0).take("sa_0-000.tar"), []
    monkeypatch.setattr(lock, "_take", lambda path, *, wait: taken.append(path))
    with pytest.raises(RunLockedError, match="is being labelled by worker"), run_lock(tmp_path, rank=0, world=1):
        pass
    claim.release()
    assert not taken, "a worker that looks now would take it for a run"


def test_a_run_that_begins_while_a_worker_is_between_two_parts_is_seen(tars, tmp_path, monkeypatch):
    out, taken, claims = tmp_path / "out", [], []
    place = Folder(out, lease_s=60.0)
    take = place.take

    def late(name):
        taken.append(name)
        if name.endswith(".tar") and len([one for one in taken if one.endswith(".tar")]) == 2:
            claims.append(files.take_lock(out / ".claim-0-of-1"))
        return take(name)

    monkeypatch.setattr(place, "take", late)
    with pytest.raises(RunLockedError, match="is being labelled by"):
        work(tars, out, meeting=place)
    claims[0].release()
    assert not list((out / NOTES).glob("*.lease")) and len(list(out.glob("*.tar"))) == 1


def test_of_two_workers_that_begin_with_other_settings_the_second_is_refused(tars, tmp_path, monkeypatch):
    run(tars, tmp_path / "one", samples_per_part=2)
    out, first, plain = tmp_path / "out", [], manifest.dump_json

    def dumped(table):
        if not first:  # ours saw no settings, and is about to write its own
            first.append(None)
            first.append(work(tars, out, samples_per_part=2))
        return plain(table)

    monkeypatch.setattr(manifest, "dump_json", dumped)
    with pytest.raises(ValueError, match="made with different settings: samples_per_part"):
        work(tars, out)
    assert first[1].last and contents(out) == contents(tmp_path / "one")
    assert read_json(out / SETTINGS)["samples_per_part"] == 2


def test_a_finisher_that_slept_does_not_send_its_manifest_after_another_did(store, tars, tmp_path, monkeypatch):
    run(tars, tmp_path / "one")
    ours, other = (Objects("s3://x/y", tmp_path / name, lease_s=60.0, store=store) for name in "ab")
    plain, stamps = worker.finish, []

    def slept(out, *args, **options):
        written = plain(out, *args, **options)
        if written and not stamps:
            stamps.append(None)
            held = store.head(f"{NOTES}/{LAST}.lease")
            other._seen[LAST] = (str(held["e_tag"]), -1e9)  # silent for long
            assert work(tars, other.out, Formula(wait=99), meeting=other).last
            stamps.append(other.stamp())
        return written

    monkeypatch.setattr(worker, "finish", slept)
    outcome = work(tars, ours.out, meeting=ours)
    assert outcome.complete and not outcome.last and outcome.parts == 6
    assert ours.stamp() == stamps[1] and not (ours.out / "manifest.json").exists()


def test_leases_are_taken_and_read_while_the_last_worker_removes_their_folder(tmp_path, monkeypatch):
    place, plain = Folder(tmp_path), SimpleNamespace(mkdir=os.mkdir, scandir=os.scandir)
    removed = []

    def without_folder(name):
        def then(path, *args, **options):
            if path == tmp_path / NOTES and name not in removed:
                removed.append(name)
                Path(path).rmdir()
            return getattr(plain, name)(path, *args, **options)

        return then

    def made(path, *args, **options):
        try:
            plain.mkdir(path, *args, **options)
        except FileExistsError:
            if "mkdir" not in removed:
                removed.append("mkdir")
                Path(path).rmdir()
            raise

    monkeypatch.setattr(os, "scandir", without_folder("scandir"))
    (tmp_path / NOTES).mkdir()
    seen = [] if sys.version_info >= (3, 13) else ["scandir"]  # pathlib keeps its own reference from then on
    assert place.holders() == [] and removed == seen
    removed.clear()
    (tmp_path / NOTES).mkdir(exist_ok=True)
    assert place.notes("worker-") == {} and removed == seen
    monkeypatch.setattr(os, "mkdir", made)
    for use in (lambda: place.take("a-000.tar"), lambda: place.write_note("worker-0", CARD)):
        removed.clear()
        shutil.rmtree(tmp_path / NOTES, ignore_errors=True)
        plain.mkdir(tmp_path / NOTES)
        use()
        assert removed == ["mkdir"]
    assert place.note("worker-0") == CARD


def test_two_that_read_the_disks_clock_at_once_both_read_it(tmp_path, monkeypatch):
    """Containers give their first process the same number."""
    plain, times = Path.touch, []

    def touched(path, *args, **options):
        plain(path, *args, **options)
        if not times:
            times.append(None)
            times.append(disk_time(tmp_path))

    monkeypatch.setattr(Path, "touch", touched)
    monkeypatch.setattr(leases, "time", SimpleNamespace(time=lambda: 1e12))
    times.append(disk_time(tmp_path))
    assert all(time < 1e11 for time in times[1:]) and not list(tmp_path.iterdir())


def test_workers_records_are_not_missed_while_they_are_merged(tmp_path, monkeypatch):
    place, settled = Folder(tmp_path), []
    for name in "ab":
        place.write_note(f"worker-{name}", CARD)

    def then_settled(read):
        def wrapped(*args):
            found = read(*args)
            if not settled:
                settled.append(None)
                settle(Folder(tmp_path))
            return found

        return wrapped

    monkeypatch.setattr(place, "note", then_settled(place.note))
    assert [*records(place)] == ["a", "b"] and settled


def test_a_worker_that_joins_writes_no_results_that_are_there(tmp_path):
    """The last worker removes half-written files: one that joins then would fail."""
    labels, twins = LabelSettings(batch_size="auto"), {}
    tune(tmp_path, [], labels, size=16, device=torch.device("cpu"), references=twins)
    before = (tmp_path / TUNED).stat()
    assert tune(tmp_path, [], labels, size=16, device=torch.device("cpu"), references=twins)[1]["batch_size"] > 0
    after = (tmp_path / TUNED).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_what_a_finisher_of_the_same_machine_removes_half_written_is_fetched_again(store, tmp_path, monkeypatch):
    """The processes of a machine share their local folder."""
    ours, other = (Objects("s3://x/y", tmp_path, store=store) for _ in range(2))
    store.put("a-000.json", b"{}")
    plain, tidied = Path.write_bytes, []

    def then_tidied(path, data):
        plain(path, data)
        if not tidied:
            tidied.append(other.tidy())

    monkeypatch.setattr(Path, "write_bytes", then_tidied)
    ours.download("a-000.json")
    assert tidied and (tmp_path / "a-000.json").read_bytes() == b"{}"


def test_a_manifest_is_left_to_a_run_that_begins_just_before_we_write_it(tars, tmp_path, monkeypatch):
    run(tars, tmp_path / "one")
    out, claims = tmp_path / "out", []
    place = Folder(out, lease_s=60.0)
    take = place.take

    def late(name):
        if name == LAST and not claims:
            claims.append(files.take_lock(out / ".claim-0-of-1"))
        elif name.startswith("wait") and len(claims) == 1:
            claims[0].release()
            claims.append(run(tars, out))
        return take(name)

    monkeypatch.setattr(place, "take", late)
    outcome = work(tars, out, meeting=place)
    assert outcome.complete and not outcome.last and claims[1].complete and claims[1].parts == 0
    assert contents(out) == contents(tmp_path / "one")
