"""Writing aside, locks and checksums: what is there is whole, whoever is killed, and errors name the target."""

from __future__ import annotations

import codecs
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.core import files

HOLD = """
import os, pathlib, sys, time
from distill.core import files
lock = files.take_lock(pathlib.Path(sys.argv[1]))
lock.write("me")
if os.fork() == 0:
    time.sleep(6)
    os._exit(0)
print("held", flush=True)
time.sleep(20)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "below" / "a.json"
    files.write_json(path, {"b": 1, "a": [2]}, sort_keys=True)
    assert path.read_bytes() == b'{\n "a": [\n  2\n ],\n "b": 1\n}\n'
    with pytest.raises(RuntimeError), files.writing(path) as new:
        new.write_text("half")
        assert path.read_text().startswith("{")
        raise RuntimeError
    assert names(path.parent) == ["a.json"] and path.read_text().startswith("{")
    with files.writing(path):
        pass  # nothing written: nothing replaced
    assert path.read_text().startswith("{")
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(path, float("nan"))


def test_every_write_reaches_the_disk_with_its_folder(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path.name))
    files.write_text(tmp_path / "a", "b")
    assert synced == [".a.partial", tmp_path.name]
    synced.clear()
    with files.writing_folder(tmp_path / "f") as new:
        (new / "x").write_text("")
    assert synced == ["x", ".f.partial", tmp_path.name]
    synced.clear()
    with files.writing(tmp_path / "c", durable=False) as new:
        new.write_text("")
    assert synced == [] and (tmp_path / "c").is_file()
    files.write_json(tmp_path / "d", {}, suffix=".7")
    assert files.write_new(tmp_path / "e", b"")
    assert [name.rpartition(".")[0] or name for name in synced[2:]] == [".e.partial", tmp_path.name]
    assert synced[:2] == [".d.partial.7", tmp_path.name]


@pytest.mark.parametrize("at", ["open", "fsync", "replace"])
def test_a_disk_that_refuses_is_told_of_the_file_that_was_meant(tmp_path, monkeypatch, at):
    path = tmp_path / "recipe.toml"
    path.write_text("old")

    def refuse(first, *rest, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(first) if at == "open" else None)

    with monkeypatch.context() as patch:
        if at == "fsync":
            patch.setattr(files.os, "fsync", refuse)
        else:
            patch.setattr(Path, at, refuse)
        with pytest.raises(files.WriteError) as caught:
            files.write_text(path, "new")
    error = caught.value
    assert str(error).startswith(f"cannot write {path}: Read-only file system. What was finished is kept")
    assert (error.errno, error.filename, error.strerror) == (errno.EROFS, str(path), "Read-only file system")
    assert names(tmp_path) == ["recipe.toml"] and path.read_text() == "old"


def test_the_folder_above_and_the_file_within_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(files.WriteError, match=r"cannot write .*/file: (File exists|Not a directory)"):
        files.write_text(tmp_path / "file" / "x", "")
    with pytest.raises(files.WriteError) as caught, files.writing_folder(tmp_path / "step") as new:
        files.write_text(new / "student" / "card", "")
        raise files.write_error(new / "student", OSError(errno.ENOSPC, "full"))
    assert caught.value.filename == str(tmp_path / "step" / "student") and names(tmp_path) == ["file"]
    with pytest.raises(FileNotFoundError, match="elsewhere"), files.writing(tmp_path / "a"):
        (tmp_path / "elsewhere").read_text()  # somebody else's trouble
    with pytest.raises(OSError, match="^a sentence of its own$"), files.writing_folder(tmp_path / "a"):
        raise OSError("a sentence of its own")
    unnumbered = files.write_error(tmp_path / "a", OSError("12 requested and 8 written"))
    assert (unnumbered.errno, unnumbered.strerror) == (errno.EIO, "12 requested and 8 written")


def test_a_folder_takes_the_place_of_another_and_what_a_kill_left_goes(tmp_path):
    for left in (".s.tmp", ".s.new", ".s.partial"):
        (tmp_path / left).mkdir()
    (tmp_path / ".s.old").mkdir()
    (tmp_path / ".s.old" / "before").write_text("")
    files.clean(tmp_path / "s")
    assert names(tmp_path) == ["s"] and names(tmp_path / "s") == ["before"]  # there was no other
    with files.writing_folder(tmp_path / "s") as new:
        (new / "after").write_text("")
    assert names(tmp_path) == ["s"] and names(tmp_path / "s") == ["after"]
    (tmp_path / ".s.old").mkdir()  # of a kill after both renames
    with pytest.raises(RuntimeError), files.writing_folder(tmp_path / "s") as new:
        raise RuntimeError
    assert names(tmp_path) == ["s"] and names(tmp_path / "s") == ["after"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_folder_that_cannot_take_its_place_leaves_the_other_there(tmp_path, monkeypatch, error):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "old").touch()
    rename = Path.rename

    def second_fails(path, target):
        if path.name.endswith(files.PARTIAL):
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(type(error)), files.writing_folder(tmp_path / "s") as new:
        (new / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["s"] and (tmp_path / "s" / "old").is_file()


def test_the_name_that_was_meant():
    path = Path("a/b.mp4")
    left = [new.name for new in files.leftovers(path)]
    assert (
        files.final_name(left[0]) == files.final_name(".b.mp4.partial.mp4") == files.final_name(".new.b.mp4") == "b.mp4"
    )
    assert files.final_name("b.mp4") == "b.mp4" and files.final_name(".hidden") == ".hidden"


def test_a_lock_is_held_once_and_goes_with_its_process(tmp_path):
    path = tmp_path / ".lock"
    path.write_text("a process that was killed")
    lock = files.take_lock(path)
    assert lock is not None and files.take_lock(path) is None
    lock.write("me")
    assert path.read_text() == "me"
    lock.release()
    assert names(tmp_path) == []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    held = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, env=environment)
    try:
        assert held.stdout is not None and held.stdout.readline() == b"held\n"
        assert files.take_lock(path) is None and path.read_text() == "me"
    finally:
        held.send_signal(signal.SIGKILL)
        held.wait()
    # Its child lives on, as a data worker does for seconds, and holds nothing.
    deadline = time.monotonic() + 4
    while (lock := files.take_lock(path)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lock is not None
    lock.release()


def test_a_forked_child_leaves_its_parent_s_lock_and_a_full_disk_only_its_text(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    lock = files.take_lock(tmp_path / "l")
    monkeypatch.setattr(lock, "_file", SimpleNamespace(truncate=full))
    lock.write("me")
    monkeypatch.undo()
    files._close_inherited()  # as in the child
    lock.release()
    assert names(tmp_path) == ["l"]


def test_lines_are_appended_by_one_process_at_a_time(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    with pytest.raises(RuntimeError), files.only_writer(path):
        with files.only_writer(path.with_name("b.jsonl")):
            pass
        with pytest.raises(OSError, match="another process writes it") as caught, files.only_writer(path):
            pass
        assert caught.value.filename == str(path)
        raise RuntimeError
    assert names(path.parent) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch, number):
    def none(*_):
        raise OSError(number, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    first, second = files.take_lock(tmp_path / "l"), files.take_lock(tmp_path / "l")
    assert first is not None and second is not None and not files.is_locked(tmp_path / "l")
    first.release()
    second.release()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_text_as_people_save_it(encoding):
    assert files.decoded("a\u00e9".encode(encoding)) == "a\u00e9"
    assert files.decoded(codecs.BOM_UTF16_BE + "a\u00e9".encode("utf-16-be")) == "a\u00e9"


def test_a_lock_of_a_file_that_its_holder_has_just_removed_is_no_lock(tmp_path, monkeypatch):
    path, real, waited = tmp_path / "l", files.fcntl.flock, []

    def late(file, how):
        if not waited:
            path.unlink()  # between opening and locking it here
        waited.append(how)
        real(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    lock = files.take_lock(path, wait=True)
    assert lock is not None and path.exists() and files.take_lock(path) is None
    lock.release()
    alone, now = files.fcntl.LOCK_EX, files.fcntl.LOCK_NB
    asks = files.fcntl.LOCK_SH | now
    assert waited == [alone, alone, alone | now, asks], "who waits is not told at once"


def test_who_asks_for_a_lock_disturbs_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_ASKED_S", 0.01)
    path = tmp_path / "l"
    assert not files.is_locked(path) and names(tmp_path) == []
    lock = files.take_lock(path)
    assert files.is_locked(path)
    lock.release()
    path.touch()
    with path.open("rb") as asking:
        files.fcntl.flock(asking, files.fcntl.LOCK_SH)
        assert not files.is_locked(path) and files.take_lock(path) is None, "a process that was stopped while it asked"
    lock = files.take_lock(path)
    assert lock is not None
    lock.release()


def test_one_of_many_writes_a_new_file(tmp_path, monkeypatch):
    assert files.write_new(tmp_path / "a" / "b", b"one") and not files.write_new(tmp_path / "a" / "b", b"two")

    def none(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(files.os, "link", none)
    assert files.write_new(tmp_path / "a" / "c", b"one") and not files.write_new(tmp_path / "a" / "c", b"two")
    assert names(tmp_path / "a") == ["b", "c"]
    assert (tmp_path / "a" / "b").read_bytes() == (tmp_path / "a" / "c").read_bytes() == b"one"


def test_writers_of_a_new_file_do_not_write_into_each_other(tmp_path, monkeypatch):
    path, link = tmp_path / "a", os.link

    def slow(new, to):
        monkeypatch.setattr(files.os, "link", link)
        assert files.write_new(path, b"two")
        link(new, to)

    monkeypatch.setattr(files.os, "link", slow)
    assert not files.write_new(path, b"one")
    assert path.read_bytes() == b"two" and names(tmp_path) == ["a"]


def test_a_folder_that_goes_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    plain, gone = os.mkdir, []

    def made(path, *args):
        try:
            plain(path, *args)
        except FileExistsError:
            if not gone:
                gone.append(Path(path).rmdir())
            raise

    monkeypatch.setattr(files.os, "mkdir", made)
    (tmp_path / "a").mkdir()
    files.make_folder(tmp_path / "a")
    assert gone and (tmp_path / "a").is_dir()
    (tmp_path / "b").touch()
    (tmp_path / "c").symlink_to(tmp_path / "nowhere")
    for taken in ("b", "c"):
        with pytest.raises(FileExistsError):
            files.make_folder(tmp_path / taken)


def test_what_is_synced_is_closed(tmp_path, monkeypatch):
    closed, real = [], os.close
    monkeypatch.setattr(files.os, "close", lambda handle: (closed.append(handle), real(handle)))
    files.sync(tmp_path)
    assert len(closed) == 1


def test_a_disk_that_cannot_lock_is_no_other_holder(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"):
        files.take_lock(tmp_path / "l")
    with pytest.raises(OSError, match="Input/output"):
        files.is_locked(tmp_path / "l")


def test_a_folder_that_links_to_itself_is_listed_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    for name in ("c", "b", "a.b"):
        (tmp_path / name).write_text("")
    assert files.files_below(tmp_path) == [tmp_path / name for name in ("a/x", "a.b", "b", "c")]


@pytest.mark.parametrize("name", ["", ".", "./", "a\0b"])
def test_names_of_no_file(name, tmp_path):
    with pytest.raises(ValueError, match="since it is no file's name"):
        files.inside(tmp_path, name)


@pytest.mark.parametrize("name", ["C:\\x", "c:x", "a\\..\\b", "..", "/x", "\\x", "a/../b"])
def test_names_that_leave_their_folder_on_any_system(name, tmp_path):
    with pytest.raises(ValueError, match="is refused, since its path"):
        files.inside(tmp_path, name)
    assert files.inside(tmp_path, "a..b/c") == tmp_path / "a..b" / "c"


def test_a_written_file_that_another_process_removed_is_an_error(tmp_path, monkeypatch):
    plain = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: (plain(path, data), path.unlink()))
    with pytest.raises(files.WriteError, match=r"cannot write .*a: No such file"):
        files.write_bytes(tmp_path / "a", b"b")
    assert names(tmp_path) == []


def test_links_of_a_stranger_s_folder_are_not_written_through(tmp_path):
    """A downloaded folder may have a link under a name that is written aside, or locked, to a file of the user."""
    (tmp_path / "f").mkdir()
    for temporary in (".a.partial", ".a.partial.x"):
        mine = tmp_path / "mine"
        mine.write_text("precious")
        (tmp_path / "f" / temporary).symlink_to(mine)
        files.write_text(tmp_path / "f" / "a", "theirs", suffix=temporary.removeprefix(".a.partial"))
        assert mine.read_text() == "precious" and (tmp_path / "f" / "a").read_text() == "theirs"
        assert names(tmp_path / "f") == ["a"] and not (tmp_path / "f" / "a").is_symlink()
    (tmp_path / "f" / ".lock").symlink_to(mine)
    with pytest.raises(OSError, match=r"\.lock") as told:
        files.take_lock(tmp_path / "f" / ".lock")
    assert told.value.errno == errno.ELOOP and mine.read_text() == "precious"
