"""Locks of a labels folder: one run at a time may write, with one process per rank.

A killed process holds no lock (core.files); the files only name their last holder.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from distill.core.files import Lock, is_locked, take_lock
from distill.labelling.leases import LEASE_S, NOTES, FolderLeases


class RunLockedError(OSError):
    """Another run is labelling into the folder; the message names it."""


@contextlib.contextmanager
def run_lock(folder: Path, *, rank: int, world: int) -> Iterator[None]:
    """Hold `folder` as process `rank` of `world`.

    Raises RunLockedError where a live process has the same rank, or belongs to a run of another size, or where workers
    hold leases.
    """
    _refuse_workers(folder)  # before our lock is there, which would end a worker at its next part
    lock_file = folder / f".claim-{rank}-of-{world}"
    lock = _take(lock_file, wait=False)
    if lock is None:
        raise RunLockedError(_holder_message(lock_file))
    try:
        with mutex(folder):  # or ranks that begin at once would take each other's look at a claim for its holder
            for other in sorted(folder.glob(".claim-*-of-*")):
                if re.fullmatch(rf"\.claim-\d+-of-{world}", other.name):
                    continue
                stale = _take(other, wait=False)
                if stale is None:
                    raise RunLockedError(_holder_message(other))
                stale.release()
        # Our lock is visible by now: a new worker looks for it once it has a lease.
        _refuse_workers(folder)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()


def _refuse_workers(folder: Path) -> None:
    workers = [holder for holder in FolderLeases(folder / NOTES).holders() if not holder.dead]
    if workers:
        raise RunLockedError(
            f"{folder} is being labelled by worker {workers[0].pid} on {workers[0].host}: join it with distill "
            f"label RECIPE --worker; if it is dead, its lease expires {LEASE_S:.0f} s after its last heartbeat"
        )


def refuse_run(folder: Path) -> None:
    """Raises RunLockedError where a live run that is not a worker holds `folder`, as far as this machine can tell."""
    for other in sorted(folder.glob(".claim-*-of-*")):
        if is_locked(other):
            raise RunLockedError(_holder_message(other))


@contextlib.contextmanager
def mutex(folder: Path) -> Iterator[None]:
    """Hold a mutex of the folder: one process of the run at a time, the others wait."""
    lock = _take(folder / ".gate", wait=True)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


def _holder_message(path: Path) -> str:
    try:
        who = path.read_text(errors="replace") or "a process that is starting"
    except OSError:
        who = "a process"
    return f"{path.parent} is being labelled by {who}: wait for it, stop it, or label into another folder"


def _take(path: Path, *, wait: bool) -> Lock | None:
    try:
        return take_lock(path, wait=wait)
    except OSError as error:
        raise OSError(error.errno, f"cannot write in the labels folder {path.parent}: {error.strerror}") from error
