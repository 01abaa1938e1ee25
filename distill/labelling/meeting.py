"""The meeting place of workers: finished files, leases, and notes that spare others work; here, a shared folder.

`labelling.objects` is the same for an object store.
"""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from distill.core import files
from distill.labelling.leases import LEASE_S, NOTES, SUFFIX, Claim, FolderLeases, Holder, disk_time, files_in
from distill.labelling.manifest import is_whole, sidecar_name
from distill.shards.shards import MANIFEST

T = TypeVar("T")

LAST = "manifest"
"""The lease of the worker that writes the manifest; differs from parts' names, which end in .tar."""
SPENT = "spent"
"""The note that is kept when all is finished (labelling.worker_costs)."""
AGE = "age_s"
"""The key that `Meeting.notes` adds to each note: seconds since it was written, by the meeting place's clock."""


class Meeting(Protocol):
    """The interface of a meeting place of workers. Every method raises OSError where it cannot be reached."""

    lease_s: float

    def take(self, name: str) -> Claim | None:
        """The lease of a part, None where another worker has it."""
        ...

    def holders(self) -> list[Holder]:
        """The holders of leases."""
        ...

    def finished(self) -> set[str]:
        """The names of all finished tars and jsons."""
        ...

    def has(self, name: str) -> bool:
        """Whether a finished file exists."""
        ...

    def whole(self, out: Path, tar: Mapping[str, Any]) -> bool:
        """Whether the tar that a part's json describes exists in its full size."""
        ...

    def begin(self, part: str, claim: Claim) -> None:
        """Remove earlier holders' partial files of a part just taken, so that they cannot finish it any more."""
        ...

    def deliver(self, part: str, claim: Claim) -> None:
        """Publish a part that is finished in the worker's folder; raises LeaseLostError."""
        ...

    def withdraw(self, part: str) -> None:
        """Remove a finished part that must be made again."""
        ...

    def download(self, name: str = "") -> None:
        """Copy the json of a part, or of all, into the worker's folder."""
        ...

    def publish_file(self, name: str) -> None:
        """Publish a file of the worker's folder, or replace it by the published one where there is one."""
        ...

    def note(self, name: str) -> dict[str, Any]:
        """A note by its name; {} where there is none, or it cannot be read."""
        ...

    def write_note(self, name: str, note: Mapping[str, Any]) -> None:
        """Write a note, replacing the previous one."""
        ...

    def notes(self, prefix: str) -> dict[str, dict[str, Any]]:
        """All readable notes whose names start with `prefix`, by the rest of the name, with their age (AGE)."""
        ...

    def stamp(self) -> str:
        """A string that changes when a manifest is written; "" without one."""
        ...

    def publish(self, claim: Claim) -> None:
        """Publish the manifest in the worker's folder; raises LeaseLostError where another worker has taken over."""
        ...

    def tidy(self) -> None:
        """When all is finished, remove leases, all notes but SPENT, and partial files of killed workers.

        The lease LAST is removed at the end: whoever has it may write notes, which must not be removed then.
        """
        ...


class Folder:
    """The labels folder as the meeting place, on a disk that all workers see."""

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
        """As Meeting has it: a holder that was too slow cannot rename its partial file any more."""
        names = tuple(files.temporary_name(self.out / name).name for name in (part, sidecar_name(part)))
        for path in self.out.iterdir():
            if path.name.startswith(names) and not path.name.endswith(claim.suffix):
                path.unlink(missing_ok=True)

    def deliver(self, part: str, claim: Claim) -> None:
        """Nothing to do: it is there already."""

    def withdraw(self, part: str) -> None:
        """As Meeting has it; the tar first, because a tar without its json would look like one not yet described."""
        for name in (part, sidecar_name(part)):
            (self.out / name).unlink(missing_ok=True)

    def download(self, name: str = "") -> None:
        """Nothing to do: they are there."""

    def publish_file(self, name: str) -> None:
        """Nothing to do: it is there."""

    def note(self, name: str) -> dict[str, Any]:
        """As Meeting has it."""
        try:
            note = json.loads((self.out / NOTES / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def write_note(self, name: str, note: Mapping[str, Any]) -> None:
        """As Meeting has it, without a sync: a note lost in a power cut is written again.

        Nothing is written where another worker has just finished everything: its `tidy` removes a half-written note.
        """
        path = self.out / NOTES / f"{name}.json"
        try:
            with files.writing(path, suffix=f".{secrets.token_hex(6)}", durable=False) as new:
                new.write_text(json.dumps(note))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def notes(self, prefix: str) -> dict[str, dict[str, Any]]:
        """As Meeting has it."""
        notes, now = {}, disk_time(self.out / NOTES)
        for path in files_in(self.out / NOTES, f"{prefix}*.json"):
            with contextlib.suppress(FileNotFoundError):  # the last worker may remove them meanwhile
                age = max(0.0, now - path.stat().st_mtime)
                if note := self.note(path.stem):
                    notes[path.stem.removeprefix(prefix)] = {**note, AGE: age}
        return notes

    def stamp(self) -> str:
        """As Meeting has it."""
        try:
            status = (self.out / MANIFEST).stat()
        except FileNotFoundError:
            return ""
        return f"{status.st_ino} {status.st_mtime_ns} {status.st_size}"

    def publish(self, claim: Claim) -> None:
        """It is there already, and right whoever wrote it; only its writer goes on."""
        claim.check()

    def tidy(self) -> None:
        """As Meeting has it."""
        for partial_file in self.out.glob(f".*{files.PARTIAL}*"):
            partial_file.unlink(missing_ok=True)
        notes = self.out / NOTES
        with contextlib.suppress(OSError):
            for path in sorted(notes.iterdir(), key=lambda path: path.name == f"{LAST}{SUFFIX}"):
                if path.name != f"{SPENT}.json":
                    path.unlink(missing_ok=True)
            notes.rmdir()  # fails where SPENT is kept


@contextlib.contextmanager
def turn(place: Meeting, name: str) -> Iterator[None]:
    """A block that one worker at a time runs; the others wait."""
    while (claim := place.take(name)) is None:
        time.sleep(min(1.0, place.lease_s / 4))
    try:
        yield
    finally:
        claim.release()


def in_turn(place: Meeting, file: Path, do: Callable[[], T]) -> T:
    """Run `do` in one worker at a time and return its result; the file that the first one writes is shared."""
    with turn(place, f"turn-{file.stem}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        place.download(file.name)
        result = do()
        if file.is_file():
            place.publish_file(file.name)
        return result
