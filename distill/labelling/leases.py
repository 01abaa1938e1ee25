"""Leases: which worker labels a part now, on any disk that all workers see; they do not rely on the kernel's locks.

The package filelock implements them: a marker file that only one process can create. Its holder's thread refreshes it,
and others measure its age on their own monotonic clocks, so that a clock that jumps does no harm. The marker of a
process that died on this machine is taken over at once, one from elsewhere after LEASE_S without a refresh.
A holder that was suspended that long must stop: it calls `check` before any change that others would see.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import SoftFileLease, Timeout

from distill.core import files

LEASE_S, BEATS = 120.0, 4
"""Seconds without a heartbeat after which others may take a part; number of heartbeats in that time.

Above the minute for which an NFS client may cache old file times.
"""
SUFFIX = ".lease"
NOTES = ".workers"
"""The folder of leases and notes beside the tars; in the end only the run's cost is kept (labelling.worker_costs)."""


class LeaseLostError(OSError):
    """Another worker has the part now: this one must not write it any more."""


class Claim(Protocol):
    """The right to write a part, as far as this process knows."""

    @property
    def suffix(self) -> str:
        """Distinguishes its partial files from those of other claims; empty for a run that has the folder to itself."""
        ...

    @property
    def lost(self) -> bool:
        """Whether it is known to be lost; cheap, without a look at the disk."""
        ...

    def check(self) -> None:
        """Check on disk that it is still held; raises LeaseLostError."""
        ...

    def release(self) -> None:
        """Give it up; others may take it."""
        ...


@dataclass(frozen=True, slots=True)
class Alone:
    """The claim of a run that has the folder to itself."""

    suffix: str = ""
    lost: bool = False

    def check(self) -> None:
        """Never raises: nobody can take it."""

    def release(self) -> None:
        """Does nothing: nobody waits for it."""


ALONE = Alone()


@dataclass(frozen=True, slots=True)
class _Held:
    lease: SoftFileLease
    token: str

    @property
    def suffix(self) -> str:
        return f".{self.token}"

    @property
    def lost(self) -> bool:
        return self.lease.compromise is not None

    def check(self) -> None:
        owner = None if self.lost else self.lease.owner
        if owner is None or owner.token != self.token:
            raise LeaseLostError(f"{self.lease.lock_file}: another worker has taken it over")

    def release(self) -> None:
        self.lease.release()


@dataclass(frozen=True, slots=True)
class Holder:
    """The holder of a lease, from its marker. age: seconds since the last heartbeat, by the clock of the disk."""

    name: str
    host: str
    pid: int
    age: float
    dead: bool


class FolderLeases:
    """The leases of a folder, by name. Remembers other workers' markers: their age is how long they stay unchanged.

    seconds: as LEASE_S; raises ValueError where the workers of a folder have different values.
    """

    def __init__(self, folder: Path, *, seconds: float = LEASE_S) -> None:
        self.folder, self.seconds = folder, seconds
        self._seen: dict[str, SoftFileLease] = {}
        self._empty: dict[str, tuple[tuple[int, int], float]] = {}

    def take(self, name: str) -> Claim | None:
        """The lease, or None where another worker has it; never waits. Raises OSError."""
        lease = self._seen.get(name)
        if lease is None:
            files.make_folder(self.folder)
            lease = self._seen[name] = SoftFileLease(
                self.folder / f"{name}{SUFFIX}",
                lease_duration=self.seconds,
                heartbeat_interval=self.seconds / BEATS,
                thread_local=False,  # a part is finished in another thread than it was begun in
            )
        try:
            lease.acquire(blocking=False)
        except (Timeout, FileNotFoundError):  # or the last worker has just removed the folder
            self._remove_stale_empty_marker(name)
            return None
        del self._seen[name]
        return _Held(lease, str(lease.token))

    def _remove_stale_empty_marker(self, name: str) -> None:
        """Remove a marker that has been empty for long: its holder was killed between creating and writing it.

        The package never removes it, because its versions before 3.22 wrote empty markers.
        """
        path = self.folder / f"{name}{SUFFIX}"
        with contextlib.suppress(OSError):
            status = path.stat()
            now, key = time.monotonic(), (status.st_ino, status.st_mtime_ns)
            key_before, since = self._empty.get(name, ((0, 0), now))
            if status.st_size:
                self._empty.pop(name, None)
            elif key_before != key:
                self._empty[name] = (key, now)
            elif now - since >= self.seconds:
                path.unlink()

    def holders(self) -> list[Holder]:
        """All holders of leases, dead ones included; writes nothing but a file that reads the disk's clock.

        A reader without write permission uses its own clock.
        """
        if not (paths := files_in(self.folder, f"*{SUFFIX}")):
            return []
        now = disk_time(self.folder)
        holders = []
        for path in paths:
            try:
                changed = path.stat().st_mtime
            except FileNotFoundError:
                continue
            if (owner := SoftFileLease(path, lease_duration=self.seconds).owner) is None:
                continue
            age = max(0.0, now - changed)
            # A process of this machine can be looked up, but only once it is silent: a container has its own ids.
            on_this_machine = owner.hostname.partition("?")[0] == socket.gethostname()
            died_here = on_this_machine and age > 2 * self.seconds / BEATS and not _is_running(owner.pid)
            dead = died_here or age > self.seconds
            holders.append(Holder(path.name.removesuffix(SUFFIX), owner.hostname, owner.pid, age, dead))
        return holders


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def files_in(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match, sorted; none where the folder does not exist, or is removed meanwhile."""
    try:
        return sorted(folder.glob(pattern))
    except FileNotFoundError:  # before Python 3.13
        return []


def disk_time(folder: Path) -> float:
    """The time of a file that is written in the folder now, in seconds; this machine's where none can be written."""
    probe = folder / f".clock-{secrets.token_hex(6)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
