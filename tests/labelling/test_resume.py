"""Labelling gives the same bytes however often it is killed, and loses nothing that was finished."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from distill.core import files
from distill.data import sources
from distill.labelling.lock import RunLockedError, run_lock
from distill.shards import shards
from distill.shards.shards import LabelDataset, read_manifest, verify
from tests.data.pictures import encoded, picture
from tests.labelling.formula import CROPS, Broken, contents, make_tar, one_of_several, run


def test_any_number_of_processes_gives_the_same_bytes(tars, tmp_path):
    run(tars, tmp_path / "one")
    for world in (2, 3, 7):
        out = tmp_path / f"of{world}"
        done = [run(tars, out, rank=rank, world=world, threads=1 + rank).complete for rank in reversed(range(world))]
        assert done == [False] * (world - 1) + [True]
        assert contents(out) == contents(tmp_path / "one")


def test_killed_at_any_moment_and_resumed_gives_the_same_bytes(tars, tmp_path, processes):
    run(tars, tmp_path / "whole")
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"
    rng = random.Random(3)
    killed = 0
    for attempt in range(9):
        world = 1 + attempt % 3
        begun = [processes.Process(target=one_of_several, args=(tmp_path, out, r, world, 0.05)) for r in range(world)]
        for process in begun:
            process.start()
        time.sleep(rng.uniform(0.02, 0.25))
        for process in begun:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += process.exitcode == -signal.SIGKILL
        if out.is_dir():
            seen = {name: data for name, data in contents(out).items() if not name.startswith(".")}
            assert all(whole[name] == data for name, data in seen.items()), "what can be seen is complete"
    assert killed >= 3
    assert run(tars, out).complete
    assert contents(out) == whole


def test_two_live_processes_finish_with_one_manifest(tars, tmp_path, processes):
    run(tars, tmp_path / "whole")
    begun = [processes.Process(target=one_of_several, args=(tmp_path, tmp_path / "out", r, 2, 0.0)) for r in range(2)]
    for process in begun:
        process.start()
    for process in begun:
        process.join()
    assert [process.exitcode for process in begun] == [0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_folder_is_left_alone_and_a_lost_part_is_made_again(tars, tmp_path):
    run(tars, tmp_path / "out", recipe={"a": 1})
    before = contents(tmp_path / "out")
    outcome = run(tars, tmp_path / "out", Broken(), recipe={"a": 2})
    assert outcome.complete and (outcome.parts, outcome.skipped) == (0, 6)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "sa_0-001.tar").write_bytes(before["sa_0-001.tar"][:999])
    assert run(tars, tmp_path / "out", recipe={"a": 1}).parts == 1
    assert contents(tmp_path / "out") == before


def test_a_json_is_not_rebuilt_from_a_tar_that_has_changed(tars, tmp_path):
    """By a byte that nothing else would notice, of the padding between two members."""
    run(tars, tmp_path / "out")
    before = contents(tmp_path / "out")
    changed = bytearray(before["sa_0-001.tar"])
    with tarfile.open(tmp_path / "out/sa_0-001.tar") as tar:
        member = next(member for member in tar if member.size % 512)
    changed[member.offset_data + member.size] ^= 1
    for data, parts in ((before["sa_0-001.tar"], 0), (bytes(changed), 1)):
        (tmp_path / "out/sa_0-001.tar").write_bytes(data)
        (tmp_path / "out/sa_0-001.json").unlink()
        assert run(tars, tmp_path / "out").parts == parts
        assert contents(tmp_path / "out") == before


def test_a_described_tar_that_is_not_there_yet_is_not_finished(tars, tmp_path):
    out = tmp_path / "out"
    done = [run(tars, out, rank=rank, world=2).complete for rank in range(2)]
    (out / "manifest.json").unlink()
    (out / "sa_0-000.tar").unlink()  # as if its writer, process 0, were between its json and its name
    assert done == [False, True] and not run(tars, out, rank=1, world=2).complete
    assert not (out / "manifest.json").exists()


def test_two_runs_on_one_folder_are_refused_and_a_dead_one_is_not(tars, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with run_lock(out, rank=0, world=1):
        with pytest.raises(RunLockedError, match=f"is being labelled by process {os.getpid()} on"):
            run(tars, out)
        with pytest.raises(RunLockedError, match="wait for it, stop it"):
            run(tars, out, rank=1, world=2)
    with run_lock(out, rank=0, world=2):
        assert not run(tars, out, rank=1, world=2).complete
    (out / ".claim-0-of-1").write_text("process 99999 on a machine that lost power")
    (out / ".claim-5-of-8").write_text("")
    assert run(tars, out).complete
    assert not [name for name in contents(out) if name.startswith(".")]


def test_other_settings_or_images_are_refused(tars, tmp_path):
    run(tars, tmp_path / "out")
    with pytest.raises(ValueError, match="made with different settings: crops, seed"):
        run(tars, tmp_path / "out", seed=1, crops=replace(CROPS, size=14))
    make_tar(tmp_path / "sa_1.tar", count=2, first=7)
    with pytest.raises(ValueError, match=r"sa_1-000.tar was labelled from different images than .*\(2 then, 2 now\)"):
        run(tars, tmp_path / "out")


def test_other_pixels_under_the_same_names_are_not_mixed_in(tars, tmp_path):
    run(tars, tmp_path / "out")
    before = contents(tmp_path / "out")
    path = tmp_path / "sa_1.tar"
    os.utime(path, (1, 1))  # a copy of the same bytes
    assert run(tars, tmp_path / "out").parts == 0
    good = path.read_bytes()
    data = bytearray(good)
    with tarfile.open(path) as tar:
        member = next(member for member in tar if member.name.endswith(".jpg"))
    data[member.offset_data + member.size // 2] ^= 1
    path.write_bytes(data)
    (tmp_path / "out" / "sa_0-000.tar").unlink()
    with pytest.raises(ValueError, match=r"sa_1-000.tar was labelled from different files with the same names as in"):
        run(tars, tmp_path / "out")
    path.write_bytes(good)
    run(tars, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_tar_that_was_cut_and_is_whole_now_is_labelled_again(tars, tmp_path):
    whole = (tmp_path / "sa_1.tar").read_bytes()
    run(tars, tmp_path / "fresh")
    for left in (b"no tar at all", whole[:2500]):
        (tmp_path / "sa_1.tar").write_bytes(left)
        run(tars, tmp_path / "out")
        assert contents(tmp_path / "out") != contents(tmp_path / "fresh")
    (tmp_path / "sa_1.tar").write_bytes(whole)
    assert run(tars, tmp_path / "out").parts == 2  # of two images each; the other tar is left alone
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert verify(tmp_path / "out") == []


def test_a_tar_with_a_hole_that_is_mended_is_labelled_again(tars, tmp_path):
    path = tmp_path / "sa_0.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        at = tar.getmember("./sa_1.jpg").offset
    run(tars, tmp_path / "fresh")
    path.write_bytes(whole[:at] + bytes(1024) + whole[at + 1024 :])
    run(tars, tmp_path / "out")
    assert "sa_1" not in LabelDataset(tmp_path / "out").image_keys
    lines = [line["reason"] for line in read_manifest(tmp_path / "out")["quarantine"]]
    assert any(f"damaged at byte {at}" in line for line in lines)
    path.write_bytes(whole)
    assert run(tars, tmp_path / "out").parts == 4  # the images behind the hole are in later parts now
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_what_is_to_be_deleted_is_named_to_the_file(tars, tmp_path):
    out = tmp_path / "out"
    run(tars, out)
    (out / "sa_1-x-000.tar").write_bytes(b"of another tar, sa_1-x.tar")
    (tmp_path / "sa_1.tar").unlink()
    (tmp_path / "sa_1.tar").mkdir()
    with pytest.raises(ValueError, match=r"\(2 then, 0 now: .*sa_1.tar: a folder, not a file\)") as error:
        run(tars, out)
    pattern = re.search(r"delete (\S+) in this one", str(error.value))[1]
    assert sorted(path.name for path in out.glob(pattern)) == [
        f"sa_1-00{i}.{s}" for i in (0, 1) for s in ("json", "tar")
    ]


def test_one_tar_that_cannot_be_read_does_not_stop_the_others(tars, tmp_path):
    (tmp_path / "sa_1.tar").unlink()
    (tmp_path / "sa_1.tar").symlink_to(tmp_path / "absent.tar")
    outcome = run(sources.tars(str(tmp_path / "sa_*.tar")), tmp_path / "out")
    assert outcome.complete and outcome.samples == 12
    assert any("a link to nothing" in line["reason"] for line in read_manifest(tmp_path / "out")["quarantine"])


def test_a_full_disk_loses_nothing_finished(tars, tmp_path, monkeypatch):
    run(tars, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    plain, left = shards._Hashing.write, [len(whole["sa_0-000.tar"]) + 5000]

    def write(self, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards._Hashing, "write", write)
        with pytest.raises(OSError, match=r"cannot write .*sa_0-001.tar: No space left on device"):
            run(tars, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["sa_0-000.json", "sa_0-000.tar", "settings.json"]
    run(tars, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_a_part_that_cannot_be_finished_leaves_no_partial_tar_of_the_next(tars, tmp_path, monkeypatch):
    def finish(part):
        with part.writer:
            raise OSError("no more")

    monkeypatch.setattr("distill.labelling.run.OpenPart.finish", finish)
    with pytest.raises(OSError, match="no more"):
        run(tars, tmp_path / "out")
    assert not list((tmp_path / "out").rglob(f"*{files.PARTIAL}*"))


def test_a_tar_whose_tail_goes_bad_costs_its_tail_alone(tars, tmp_path):
    run(tars, tmp_path / "out")
    before = contents(tmp_path / "out")
    path = tmp_path / "sa_1.tar"
    whole = path.read_bytes()
    path.write_bytes(whole.rstrip(b"\0") + b"\0" * 512 + b"\xff" * 700)  # a download that went on with noise
    assert run(tars, tmp_path / "out").parts == 0 and contents(tmp_path / "out") == before
    run(tars, tmp_path / "again")
    again = contents(tmp_path / "again")
    assert {k: v for k, v in again.items() if k.endswith("tar")} == {
        k: v for k, v in before.items() if k.endswith("tar")
    }
    assert any("sa_1.tar" in line["origin"] for line in read_manifest(tmp_path / "again")["quarantine"])
    path.write_bytes(whole[: len(whole) // 2])  # and one that was cut: other images than before, and nothing is lost
    with pytest.raises(ValueError, match="labelled from different images than"):
        run(tars, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_folder_that_cannot_be_written_to_is_named_and_keeps_what_it_has(tars, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(tars[:1], out)
    before = contents(out)
    plain = os.open

    def refuse(path, flags, *args, **options):
        if out in Path(os.fsdecode(path)).parents and flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(path, flags, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(OSError, match="cannot write in the labels folder .*out: Permission denied"):
            run(tars, out)
    assert contents(out) == before
    assert run(tars, out).complete


def test_a_folder_that_cannot_be_made_is_named(tars, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot make the labels folder .*file"):
        run(tars, tmp_path / "file" / "out")


def test_photos_between_the_labelled_ones_go_into_a_folder_of_their_own(tmp_path):
    made = [(tmp_path / "trip" / f"{name}.jpg", seed) for seed, name in enumerate("bdf")]
    made.append((tmp_path / "more" / "c.jpg", 9))
    for path, seed in made:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture(30, 40, seed=seed)))
    out, photos, more = tmp_path / "out", *([tmp_path / name] for name in ("trip", "more"))
    run(sources.folders(photos), out)
    before = contents(out)
    (tmp_path / "trip" / "c.jpg").write_bytes(made[3][0].read_bytes())
    with pytest.raises(
        ValueError, match=r"added before or between .* further \[\[images\]\] table, and add --set labels"
    ):
        run(sources.folders(photos), out)
    (tmp_path / "trip" / "c.jpg").unlink()
    made[0][0].rename(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match=r"\(2 then, 2 now\): label into another folder"):
        run(sources.folders(photos), out)
    (tmp_path / "b.jpg").rename(made[0][0])
    assert run(sources.combine(sources.folders(photos), sources.folders(more)), out).parts == 1
    after = contents(out)
    assert {name: data for name, data in after.items() if name.startswith("trip")} == {
        name: data for name, data in before.items() if name.startswith("trip")
    }
