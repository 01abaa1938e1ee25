"""What goes wrong between workers at one moment: takeovers while the manifest is written, lost answers, odd clocks."""

from __future__ import annotations

import errno
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from distill.app.status import sentence
from distill.core import files
from distill.core.files import take_lock
from distill.labelling import lock, objects
from distill.labelling.board import Board, withdraw
from distill.labelling.leases import NOTES, Alone, FolderLeases, LeaseLostError
from distill.labelling.lock import RunLockedError, run_lock
from distill.labelling.meeting import LAST, Folder
from distill.labelling.objects import Objects
from distill.labelling.run_status import run_status
from tests.labelling.formula import LEASE, Broken, Formula, contents, run, work

CARD = {"host": "a", "pid": 1, "device": "cuda", "part": "", "ended": False, "parts": 0, "lost": 0, "seconds": 1800.0}


def test_what_a_run_cost_is_known_when_it_is_finished(tars, tmp_path):
    out = tmp_path / "out"
    place = Folder(out, lease_s=LEASE)
    place.write_note("worker-killed", {**CARD, "part": "sa_0-000.tar"})
    work(tars, out)
    for _ in range(2):  # to look changes nothing
        now = run_status(Folder(out), out, ["sa_0", "sa_1"])
        ours, killed = sorted(now.workers, key=lambda worker: worker.device)
        assert (ours.state, ours.parts, ours.images) == ("ended", 6, 10) and ours.images_per_s > 0 and ours.hours > 0
        assert killed.state == "gone" and now.gpu_hours == 0.5 and now.complete
        assert sentence(now) == "complete; 6 of 6 parts, 10 of 10 images, 0.50 GPU-hours"
    assert [path.name for path in (out / NOTES).iterdir()] == ["spent.json"]
    (out / "sa_1-000.tar").unlink()
    assert work(tars, out).parts == 1
    now = run_status(Folder(out), out, ["sa_0", "sa_1"])
    assert sum(worker.parts for worker in now.workers) == 7 and now.gpu_hours == 0.5
    (out / "sa_1-000.tar").unlink()
    assert run(tars, out).parts == 1 and run_status(Folder(out), out, []).gpu_hours == 0.5, "a run by itself keeps it"


def test_a_standing_is_read_while_notes_come_and_go_and_names_a_part_that_kills(tars, tmp_path):
    out = tmp_path / "out"
    place = Folder(out, lease_s=LEASE)
    for i in range(3):
        place.write_note(f"worker-{i}", {**CARD, "pid": i, "part": "sa_1-000.tar"})
    place.write_note("worker-3", {**CARD, "pid": 3, "part": "sa_0-000.tar"})
    (out / NOTES / "worker-4.json").write_text('{"host": "a", "pi')
    now = run_status(place, out, ["sa_0", "sa_1"])
    assert len(now.workers) == 4 and now.deadly == (("sa_1-000.tar", 3),)
    work(tars, out)
    assert run_status(place, out, []).deadly == (), "it is made"


def test_a_finisher_that_slept_until_another_had_finished_ends_well(tars, tmp_path, monkeypatch):
    run(tars, tmp_path / "one")
    out, plain, other = tmp_path / "out", files.publish, []

    def publish(new, path):
        if path.name == "manifest.json" and not other:
            other.append("")
            (out / NOTES / f"{LAST}.lease").unlink()
            other.append(work(tars, out, Formula(wait=99)))
        plain(new, path)

    monkeypatch.setattr(files, "publish", publish)
    ours = work(tars, out)
    assert other[1].last and other[1].complete and ours.complete and not ours.last
    assert contents(out) == contents(tmp_path / "one")


def test_a_manifest_that_was_written_just_before_our_lease_is_not_written_again(tars, tmp_path, monkeypatch):
    run(tars, tmp_path / "one")
    out, other = tmp_path / "out", []
    place = Folder(out, lease_s=60.0)
    take, stamps = place.take, []

    def late(name):
        if name == LAST and not other:
            other.append(work(tars, out, Formula(wait=99), lease_s=60.0))
            stamps.append(place.stamp())
        return take(name)

    monkeypatch.setattr(place, "take", late)
    ours = work(tars, out, meeting=place)
    assert other[0].last and other[0].complete and other[0].parts == 0
    assert ours.complete and not ours.last and ours.parts == 6
    assert place.stamp() == stamps[0] and contents(out) == contents(tmp_path / "one")


def test_the_lease_of_the_last_worker_is_the_last_thing_that_it_removes(tmp_path, monkeypatch):
    place, left = Folder(tmp_path), []
    held = [place.take(LAST), place.take("sa_0-000.tar")]
    place.write_note("worker-0", CARD)
    plain = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **how: (left.append(path.name), plain(path, **how)))
    place.tidy()
    assert left[-1] == f"{LAST}.lease" and len(left) == 3 and not (tmp_path / NOTES).exists()
    assert all(held)


def test_a_note_that_a_finisher_removed_half_written_stops_nobody(tmp_path, monkeypatch):
    place, plain = Folder(tmp_path), Path.write_text

    def tidied(path, text):
        plain(path, text)
        Folder(tmp_path).tidy()

    monkeypatch.setattr(Path, "write_text", tidied)
    place.write_note("worker-0", CARD)
    assert place.note("worker-0") == {} and not (tmp_path / NOTES).exists()
    monkeypatch.setattr(Path, "write_text", lambda path, text: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        place.write_note("worker-0", CARD)


def test_the_manifest_of_a_finisher_that_was_killed_is_written_by_who_waits(tars, tmp_path):
    run(tars, tmp_path / "one")
    out = tmp_path / "out"
    out.mkdir()
    FolderLeases(out / NOTES, seconds=LEASE).take(LAST).lease._stop_heartbeat()
    (out / ".manifest.json.partial.0123").write_text('{"recipe"')
    assert work(tars, out).last and contents(out) == contents(tmp_path / "one")


def test_a_part_between_its_json_and_its_tar_is_not_taken_away_from_who_makes_it(tars, tmp_path):
    run(tars, tmp_path / "out")
    (tmp_path / "out" / "sa_1-000.tar").unlink()
    place, told = Folder(tmp_path / "out", lease_s=LEASE), []
    maker = place.take("sa_1-000.tar")
    board = Board(tars, [2, 2], tmp_path / "out", place, [("formula", Formula())], told.append)
    assert [found.images for found in board.walk(1)] == [2, 2, 2, 2, 1, 1], "long ones first"
    withdraw(place, "sa_1-000.tar", lambda: True)
    assert place.has("sa_1-000.json")
    maker.release()
    withdraw(place, "sa_1-000.tar", lambda: False)
    assert place.has("sa_1-000.json")
    withdraw(place, "sa_1-000.tar", lambda: True)
    assert not place.has("sa_1-000.json")


def test_a_run_and_a_worker_that_begin_at_one_moment_see_each_other(tars, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    plain, come = lock._take, []

    def takes(path, *, wait):
        found = plain(path, wait=wait)
        come.append(FolderLeases(out / NOTES).take("sa_0-000.tar"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(lock, "_take", takes)
        with pytest.raises(RunLockedError, match="join it with"), run_lock(out, rank=0, world=1):
            pass
    come[0].release()
    place = Folder(out, lease_s=LEASE)
    take = place.take

    def late(name):
        if name.endswith(".tar"):
            come.append(take_lock(out / ".claim-0-of-1"))
        return take(name)

    monkeypatch.setattr(place, "take", late)
    with pytest.raises(RunLockedError, match="is being labelled by"):
        work(tars, out, meeting=place)
    come[-1].release()
    assert not list((out / NOTES).glob("*.lease")) and not list(out.glob("*.tar"))


@pytest.fixture
def store():
    pytest.importorskip("obstore")
    from obstore.store import MemoryStore

    return MemoryStore()


def test_a_conditional_put_whose_answer_was_lost_is_ours(store, tmp_path, monkeypatch):
    place, other = (Objects("s3://x/y", tmp_path / name, lease_s=60.0, store=store) for name in "ab")
    plain, lost = objects._Store.replace, [1]

    def replace(self, name, data, before):
        found = plain(self, name, data, before)
        if lost.pop():
            raise objects._Taken
        return found

    monkeypatch.setattr(objects._Store, "replace", replace)
    claim = place.take("a-000.tar")
    assert claim is not None
    for answer in (1, 0):
        lost.append(answer)
        claim.check()
    lost.append(0)
    claim.release()
    monkeypatch.setattr(objects._Store, "replace", plain)
    taken = other.take("a-000.tar")
    with pytest.raises(LeaseLostError):
        claim.check()
    taken.release()


def test_a_tar_is_not_sent_once_its_part_is_lost(store, tmp_path):
    place = Objects("s3://x/y", tmp_path, store=store)
    (tmp_path / "a-000.tar").write_bytes(b"tar")
    (tmp_path / "a-000.json").write_bytes(b"{}")
    asked = []

    class Lost(Alone):
        def check(self):
            asked.append(place.has("a-000.json"))
            if asked[-1]:  # taken over while the json was on its way
                raise LeaseLostError("another worker has taken it over")

    with pytest.raises(LeaseLostError):
        place.deliver("a-000.tar", Lost())
    assert asked == [False, True] and not place.has("a-000.tar")


def test_a_bucket_that_is_not_there_is_told(store, tmp_path, monkeypatch):
    import obstore

    def put(*args, **kwargs):
        raise FileNotFoundError("Object at location labels/a not found: NoSuchBucket\n\nDebug source")

    monkeypatch.setattr(obstore, "put", put)
    with pytest.raises(OSError, match=r"s3://x/y cannot be reached: .*NoSuchBucket; files already sent are kept"):
        Objects("s3://x/y", tmp_path, store=store).take("a-000.tar")


def test_ages_at_an_object_store_are_by_its_clock(store, tmp_path, monkeypatch):
    class Fast(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(hours=1)

    monkeypatch.setattr(objects, "datetime", Fast)
    place = Objects("s3://x/y", tmp_path, lease_s=60.0, store=store)
    claim = place.take("a-000.tar")
    place.write_note("worker-a", CARD)
    (holder,) = place.holders()
    assert holder.age < 30 and not holder.dead and place.notes("worker-")["a"]["age_s"] < 30
    assert Fast.now(UTC) > datetime.now(UTC) + timedelta(minutes=59)
    claim.release()


def test_a_manifest_that_could_not_be_sent_does_not_stay_where_no_tars_are(store, tars, tmp_path, monkeypatch):
    place, plain = Objects("s3://x/y", tmp_path / "out", lease_s=LEASE, store=store), objects._Store.put

    def put(self, name, data):
        if name == "manifest.json":
            raise OSError(errno.ECONNRESET, "Connection reset by peer")
        plain(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(objects._Store, "put", put)
        with pytest.raises(OSError, match="Connection reset"):
            work(tars, tmp_path / "out", meeting=place)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert work(tars, tmp_path / "out", Formula(wait=99), meeting=place).last
    assert json.loads(bytes(store.get("manifest.json").bytes()))["samples"] == 18


def test_a_part_that_is_withdrawn_is_gone_from_the_store(store, tmp_path):
    place = Objects("s3://x/y", tmp_path / "out", lease_s=LEASE, store=store)
    for name in ("a-000.json", "a-000.tar", "b-000.tar"):
        store.put(name, b"x")
    place.withdraw("a-000.tar")
    assert [found["path"] for batch in store.list() for found in batch] == ["b-000.tar"]


def test_a_worker_that_is_stopped_leaves_no_lease(tars, tmp_path):
    """Its part would else wait until the lease ends: minutes, with a lease that suits a cluster."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        work(tars, out, Broken(error=KeyboardInterrupt()), lease_s=600.0)
    assert not [holder for holder in Folder(out, lease_s=600.0).holders() if holder.name.endswith(".tar")]
