"""Atomic writes of files and folders, lock files, checksums.

Everything is written next to its destination under a name that starts with a dot, synced to the disk and renamed, and
the parent folder is synced too, so that neither a kill nor a power cut leaves half a file under a name that is read. A
killed writer leaves `.NAME.partial`, and a folder that was being replaced `.NAME.old`; the next writer of that NAME
removes them. A failed write raises a WriteError that names the destination, not the temporary file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from distill.core.links import unlink_link

PARTIAL, OLD = ".partial", ".old"
# Prefixes and suffixes of the temporary names that killed writers of earlier versions may have left.
_EARLIER = ((".", ".tmp"), (".", ".part"), (".", ".new"), (".new.", ""))


def decoded(data: bytes) -> str:
    """Decode text as people save it: UTF-8 with or without a byte order mark, or the UTF-16 of Excel and PowerShell.

    Raises UnicodeDecodeError, a ValueError, for any other encoding.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    zero = data[:2].find(0)  # UTF-16 without a byte order mark
    return data.decode("utf-8-sig" if zero < 0 else "utf-16-le" if zero else "utf-16-be")


def files_below(folder: Path, *, complete: bool = False) -> list[Path]:
    """Return every file below a folder, sorted, including links to files, dangling links and pipes.

    Links to folders are followed, each folder once, so that cycles end; hidden files and folders are included.
    complete: OSError for a folder that cannot be listed; otherwise it is passed over.
    """

    def fail(error: OSError) -> None:
        if Path(error.filename).name != "lost+found":  # the root of a disk has one, which only its owner may list
            raise OSError(
                f"{error.filename}: this folder cannot be listed ({error.strerror}): allow it or move it away"
            )

    paths: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for parent, subfolders, names in os.walk(folder, onerror=fail if complete else None, followlinks=True):
        status = os.stat(parent)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders.sort()
        paths += [Path(parent, name) for name in names]
    return sorted(paths)


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""The errnos of a full disk, or of a used up quota: nothing more can be written."""


class WriteError(OSError):
    """A file or folder that cannot be written; `filename` is the target, `strerror` the reason."""

    def __str__(self) -> str:
        return (
            f"cannot write {self.filename}: {self.strerror}. What was finished is kept; fix this and rerun the same "
            "command"
        )


def write_error(path: Path, error: OSError) -> OSError:
    """Return `error` as a WriteError of `path`, or of the file in it or folder above it that `error` names.

    An error of any other file is returned unchanged.
    """
    if error.filename is None:
        # Errors that numpy and tarfile raise themselves have no errno either.
        return WriteError(error.errno or errno.EIO, error.strerror or str(error), str(path))
    error_path = Path(os.fsdecode(error.filename))
    partial = temporary_name(path).name
    new = next((parent for parent in (error_path, *error_path.parents) if parent.name.startswith(partial)), None)
    if new is not None:
        error_path = path / error_path.relative_to(new)
    elif error_path not in (path, *path.parents):
        return error
    return WriteError(error.errno, error.strerror, str(error_path))


@contextlib.contextmanager
def raising_write_errors(path: Path) -> Iterator[None]:
    """Convert every OSError of the block to a WriteError of `path`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


# --- names that came from data ----------------------------------------------------------------------------------------


def leaves_root(name: str, root: str = "its folder") -> str:
    """Return why a name that came from data must not be joined to a folder (absolute, climbing out, no name), or "".

    The name is read as both POSIX and Windows would: backslashes separate, a drive letter is absolute.
    """
    if ".." in re.split(r"[/\\]", name):
        return f"its path climbs out of {root}"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "its path is absolute"
    return "it is no file's name" if not name.strip("./") or "\0" in name else ""


def inside(root: Path | str, name: str) -> Path:
    """Return `root`/`name` for a name that came from data; raises ValueError if that would lie outside `root`."""
    if reason := leaves_root(name):
        raise ValueError(f"{root}: the name {name!r} is refused, since {reason}")
    return Path(root) / name


# --- files ------------------------------------------------------------------------------------------------------------


def temporary_name(path: Path) -> Path:
    """Return the temporary name that `path` has while it is written."""
    return path.with_name(f".{path.name}{PARTIAL}")


def final_name(name: str) -> str:
    """Return the final name of a file called `name`: its own, unless that is a writer's temporary name."""
    match = re.fullmatch(rf"\.(.+){re.escape(PARTIAL)}(\.\w+)?|\.new\.(.+)", name)
    return name if match is None else match[1] or match[3]


def leftovers(path: Path) -> tuple[Path, ...]:
    """Return every temporary name that a killed writer of `path`, of any version, may have left."""
    return (temporary_name(path), *(path.with_name(f"{before}{path.name}{after}") for before, after in _EARLIER))


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def start_writeback(file: IO[bytes], start: int, end: int) -> None:
    """Make the system write these bytes of an open file to the disk now, without waiting for it.

    Otherwise it starts after half a minute or with gigabytes, and the sync of a finished file has to wait for all.
    """
    file.flush()
    if hasattr(os, "posix_fadvise"):  # not on macOS. Pages that are not on the disk yet stay in memory
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def publish(new: Path, path: Path) -> None:
    """Rename the finished file `new` to `path`, replacing any file there, and sync both to the disk."""
    sync(new)
    new.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def writing(path: Path, *, suffix: str = "", durable: bool = True, always: bool = False) -> Iterator[Path]:
    """Yield a temporary name to write to, which is renamed to `path` if the block succeeds and removed otherwise.

    Creates the folder. suffix: for a library that recognises a format by the end of the name, and for several writers
    of the same file, which must not share a temporary file. durable: False for one of many files that the caller
    syncs to the disk together (`sync_tree`). A block that wrote nothing leaves `path` unchanged. always: the block does
    write, so that a temporary file that is missing then was removed by another process. Raises WriteError.
    """
    new = temporary_name(path).with_name(temporary_name(path).name + suffix)
    try:
        with raising_write_errors(path):
            make_folder(path.parent)
            unlink_link(new)
            yield new
            if always or new.is_file():
                if durable:
                    publish(new, path)
                else:
                    new.replace(path)
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a folder and those above it, also where another process removes it meanwhile. Raises OSError."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            return
        except FileExistsError:  # Path.mkdir's also for a folder that is gone when it looks what is there
            if os.path.lexists(path) and not path.is_dir():
                raise


def write_bytes(path: Path, data: bytes, *, suffix: str = "") -> None:
    """Write a file atomically: `path` is the old file or the new one. suffix: as in `writing`. Raises WriteError."""
    with writing(path, suffix=suffix, always=True) as new:
        new.write_bytes(data)


def write_new(path: Path, data: bytes) -> bool:
    """As `write_bytes`, but never replace a file; returns whether it was written, False for all but one of many.

    On a file system without hard links a file that another process writes at this moment may be replaced.
    """
    # A name that no other process writes: the file that is linked would change with it.
    with writing(path, suffix=f".{secrets.token_hex(6)}") as new:
        new.write_bytes(data)
        sync(new)
        written = True
        try:
            os.link(new, path)
        except OSError as error:
            written = not (isinstance(error, FileExistsError) or path.exists())
            if written:
                new.replace(path)
        new.unlink(missing_ok=True)
        sync(path.parent)
    return written


def write_text(path: Path, text: str, *, suffix: str = "") -> None:
    """As `write_bytes`, in UTF-8; line endings are kept."""
    write_bytes(path, text.encode(), suffix=suffix)


def write_json(
    path: Path,
    table: Any,
    *,
    indent: int | None = 1,
    sort_keys: bool = False,
    allow_nan: bool = False,
    suffix: str = "",
) -> None:
    """As `write_text`, with a newline at the end; ValueError for NaN and infinity unless allow_nan."""
    text = json.dumps(table, indent=indent, sort_keys=sort_keys, allow_nan=allow_nan)
    write_text(path, text + "\n", suffix=suffix)


# --- folders ----------------------------------------------------------------------------------------------------------


def backup_name(path: Path) -> Path:
    """Return the temporary name of a folder that is being replaced."""
    return path.with_name(f".{path.name}{OLD}")


def clean(path: Path) -> None:
    """Remove what killed writers of the folder `path` left; restore the previous folder if `path` is missing.

    Replacing a folder takes two renames, and a kill between them leaves the old folder only under its temporary name.
    """
    old = backup_name(path)
    if old.is_dir() and not path.exists():
        old.rename(path)
    for leftover in (old, *leftovers(path)):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which replaces `path` if the block succeeds and is removed otherwise.

    Leftovers of killed writers of `path` are removed first (`clean`). Raises WriteError.
    """
    new = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clean(path)
        new.mkdir()
        yield new
        sync_tree(new)
        if path.exists():
            path.rename(backup_name(path))
        new.rename(path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            clean(path)  # between its two renames `path` would be missing
        if isinstance(error, OSError) and error.errno is not None:  # otherwise it is the block's own message
            raise write_error(path, error) from error
        raise
    shutil.rmtree(backup_name(path), ignore_errors=True)


# --- locks ------------------------------------------------------------------------------------------------------------

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_ASKED_S = 1.0  # a process that asks longer was stopped meanwhile, and its lock is like a holder's
_lock_files: set[IO[str]] = set()


def _close_inherited() -> None:
    """Close the locks in a forked child (a data worker), which would otherwise hold them after its parent's death."""
    for file in _lock_files:
        file.close()
    _lock_files.clear()


os.register_at_fork(after_in_child=_close_inherited)


class Lock:
    """A lock file that this process holds until `release`, which removes it; a killed process holds no lock.

    Uses the kernel's flock on a file of its own. Not the package filelock: it leaves its files behind, lets a fork of
    the holder keep the lock (before version 4), and raises on a file system without locks, where this class locks
    nothing and raises nothing.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self._file = path, file
        _lock_files.add(file)

    def write(self, text: str) -> None:
        """Write text to the lock file for others to read; a full disk may lose it, but the lock still holds."""
        with contextlib.suppress(OSError):
            self._file.truncate(0)
            self._file.write(text)
            self._file.flush()

    def release(self) -> None:
        """Remove the file and release the lock; does nothing in a forked child."""
        if self._file in _lock_files:
            _lock_files.discard(self._file)
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._file.close()


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of the file `path`; processes that ask at once do not disturb each other.

    False where the file system has no locks. Raises OSError.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        if isinstance(error, BlockingIOError):
            return True
        if error.errno not in _NO_LOCKS:
            raise
    return False


def take_lock(path: Path, *, wait: bool = False) -> Lock | None:
    """Return the lock of a file, not a link, or None if it is taken; wait: block until it is free. Raises OSError."""
    since = time.monotonic()
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        file = os.fdopen(handle, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return Lock(path, file)
            file.close()
            if isinstance(error, BlockingIOError):
                if is_locked(path) or time.monotonic() - since > _ASKED_S:
                    return None
                time.sleep(0.001)  # released meanwhile, or a process only asked whether it is held
                continue
            raise
        # The previous holder may have removed the file between opening and locking it here.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return Lock(path, file)
        file.close()


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the lock of a file to which lines are appended, and create its folder; OSError if another process has it."""
    make_folder(path.parent)
    lock = take_lock(path.with_name(f".{path.name}.lock"))
    if lock is None:
        raise OSError(errno.EBUSY, "another process writes it: wait for it, or stop it", str(path))
    try:
        yield
    finally:
        lock.release()


# --- checksums --------------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, 64 hexadecimal digits; read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
