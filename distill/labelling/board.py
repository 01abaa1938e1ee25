"""What there is to label, as a worker finds out on its way: parts by their place, notes that spare others a scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from distill.data.scans import scan_from, scan_table
from distill.data.sources import InputShard, Scan
from distill.data.storage import is_url
from distill.labelling.jobs import Teachers
from distill.labelling.meeting import Meeting
from distill.labelling.parts import Part, Tell, is_done, parts_of
from distill.shards.shards import hash_keys


@dataclass(frozen=True, slots=True)
class Place:
    """A part by where it is: its shard's number, its own, and how many images it has."""

    shard: int
    number: int
    images: int
    name: str


class Board:
    """What there is to do, as a worker finds out while it goes along; a shard is only scanned where it must be.

    What a scan said of a tar is kept in two notes, how many images each part has and where they are, and spares all
    other workers the scan; they hold while the tar has the same size and time.
    """

    def __init__(
        self,
        shards: Sequence[InputShard],
        sizes: Sequence[int],
        out: Path,
        meeting: Meeting,
        teachers: Teachers,
        tell: Tell = lambda line: None,
    ) -> None:
        self.shards, self.sizes, self.out, self.meeting, self.teachers = shards, sizes, out, meeting, teachers
        self.tell = tell
        self.places: dict[str, Place] = {}
        self._scanned: dict[int, list[Part]] = {}

    def part(self, place: Place) -> Part:
        """The part itself; scans its shard."""
        return self._parts(place.shard)[place.number]

    def _parts(self, shard: int) -> list[Part]:
        if shard not in self._scanned:
            if len(self._scanned) >= 4:  # 11,000 entries each
                self._scanned.pop(next(iter(self._scanned)))
            self._scanned[shard] = parts_of(self._known(self.shards[shard], shard), self.sizes[shard])
        return self._scanned[shard]

    def _known(self, one: InputShard, shard: int) -> InputShard:
        """A tar with the scan that a note has of it, which is otherwise made and noted."""
        if not one.is_tar:
            return one
        key, now = f"scan-{one.stem}", self._fingerprint(shard)
        note = self.meeting.note(key)
        scan: Scan | None = None
        if note.get("input") == now:
            with suppress(KeyError, TypeError, ValueError):  # a note of ours that was damaged is made again
                scan = scan_from(one, note["scan"])
        if scan is None:
            scan = one.scan()
            self.meeting.keep(key, {"input": now, "scan": scan_table(scan)})
        known = scan
        return replace(one, scan=lambda: known)

    def look(self, shard: int) -> list[Place]:
        """The parts of a shard. The first to look also checks what is finished there, as `parts.is_done` does."""
        one = self.shards[shard]
        key, now = f"plan-{one.stem}", self._fingerprint(shard)
        note = self.meeting.note(key)
        counts = note.get("images") if note.get("input") == now else None
        if not isinstance(counts, list):
            parts = self._parts(shard)
            counts = [len(part.entries) for part in parts]
            for part in parts:
                sidecar = f"{Path(part.name).stem}.json"
                if self.meeting.has(sidecar):
                    check = partial(self._is_stale, part)
                    if check():
                        withdraw(self.meeting, part.name, check)
            self.meeting.keep(key, {"input": now, "images": counts, "stem": one.stem})
        found = [Place(shard, i, count, part_name(one.stem, i)) for i, count in enumerate(counts)]
        self.places.update((place.name, place) for place in found)
        return found

    def _is_stale(self, part: Part) -> bool:
        self.meeting.bring(f"{Path(part.name).stem}.json")
        return not is_done(self.out, part, self.teachers, manifest={}, tell=self.tell, whole=self.meeting.whole)

    def _fingerprint(self, shard: int) -> list[Any]:
        one = self.shards[shard]
        if not one.is_tar:
            return [hash_keys([entry.key for entry in one.scan().entries])]  # known without a look at the disk
        if is_url(one.origin):
            return [one.origin]
        try:
            seen = Path(one.origin).stat()
        except OSError:
            return [one.origin, 0]
        return [seen.st_size, seen.st_mtime_ns]

    def walk(self, start: int) -> Iterator[Place]:
        """Every part, the longest first as far as it is known, beginning at shard `start`: workers begin apart."""
        short: list[Place] = []
        order = [(start + i) % len(self.shards) for i in range(len(self.shards))]
        for shard in order:
            whole = max(self.sizes)
            for place in self.look(shard):
                if place.images < whole:
                    short.append(place)
                else:
                    yield place
        yield from sorted(short, key=lambda place: -place.images)


def withdraw(meeting: Meeting, name: str, still: Callable[[], bool]) -> None:
    """Take away a finished part that must be made again, unless somebody is making it: between its json and its tar it
    looks like one that is broken. still: whether it must, asked once nobody can be.
    """
    if (claim := meeting.take(name)) is not None:
        try:
            if still():
                meeting.withdraw(name)
        finally:
            claim.release()


def part_name(stem: str, number: int) -> str:
    """The tar of a part."""
    return f"{stem}-{number:03d}.tar"
