"""The parts to label, as a worker discovers them: parts by their place, and notes that spare other workers a scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from distill.core.addresses import public
from distill.data.scans import scan_from, scan_table
from distill.data.sources import InputShard, Scan
from distill.data.storage import is_url
from distill.labelling.jobs import Teachers
from distill.labelling.manifest import part_name, sidecar_name
from distill.labelling.meeting import SPENT, Meeting
from distill.labelling.parts import Part, Tell, is_done, parts_of
from distill.shards.shards import hash_keys


@dataclass(frozen=True, slots=True)
class Place:
    """A part's location: its shard's number, its own number, its count of images and the name of its tar."""

    shard: int
    number: int
    images: int
    name: str

    @property
    def sidecar(self) -> str:
        """The name of the json beside its tar."""
        return sidecar_name(self.name)


class Board:
    """The parts of all shards, discovered as a worker goes along; a shard is only scanned where necessary.

    The scan of a tar is kept in two notes, the number of images of each part and their locations, which spare all other
    workers the scan; they are valid while the tar has the same size and time.
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
        self._counts: dict[int, int] = {}

    @property
    def num_images(self) -> int:
        """The images of all shards; a shard that this worker did not look at yet counts as the mean of the others."""
        return round(sum(self._counts.values()) * len(self.shards) / max(1, len(self._counts)))

    def part(self, place: Place) -> Part:
        """The part itself; scans its shard."""
        return self._parts(place.shard)[place.number]

    def _parts(self, shard: int) -> list[Part]:
        if shard not in self._scanned:
            if len(self._scanned) >= 4:  # 11,000 entries each
                self._scanned.pop(next(iter(self._scanned)))
            self._scanned[shard] = parts_of(self._known(self.shards[shard]), self.sizes[shard])
        return self._scanned[shard]

    def _known(self, shard: InputShard) -> InputShard:
        """A tar with the scan from its note; without a note it is scanned and the note is written."""
        if not shard.is_tar:
            return shard
        key, now = f"scan-{shard.stem}", fingerprint(shard)
        note = self.meeting.note(key)
        scan: Scan | None = None
        if note.get("input") == now:
            with suppress(KeyError, TypeError, ValueError):  # a damaged note is written again
                scan = scan_from(shard, note["scan"])
        if scan is None:
            scan = shard.scan()
            self.meeting.write_note(key, {"input": now, "scan": scan_table(scan)})
        known = scan
        return replace(shard, scan=lambda: known)

    def look(self, shard: int) -> list[Place]:
        """The parts of a shard. The first worker to look also checks its finished parts with `parts.is_done`."""
        input_shard = self.shards[shard]
        key, now = f"plan-{input_shard.stem}", fingerprint(input_shard)
        note = self.meeting.note(key)
        counts = note.get("images") if note.get("input") == now else None
        if not isinstance(counts, list):
            parts = self._parts(shard)
            counts = [len(part.entries) for part in parts]
            for part in parts:
                if self.meeting.has(part.sidecar):
                    check = partial(self._is_stale, part)
                    if check():
                        withdraw(self.meeting, part.name, check)
            self.meeting.write_note(key, {"input": now, "images": counts, "stem": input_shard.stem})
        self._counts[shard] = sum(counts)
        places = [Place(shard, i, count, part_name(input_shard.stem, i)) for i, count in enumerate(counts)]
        self.places.update((place.name, place) for place in places)
        return places

    def _is_stale(self, part: Part) -> bool:
        self.meeting.download(part.sidecar)
        return not is_done(self.out, part, self.teachers, manifest={}, tell=self.tell, whole=self.meeting.whole)

    def walk(self, start: int) -> Iterator[Place]:
        """Every part, full ones first and then by size, from shard `start` on: workers start at different shards."""
        short: list[Place] = []
        whole = max(self.sizes)
        for shard in (*range(start, len(self.shards)), *range(start)):
            for place in self.look(shard):
                if place.images < whole:
                    short.append(place)
                else:
                    yield place
        yield from sorted(short, key=lambda place: -place.images)


def fingerprint(shard: InputShard) -> list[Any]:
    """What changes when a shard's images do, without reading them: a tar's size and time, or the names in a folder
    with the sizes and times of its files.
    """
    if not shard.is_tar:
        entries = shard.scan().entries  # known without reading the disk
        paths = [entry.place[0] for entry in entries if entry.place is not None]
        times = [f"{_size_and_time(path)}" for path in paths if isinstance(path, Path)]
        return [hash_keys([entry.key for entry in entries]), *([hash_keys(times)] if times else [])]
    if is_url(shard.origin):
        return [public(shard.origin)]
    return _size_and_time(Path(shard.origin)) or [shard.origin, 0]


def _size_and_time(path: Path) -> list[int]:
    """A file's; empty where it cannot be asked."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def changed_since(meeting: Meeting, shards: Sequence[InputShard]) -> list[InputShard]:
    """The shards that are not known to be as workers labelled them: they must be scanned to tell."""
    labelled = meeting.note(SPENT).get("inputs")
    inputs = labelled if isinstance(labelled, dict) else {}
    return [shard for shard in shards if inputs.get(shard.stem) != fingerprint(shard)]


def withdraw(meeting: Meeting, name: str, still: Callable[[], bool]) -> None:
    """Remove a finished part that must be made again, unless a worker is making it: between its json and its tar such a
    part looks broken. still: whether it must, called once no worker can be making it.
    """
    if (claim := meeting.take(name)) is not None:
        try:
            if still():
                meeting.withdraw(name)
        finally:
            claim.release()
