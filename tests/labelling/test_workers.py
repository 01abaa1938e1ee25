"""Any number of workers, which come, go, die and fall asleep, make one worker's bytes."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from distill.core import files
from distill.data.sources import folders
from distill.labelling import leases
from distill.labelling.board import changed_since
from distill.labelling.leases import NOTES, FolderLeases, LeaseLostError
from distill.labelling.lock import RunLockedError, run_lock
from distill.labelling.meeting import Folder
from distill.labelling.objects import Objects
from distill.labelling.parts import parts_of
from distill.labelling.pools import thread_pools
from distill.labelling.run import LabelSettings, OpenPart, PartSettings, Tally, label_part
from distill.labelling.run_status import run_status
from distill.shards.shards import ShardWriter, verify
from tests.labelling.formula import CROPS, LEASE, Formula, contents, run, work


def png(shade):
    """A photo of noise, of another size in bytes for another shade."""
    pixels = np.random.default_rng(shade).integers(0, shade + 1, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    return file.getvalue()


def no_flock(file, operation):
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_workers_that_join_at_any_time_make_one_runs_bytes_on_a_disk_without_locks(tars, tmp_path, monkeypatch):
    run(tars, tmp_path / "one", samples_per_part=2)
    monkeypatch.setattr(fcntl, "flock", no_flock)
    with ThreadPoolExecutor(3) as pool:
        teachers = [Formula(wait=0.01) for _ in range(3)]
        begun = [pool.submit(work, tars, tmp_path / "out", t, samples_per_part=2, lease_s=30.0) for t in teachers]
        outcomes = [one.result() for one in begun]
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert sum(one.last and one.complete for one in outcomes) == 1
    assert sum(one.parts for one in outcomes) == 10, "nothing twice"
    late = work(tars, tmp_path / "out", Formula(wait=99), samples_per_part=2)
    assert late.complete and late.parts == 0 and contents(tmp_path / "out") == contents(tmp_path / "one")


def test_what_a_dead_worker_had_is_taken_over_and_its_leftovers_go(tars, tmp_path):
    run(tars, tmp_path / "one")
    out = tmp_path / "out"
    out.mkdir()
    dead = FolderLeases(out / NOTES, seconds=LEASE).take("sa_0-000.tar")
    dead.lease._stop_heartbeat()  # as a machine without power
    (out / ".sa_0-000.tar.partial.0123").write_bytes(b"half")
    (out / NOTES / "sa_1-000.tar.lease").touch()  # killed between making its marker and writing it
    before = time.monotonic()
    assert work(tars, out).complete
    assert time.monotonic() - before >= LEASE
    assert contents(out) == contents(tmp_path / "one")


def test_a_worker_whose_lease_was_stolen_stops_writing(tars, tmp_path):
    out, stolen = tmp_path / "out", []

    class Slow(Formula):
        def predict(self, images):
            if not stolen:
                (marker,) = (out / NOTES).glob("*.tar.lease")
                marker.unlink()
                stolen.append(FolderLeases(out / NOTES, seconds=LEASE).take(marker.name.removesuffix(".lease")))
            elif len(self.sizes) == 2:  # the other one has finished with it
                stolen[0].release()
            return super().predict(images)

    run(tars, tmp_path / "one")
    checked = []
    plain = leases._Held.check

    def check(self):
        try:
            plain(self)
        except LeaseLostError:
            checked.append(self.lease.lock_file)
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases._Held, "check", check)
        assert work(tars, out, Slow()).complete
    assert len(checked) == 1 and contents(out) == contents(tmp_path / "one")


def test_a_lease_that_another_has_is_known_as_lost_before_the_next_heartbeat(tmp_path):
    slow, other = (FolderLeases(tmp_path, seconds=600.0) for _ in range(2))
    claim = slow.take("a-000.tar")
    claim.check()
    (tmp_path / "a-000.tar.lease").unlink()
    theirs = other.take("a-000.tar")
    with pytest.raises(LeaseLostError, match="another worker has taken it over"):
        claim.check()
    theirs.check()
    theirs.release()


def test_a_part_is_taken_once_by_the_same_worker_too(tmp_path):
    ours = FolderLeases(tmp_path, seconds=600.0)
    claim = ours.take("a-000.tar")
    assert claim is not None and ours.take("a-000.tar") is None
    claim.release()
    again = ours.take("a-000.tar")
    again.release()


def test_an_empty_marker_is_left_alone_for_the_time_of_a_lease(tmp_path, monkeypatch):
    """Its worker may be about to write it."""
    now, marker = [0.0], tmp_path / "a-000.tar.lease"
    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    ours = FolderLeases(tmp_path, seconds=10.0)
    marker.touch()
    for now[0], made_again in ((0.0, False), (9.0, True), (12.0, False), (18.9, False), (19.0, False)):
        if made_again:
            os.utime(marker, (1, 1))
        assert ours.take("a-000.tar") is None and marker.exists() is (now[0] < 19)
    ours.take("a-000.tar").release()


def test_a_holder_is_dead_once_it_is_silent_and_gone_or_silent_for_the_time_of_a_lease(tmp_path, monkeypatch):
    """A process number alone says little: a container has its own."""
    claim, marker = FolderLeases(tmp_path, seconds=100.0).take("a-000.tar"), tmp_path / "a-000.tar.lease"
    claim.lease._stop_heartbeat()
    found = []
    for running in (True, False):
        monkeypatch.setattr(leases, "_is_running", lambda pid, running=running: running)
        for age in (0, 40, 60, 90, 110):
            now = time.time()
            os.utime(marker, (now - age, now - age))
            (holder,) = FolderLeases(tmp_path, seconds=100.0).holders()
            assert holder.name == "a-000.tar" and holder.pid == os.getpid() and abs(holder.age - age) < 5
            found.append(holder.dead)
    assert found == [False, False, False, False, True, False, False, True, True, True]


@pytest.mark.parametrize(("error", "running"), [(None, True), (ProcessLookupError(), False), (PermissionError(), True)])
def test_a_process_of_another_user_runs(monkeypatch, error, running):
    def kill(pid, number):
        assert (pid, number) == (7, 0)
        if error:
            raise error

    monkeypatch.setattr(leases.os, "kill", kill)
    assert leases._is_running(7) is running


def test_a_run_does_not_wait_for_dead_workers(tmp_path):
    claim = FolderLeases(tmp_path / NOTES).take("a-000.tar")
    claim.lease._stop_heartbeat()
    with pytest.raises(RunLockedError, match="join it"), run_lock(tmp_path, rank=0, world=1):
        pass
    os.utime(tmp_path / NOTES / "a-000.tar.lease", (1, 1))
    with run_lock(tmp_path, rank=0, world=1):
        pass


def test_a_part_that_is_no_longer_ours_is_neither_described_nor_named(tars, tmp_path):
    class Lost:
        suffix, lost = ".lost", False

        def check(self):
            raise LeaseLostError("another worker has it")

    out = tmp_path / "out"
    out.mkdir()
    part = parts_of(tars[1], 2)[0]
    writer = ShardWriter(out / part.name, suffix=".lost")
    writer.add("k", [("k.json", b"{}")])
    with pytest.raises(LeaseLostError):
        OpenPart(out, part, writer, [], Lost()).finish()
    assert not list(out.iterdir())
    # Nor is it labelled to its end: what is known to be lost is asked for after each region.
    Lost.lost, teacher = True, Formula()
    settings = LabelSettings(samples_per_part=4, batch_size=1)
    with thread_pools(1, torch.device("cpu")) as pools, pytest.raises(LeaseLostError):
        work_ = PartSettings(
            [("formula", teacher)], CROPS, settings, 0, torch.device("cpu"), (), pools.stopping, Lost()
        )
        label_part(out, part, work_, Tally(2, 0, None), pools)
    assert not list(out.iterdir())


def test_a_slow_holder_cannot_rename_what_was_taken_over(tmp_path):
    place = Folder(tmp_path, lease_s=LEASE)
    slow = ShardWriter(tmp_path / "a-000.tar", suffix=".slow")
    slow.add("k", [("k.json", b"{}")])
    claim = place.take("a-000.tar")
    place.begin("a-000.tar", claim)
    slow.close()
    with slow, pytest.raises(files.WriteError, match=r"cannot write .*a-000.tar"):
        slow.publish()


def test_a_rename_that_was_lost_is_made_good(tars, tmp_path, monkeypatch):
    run(tars, tmp_path / "one")
    plain, lost = files.publish, set()

    def publish(new, path):
        if path.name in ("sa_0-001.tar", "sa_1-000.json") and path.name not in lost:
            lost.add(path.name)
            if path.name == "sa_0-001.tar":
                return  # said to be done
            plain(new, path)
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(new))  # done, said not to be
        plain(new, path)

    monkeypatch.setattr(files, "publish", publish)
    assert work(tars, tmp_path / "out").complete
    assert len(lost) == 2 and contents(tmp_path / "out") == contents(tmp_path / "one")
    assert verify(tmp_path / "out") == []


def test_a_tar_that_has_grown_is_labelled_again_and_other_images_are_refused(tars, tmp_path):
    whole = (tmp_path / "sa_1.tar").read_bytes()
    run(tars, tmp_path / "one")
    (tmp_path / "sa_1.tar").write_bytes(whole[:2500])
    work(tars, tmp_path / "out")
    (tmp_path / "sa_1.tar").write_bytes(whole)
    (tmp_path / "out" / "manifest.json").unlink()
    assert work(tars, tmp_path / "out").parts == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "sa_1.tar").write_bytes((tmp_path / "sa_0.tar").read_bytes())
    with pytest.raises(ValueError, match="labelled from different images than"):
        work(tars, tmp_path / "out")
    with pytest.raises(ValueError, match="made with different settings: samples_per_part"):
        work(tars, tmp_path / "out", samples_per_part=2)


def test_workers_label_what_a_finished_folder_lacks_and_its_status_says_that_images_changed(tars, tmp_path):
    whole, out = (tmp_path / "sa_1.tar").read_bytes(), tmp_path / "out"
    run(tars, tmp_path / "one")
    (tmp_path / "sa_1.tar").write_bytes(whole[:2500])
    work(tars, out)
    place = Folder(out)
    assert changed_since(place, tars) == [] and work(tars, out, Formula(wait=99)).parts == 0
    (tmp_path / "sa_1.tar").write_bytes(whole)
    assert changed_since(place, tars) == tars[1:]
    assert work(tars, out).parts == 2 and contents(out) == contents(tmp_path / "one")
    assert changed_since(place, tars) == []
    (tmp_path / "sa_1.tar").write_bytes((tmp_path / "sa_0.tar").read_bytes())
    with pytest.raises(ValueError, match="labelled from different images than"):
        work(tars, out)


def test_a_copied_or_touched_folder_of_photos_is_compared_and_nothing_labelled_again(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in "abc":
        (tmp_path / "photos" / f"{name}.png").write_bytes(png(ord(name)))
    out = tmp_path / "out"
    work(folders(tmp_path / "photos"), out)
    made = contents(out)
    (tmp_path / "disk").mkdir()
    shutil.copytree(tmp_path / "photos", tmp_path / "disk" / "photos", copy_function=shutil.copyfile)
    for path in (tmp_path / "photos").iterdir():
        os.utime(path, (0, 0))
    for photos in (tmp_path / "photos", tmp_path / "disk" / "photos"):
        assert changed_since(Folder(out), folders(photos))
        outcome = work(folders(photos), out, Formula(wait=99))
        assert (outcome.complete, outcome.parts) == (True, 0) and contents(out) == made
        assert not changed_since(Folder(out), folders(photos))


@pytest.mark.parametrize("same_size", [True, False])
def test_a_photo_replaced_under_its_own_name_in_a_folder_is_not_passed(tmp_path, same_size):
    for name in "abc":
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{name}.png").write_bytes(png(ord(name)))
    out = tmp_path / "out"
    work(folders(tmp_path / "photos"), out)
    assert work(folders(tmp_path / "photos"), out, Formula(wait=99)).parts == 0
    path = tmp_path / "photos" / "b.png"
    os.utime(path)  # another time alone is none: a copy has one, too
    assert changed_since(Folder(out), folders(tmp_path / "photos"))
    assert work(folders(tmp_path / "photos"), out, Formula(wait=99)).parts == 0
    assert changed_since(Folder(out), folders(tmp_path / "photos")) == []
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data) if same_size else png(7))
    with pytest.raises(ValueError, match="labelled from different files with the same names"):
        work(folders(tmp_path / "photos"), out)


def test_a_worker_of_a_finished_folder_without_notes_scans_it_once(tars, tmp_path):
    run(tars, tmp_path)
    place = Folder(tmp_path)
    assert changed_since(place, tars) == tars
    assert work(tars, tmp_path).parts == 0 and changed_since(place, tars) == []


def test_images_that_are_away_do_not_make_a_finished_run_one_of_no_parts(tars, tmp_path):
    work(tars, tmp_path / "out")
    now = run_status(Folder(tmp_path / "out"), tmp_path / "out", [])
    assert (now.complete, now.done, now.parts, now.done_images, now.images) == (True, 6, 6, 10, 10)


def test_a_worker_reports_its_own_images_of_about_all(tars, tmp_path):
    said = []
    work(tars, tmp_path / "out", report=lambda done, total, **numbers: said.append((done, total, "eta_s" in numbers)))
    assert {total for _, total, _ in said[-3:]} == {10} and said[-1] == (10, 10, False)


def test_workers_and_a_run_that_wants_the_folder_for_itself_keep_apart(tars, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with run_lock(out, rank=0, world=1), pytest.raises(RunLockedError, match="is being labelled by process"):
        work(tars, out)
    claim = FolderLeases(out / NOTES).take("sa_0-000.tar")
    with pytest.raises(RunLockedError, match="join it with distill label"):
        run(tars, out)
    claim.release()
    assert run(tars, out).complete and not (out / NOTES).exists()


def test_a_full_disk_ends_a_worker_and_leaves_no_lease(tars, tmp_path, monkeypatch):
    run(tars, tmp_path / "one")
    plain = files.publish

    def publish(new, path):
        if path.name == "sa_0-002.tar":
            raise OSError(errno.ENOSPC, "No space left on device", str(new))
        plain(new, path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", publish)
        with pytest.raises(OSError, match=r"sa_0-002.tar: No space left on device"):
            work(tars, tmp_path / "out")
    assert not list((tmp_path / "out" / NOTES).glob("*.lease"))
    assert not list((tmp_path / "out").glob("*.partial*"))
    assert work(tars, tmp_path / "out").complete and contents(tmp_path / "out") == contents(tmp_path / "one")


def test_a_finer_tail_is_the_same_for_one_and_for_many(tars, tmp_path):
    run(tars, tmp_path / "one", fine_tail=2)
    work(tars, tmp_path / "out", fine_tail=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    of = [json.loads((tmp_path / "one" / f"{stem}-000.json").read_bytes())["of"] for stem in ("sa_0", "sa_1")]
    assert of == [4, 3]  # 7 images by twos, 3 by ones
    with pytest.raises(ValueError, match="made with different settings: fine_tail"):
        run(tars, tmp_path / "one")


def test_workers_meet_at_an_object_store(tars, tmp_path):
    pytest.importorskip("obstore")
    from obstore.store import MemoryStore

    run(tars, tmp_path / "one")
    store, folders = MemoryStore(), [tmp_path / "a", tmp_path / "b"]
    # Long: on a busy machine a live worker may be silent for seconds, and its part would be made twice.
    places = [Objects("s3://x/labels", folder, lease_s=60.0, store=store) for folder in folders]
    dead = places[0].take("sa_0-000.tar")
    dead.stop.set()  # its thread refreshes it no more
    for place in places:
        place._seen["sa_0-000.tar"] = (str(dead.version["e_tag"]), -1e9)  # for long
    with ThreadPoolExecutor(2) as pool:
        begun = [pool.submit(work, tars, p.out, Formula(wait=0.01), meeting=p) for p in places]
        outcomes = [one.result() for one in begun]
    assert sum(one.parts for one in outcomes) == 6 and any(one.complete for one in outcomes)
    with pytest.raises(LeaseLostError):
        dead.check()

    def stored():
        found = {one["path"]: bytes(store.get(one["path"]).bytes()) for one in store.list().collect()}
        assert {w["parts"] for w in json.loads(found.pop(".workers/spent.json"))["workers"].values()} <= {*range(7)}
        return found

    assert (there := stored()) == contents(tmp_path / "one")
    assert not [*tmp_path.glob("[ab]/*.tar"), *tmp_path.glob("[ab]/.*"), *tmp_path.glob("[ab]/manifest.json")]
    assert work(tars, folders[0], meeting=places[0]).parts == 0
    store.delete("sa_0-001.tar")
    assert work(tars, folders[1], meeting=places[1]).parts == 1
    assert stored() == there


def test_the_standing_of_a_run_is_read_without_stopping_it(tars, tmp_path):
    out, seen = tmp_path / "out", []
    place = Folder(out, lease_s=60.0)  # long: a live worker may be silent for seconds on a busy machine

    class Watched(Formula):
        def predict(self, images):
            if not seen and len(list(out.glob("*.tar"))) >= 2:
                seen.append(run_status(Folder(out, lease_s=60.0), out, ["sa_0", "sa_1"]))
                before.unlink()  # or it would be waited for
            return super().predict(images)

    dead = place.take("sa_1-001.tar")
    dead.lease._stop_heartbeat()
    before = out / NOTES / "sa_1-001.tar.lease"
    os.utime(before, (1, 1))
    work(tars, out, Watched(), meeting=place)
    (now,) = seen
    assert not now.complete and now.parts >= 4 and now.done >= 1 and now.done_images >= 1
    assert [holder.name for holder in now.lost] == ["sa_1-001.tar"] and len(now.running) >= 1
    (worker_,) = now.workers
    assert worker_.state == "running" and worker_.images_per_s > 0 and now.eta_s > 0
    after = run_status(Folder(out), out, ["sa_0", "sa_1"])
    assert after.complete and after.done == after.parts == 6
