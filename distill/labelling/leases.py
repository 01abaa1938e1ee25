"""Leases: who labels a part now, on any disk that all workers see; the kernel's locks are not asked.

The package filelock has the lease: a marker that only one can create, which its holder's thread refreshes and whose age
others measure on clocks of their own that cannot be set, so that a clock that jumps loses nothing. The marker of a
process that died on this machine is taken at once, one from elsewhere once it has not been refreshed for LEASE_S.
A holder that slept through that must stop: it asks `check` before everything that others would see.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import SoftFileLease, Timeout

LEASE_S, BEATS = 120.0, 4
"""Seconds without a sign of life after which a part is somebody else's; how often a holder gives one in that time.

Above the minute for which an NFS client may believe old times of files.
"""
SUFFIX = ".lease"
NOTES = ".workers"
"""The folder of leases and notes beside the tars; of them only what the run cost stays (labelling.worker_costs)."""


class LeaseLostError(OSError):
    """Somebody else has the part now: nothing of it may be written any more."""


class Claim(Protocol):
    """A part that is ours to write, as far as we know."""

    @property
    def suffix(self) -> str:
        """What sets its files aside apart from those of other claims; empty for a run that has the folder to itself."""
        ...

    @property
    def lost(self) -> bool:
        """Whether it is known to be lost; costs nothing."""
        ...

    def check(self) -> None:
        """Ask whether it is still ours; raises LeaseLostError."""
        ...

    def release(self) -> None:
        """Let go; others may take it."""
        ...


@dataclass(frozen=True, slots=True)
class Alone:
    """The claim of a run that has the folder to itself."""

    suffix: str = ""
    lost: bool = False

    def check(self) -> None:
        """Nobody can take it."""

    def release(self) -> None:
        """Nobody waits for it."""


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
    """Who has a lease, as its marker says. age: seconds since the last sign of life, by the clock of the disk."""

    name: str
    host: str
    pid: int
    age: float
    dead: bool


class FolderLeases:
    """The leases of a folder, by name. What was seen of others' is kept, for their age is how long it stays the same.

    seconds: as LEASE_S; all workers of a folder must say the same, a ValueError tells where they do not.
    """

    def __init__(self, folder: Path, *, seconds: float = LEASE_S) -> None:
        self.folder, self.seconds = folder, seconds
        self._seen: dict[str, SoftFileLease] = {}
        self._empty: dict[str, tuple[tuple[int, int], float]] = {}

    def take(self, name: str) -> Claim | None:
        """The lease, or None where somebody else has it; never waits. Raises OSError."""
        lease = self._seen.get(name)
        if lease is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            lease = self._seen[name] = SoftFileLease(
                self.folder / f"{name}{SUFFIX}",
                lease_duration=self.seconds,
                heartbeat_interval=self.seconds / BEATS,
                thread_local=False,  # a part is closed in another thread than it was begun in
            )
        try:
            lease.acquire(blocking=False)
        except (Timeout, FileNotFoundError):  # or the last worker has just cleared the folder away
            self._clear_empty(name)
            return None
        del self._seen[name]
        return _Held(lease, str(lease.token))

    def _clear_empty(self, name: str) -> None:
        """Take an empty marker away that has been so for long: its holder was killed between making and writing it.

        The package lets it be for ever, since its versions before 3.22 wrote nothing.
        """
        path = self.folder / f"{name}{SUFFIX}"
        with contextlib.suppress(OSError):
            found = path.stat()
            now, key = time.monotonic(), (found.st_ino, found.st_mtime_ns)
            seen, since = self._empty.get(name, ((0, 0), now))
            if found.st_size:
                self._empty.pop(name, None)
            elif seen != key:
                self._empty[name] = (key, now)
            elif now - since >= self.seconds:
                path.unlink()

    def holders(self) -> list[Holder]:
        """Everybody who has a lease, or died with one; changes nothing but a file that asks the disk what time it is.

        A reader that may not write there goes by its own clock.
        """
        if not self.folder.is_dir():
            return []
        now = disk_time(self.folder)
        holders = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                changed = path.stat().st_mtime
            except FileNotFoundError:
                continue
            if (owner := SoftFileLease(path, lease_duration=self.seconds).owner) is None:
                continue
            age = max(0.0, now - changed)
            # On its own machine a silent process can be looked up. Silent, for a container there has other numbers.
            here = owner.hostname.partition("?")[0] == socket.gethostname()
            gone = here and age > 2 * self.seconds / BEATS and not _runs(owner.pid)
            dead = gone or age > self.seconds
            holders.append(Holder(path.name.removesuffix(SUFFIX), owner.hostname, owner.pid, age, dead))
        return holders


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def disk_time(folder: Path) -> float:
    """What time a file gets that is written there now, in seconds; this machine's where nothing can be written."""
    probe = folder / f".clock-{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
