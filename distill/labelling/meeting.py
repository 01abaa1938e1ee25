"""Where workers meet: what is finished, who has what, and notes that spare others a look; here, a folder all can see.

`labelling.objects` is the same at an address of an object store.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from distill.core import files
from distill.labelling.leases import LEASE_S, NOTES, Claim, FolderLeases, Holder, disk_time
from distill.labelling.manifest import is_whole
from distill.shards.shards import MANIFEST

T = TypeVar("T")

SPENT = "spent"
"""The note that stays when all is finished (labelling.worker_costs)."""
AGE = "age_s"
"""What `Meeting.notes` adds to each: seconds since it was written, by the clock of the place."""


class Meeting(Protocol):
    """What workers need of the place where they meet. Every method raises OSError where it cannot be reached."""

    lease_s: float

    def take(self, name: str) -> Claim | None:
        """The lease of a part, None where somebody else has it."""
        ...

    def holders(self) -> list[Holder]:
        """Who has leases."""
        ...

    def finished(self) -> set[str]:
        """The names of all tars and jsons that are finished."""
        ...

    def has(self, name: str) -> bool:
        """Whether a finished file is there."""
        ...

    def whole(self, out: Path, tar: Mapping[str, Any]) -> bool:
        """Whether the tar that a part's json describes is there, to the last byte."""
        ...

    def begin(self, part: str, claim: Claim) -> None:
        """A part was taken: what those who had it before left aside goes, so that they can finish it no more."""
        ...

    def deliver(self, part: str, claim: Claim) -> None:
        """Bring a part that is finished in the worker's folder to the others; raises LeaseLostError."""
        ...

    def withdraw(self, part: str) -> None:
        """Take away a finished part that must be made again."""
        ...

    def bring(self, name: str = "") -> None:
        """Have the json of a part, or of all, in the worker's folder."""
        ...

    def share(self, name: str) -> None:
        """Bring a file of the worker's folder to the others, or theirs into it where they have one."""
        ...

    def note(self, name: str) -> dict[str, Any]:
        """A note by its name; {} where there is none, or none to be read."""
        ...

    def keep(self, name: str, note: Mapping[str, Any]) -> None:
        """Write a note, in place of the one before."""
        ...

    def notes(self, prefix: str) -> dict[str, dict[str, Any]]:
        """All notes whose names begin so, by what follows, with their age (AGE); without those that cannot be read."""
        ...

    def stamp(self) -> str:
        """What changes when a manifest is written."""
        ...

    def publish(self) -> None:
        """Bring the manifest that is in the worker's folder to the others."""
        ...

    def tidy(self) -> None:
        """All is finished: leases and notes but SPENT go, and what killed workers left aside."""
        ...


class Folder:
    """The labels folder on a disk that all workers see."""

    def __init__(self, out: Path, *, lease_s: float = LEASE_S) -> None:
        self.out, self.lease_s = out, lease_s
        self._leases = FolderLeases(out / NOTES, seconds=lease_s)

    def take(self, name: str) -> Claim | None:
        """As Meeting has it."""
        return self._leases.take(name)

    def holders(self) -> list[Holder]:
        """As Meeting has it."""
        return self._leases.holders()

    def finished(self) -> set[str]:
        """One listing of the folder."""
        return {path.name for path in self.out.iterdir() if path.suffix in (".tar", ".json")}

    def has(self, name: str) -> bool:
        """As Meeting has it."""
        return (self.out / name).is_file()

    def whole(self, out: Path, tar: Mapping[str, Any]) -> bool:
        """As Meeting has it."""
        return is_whole(out, tar)

    def begin(self, part: str, claim: Claim) -> None:
        """A holder that was too slow finds its file aside gone, and cannot rename it."""
        for name in (part, str(Path(part).with_suffix(".json"))):
            for left in self.out.glob(f"{files.aside(self.out / name).name}*"):
                if not left.name.endswith(claim.suffix):
                    left.unlink(missing_ok=True)

    def deliver(self, part: str, claim: Claim) -> None:
        """It is there already."""

    def withdraw(self, part: str) -> None:
        """The tar first: without its json a tar would be taken for one that nobody described."""
        for path in (self.out / part, (self.out / part).with_suffix(".json")):
            path.unlink(missing_ok=True)

    def bring(self, name: str = "") -> None:
        """They are there."""

    def share(self, name: str) -> None:
        """It is there."""

    def note(self, name: str) -> dict[str, Any]:
        """As Meeting has it."""
        try:
            found = json.loads((self.out / NOTES / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def keep(self, name: str, note: Mapping[str, Any]) -> None:
        """Not for good: a note that a power cut takes is made again."""
        path = self.out / NOTES / f"{name}.json"
        with files.writing(path, suffix=f".{secrets.token_hex(6)}", durable=False) as new:
            new.write_text(json.dumps(note))

    def notes(self, prefix: str) -> dict[str, dict[str, Any]]:
        """As Meeting has it."""
        found, now = {}, disk_time(self.out / NOTES)
        for path in (self.out / NOTES).glob(f"{prefix}*.json"):
            with contextlib.suppress(FileNotFoundError):  # the last worker clears them away while we read
                age = max(0.0, now - path.stat().st_mtime)
                if note := self.note(path.stem):
                    found[path.stem.removeprefix(prefix)] = {**note, AGE: age}
        return found

    def stamp(self) -> str:
        """As Meeting has it."""
        try:
            found = (self.out / MANIFEST).stat()
        except FileNotFoundError:
            return ""
        return f"{found.st_ino} {found.st_mtime_ns} {found.st_size}"

    def publish(self) -> None:
        """It is there."""

    def tidy(self) -> None:
        """As Meeting has it."""
        for left in self.out.glob(f".*{files.PARTIAL}*"):
            left.unlink(missing_ok=True)
        notes = self.out / NOTES
        with contextlib.suppress(OSError):
            for path in notes.iterdir():
                if path.name != f"{SPENT}.json":
                    path.unlink(missing_ok=True)
            notes.rmdir()  # where nothing stays


@contextlib.contextmanager
def turn(place: Meeting, name: str) -> Iterator[None]:
    """By one worker at a time; waits."""
    while (claim := place.take(name)) is None:
        time.sleep(min(1.0, place.lease_s / 4))
    try:
        yield
    finally:
        claim.release()


def in_turn(place: Meeting, file: Path, do: Callable[[], T]) -> T:
    """What `do` returns, by one worker at a time; the file that the first one writes is there for the others."""
    with turn(place, f"turn-{file.stem}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        place.bring(file.name)
        result = do()
        if file.is_file():
            place.share(file.name)
        return result
