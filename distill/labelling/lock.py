"""Who may write into a labels folder: one run at a time, each of its processes once.

Locks are the kernel's (flock), so a killed process holds nothing; the files only say who it was. On a file system
without locks nothing is held and nothing is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl


class RunLockedError(OSError):
    """Another run is labelling into the folder; the message names it."""


@contextlib.contextmanager
def run_lock(folder: Path, *, rank: int, world: int) -> Iterator[None]:
    """Hold `folder` as process `rank` of `world`.

    Raises RunLockedError where a live process has the same rank, or belongs to a run of another size.
    """
    lock_file = folder / f".claim-{rank}-of-{world}"
    file = _lock(lock_file, wait=False)
    if file is None:
        raise RunLockedError(_said(lock_file))
    try:
        for other in sorted(folder.glob(".claim-*-of-*")):
            if re.fullmatch(rf"\.claim-\d+-of-{world}", other.name):
                continue
            stale = _lock(other, wait=False)
            if stale is None:
                raise RunLockedError(_said(other))
            other.unlink(missing_ok=True)
            stale.close()
        with contextlib.suppress(OSError):  # a full disk may not keep the name; the lock holds all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
    finally:
        lock_file.unlink(missing_ok=True)
        file.close()


@contextlib.contextmanager
def mutex(folder: Path) -> Iterator[None]:
    """Let one process of the run through at a time; others wait."""
    path = folder / ".gate"
    file = _lock(path, wait=True)
    assert file is not None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _said(path: Path) -> str:
    try:
        who = path.read_text(errors="replace") or "a process that is starting"
    except OSError:
        who = "a process"
    return f"{path.parent} is being labelled by {who}: wait for it, stop it, or label into another folder"


def _lock(path: Path, *, wait: bool) -> IO[str] | None:
    """The open, locked file, or None where another process holds it."""
    while True:
        try:
            file = path.open("a+")
        except OSError as error:
            raise OSError(error.errno, f"cannot write in the labels folder {path.parent}: {error.strerror}") from error
        if sys.platform == "win32":
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                return file
            file.close()
            if isinstance(error, BlockingIOError):
                return None
            raise
        # Its last holder may have removed the file between our opening and our locking it.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()
