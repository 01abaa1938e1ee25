"""One of any number of workers: it takes parts one by one, and may join and leave at any moment.

A part is somebody's by a lease (labelling.leases). It is written aside under a name of the claim's own and renamed, and
its bytes are the same whoever makes it, so that two who both believe to have it do no harm. Whole parts are taken
first and short ones last, so that all finish at about one time. A worker that finds nothing more to take waits for the
others, to take over what one leaves; the last one writes the manifest.
"""

from __future__ import annotations

import errno
import os
import random
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.core.crop_settings import CropSettings
from distill.core.progress import Report
from distill.data.sources import InputShard, combine
from distill.data.storage import is_url
from distill.labelling.annotate import CPU, Teachers, asked_about
from distill.labelling.crew import Crew, crew
from distill.labelling.leases import Claim, LeaseLostError
from distill.labelling.lock import refuse_run
from distill.labelling.manifest import finish, keep_settings, settings_of
from distill.labelling.meeting import Folder, Meeting
from distill.labelling.run import LabelOutcome, OpenPart, Part, Tally, Work, is_done, label_part, part_sizes, parts_of
from distill.labelling.settings import DEFAULTS, LabelSettings
from distill.shards.shards import SETTINGS, hash_keys, read_json

LAST = "manifest"
"""The lease of whoever writes the manifest; no part's name, for those end in .tar."""
POLL_S = 10.0
MISSES = 16  # so many parts in a row that others had or have: a listing of what is finished is cheaper than asking on
WATCHED = 8
"""Of other workers' parts so many are looked at before each part, and at each look while nothing else is to be done."""


@dataclass(frozen=True, slots=True)
class Place:
    """A part by where it is: its shard's number, its own, and how many images it has."""

    shard: int
    number: int
    images: int
    name: str


class Board:
    """What there is to do, as a worker finds out while it goes along; a shard is only scanned where it must be.

    What a scan said of a shard, how many images each part has, is a note that spares the other workers the scan; it
    holds while the tar has the same size and time.
    """

    def __init__(
        self, shards: Sequence[InputShard], sizes: Sequence[int], out: Path, meeting: Meeting, teachers: Teachers
    ) -> None:
        self.shards, self.sizes, self.out, self.meeting, self.teachers = shards, sizes, out, meeting, teachers
        self.places: dict[str, Place] = {}
        self._scanned: dict[int, list[Part]] = {}

    def part(self, place: Place) -> Part:
        """The part itself; scans its shard."""
        return self._parts(place.shard)[place.number]

    def _parts(self, shard: int) -> list[Part]:
        if shard not in self._scanned:
            if len(self._scanned) >= 4:  # 11,000 entries each
                self._scanned.pop(next(iter(self._scanned)))
            self._scanned[shard] = parts_of(self.shards[shard], self.sizes[shard])
        return self._scanned[shard]

    def look(self, shard: int) -> list[Place]:
        """The parts of a shard. The first to look also checks what is finished there, as `run.is_done` does."""
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
                    self.meeting.bring(sidecar)
                    if not is_done(self.out, part, self.teachers, self.meeting.whole):
                        self.meeting.withdraw(part.name)
            self.meeting.keep(key, {"input": now, "images": counts, "stem": one.stem})
        found = [Place(shard, i, count, part_name(one.stem, i)) for i, count in enumerate(counts)]
        self.places.update((place.name, place) for place in found)
        return found

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


def part_name(stem: str, number: int) -> str:
    """The tar of a part."""
    return f"{stem}-{number:03d}.tar"


@dataclass(slots=True)
class _Worker:
    """A worker's state: what it knows to be done, and what others held when it came by."""

    board: Board
    meeting: Meeting
    name: str
    walk: Iterator[Place]
    poll_s: float
    done: set[str] = field(default_factory=set)
    held: dict[str, Place] = field(default_factory=dict)
    lost: int = 0
    parts: int = 0
    misses: int = 0
    card: dict[str, Any] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def next(self, team: Crew) -> tuple[Place, Claim] | None:
        """The next part to label; None where every part is finished. Waits for what others have."""
        while True:
            for place in list(self.held.values())[:WATCHED]:
                self.held.pop(place.name)  # looked at in turn: back at the end where it is still held
                if claim := self._try(place):
                    return place, claim
            following = next((p for p in self.walk if p.name not in self.done), None)
            if following is None:
                break
            if claim := self._try(following):
                self.misses = 0
                return following, claim
            self.misses += 1
            if self.misses % MISSES == 0:
                self._note_finished()
        team.wait()  # our own part that is being finished is nobody else's to wait for
        while self._left():
            for place in list(self.held.values())[:WATCHED]:
                if claim := self._try(place):
                    return place, claim
            self.tell(part="")
            time.sleep(self.poll_s)
        return None

    def _left(self) -> bool:
        """Whether parts are missing; `held` is then those, in an order of this worker's own."""
        there = self._note_finished()
        missing = [place for name, place in self.board.places.items() if name not in self.done]
        # A part whose images are all in quarantine has a json alone, as has one whose writer is between its two files.
        for place in [p for p in missing if f"{Path(p.name).stem}.json" in there]:
            if self._is_empty(place):
                self.done.add(place.name)
        kept = {name: place for name, place in self.held.items() if name not in self.done}
        rest = [place for place in missing if place.name not in self.done and place.name not in kept]
        random.shuffle(rest)
        self.held = kept | {place.name: place for place in rest}
        return bool(self.held)

    def _note_finished(self) -> set[str]:
        """The names at the meeting place, by one listing of it."""
        there = self.meeting.finished()
        self.done |= there
        return there

    def _is_empty(self, place: Place) -> bool:
        sidecar = f"{Path(place.name).stem}.json"
        self.meeting.bring(sidecar)
        path = self.board.out / sidecar
        return path.is_file() and read_json(path)["tar"] is None

    def _try(self, place: Place) -> Claim | None:
        """The part's lease, if nobody has it and it is still to be made."""
        if self._is_there(place):
            self._drop(place)
            return None
        claim = self.meeting.take(place.name)
        if claim is None:
            self.held.setdefault(place.name, place)
            return None
        try:
            if not self._is_there(place):
                self.meeting.begin(place.name, claim)
                if not self._is_there(place):  # a slow holder may have finished until then, and no later
                    self.held.pop(place.name, None)
                    return claim
        except BaseException:
            claim.release()
            raise
        claim.release()
        self._drop(place)
        return None

    def _is_there(self, place: Place) -> bool:
        if self.meeting.has(place.name):
            return True
        return self.meeting.has(f"{Path(place.name).stem}.json") and self._is_empty(place)

    def _drop(self, place: Place) -> None:
        self.done.add(place.name)
        self.held.pop(place.name, None)

    def close(self, opened: OpenPart, place: Place, claim: Claim) -> None:
        """Finish a part and let go of it; a part that was lost meanwhile is somebody else's to finish."""
        try:
            try:
                opened.finish()
            except OSError as error:
                # A network disk that repeats a rename whose answer was lost says this of one that it has done.
                if error.errno != errno.ENOENT:
                    raise
                if not self._is_there(place):
                    raise LeaseLostError(f"{place.name}: its file aside was taken away") from None
            self.meeting.deliver(place.name, claim)
            self.parts += 1
            self.done.add(place.name)
        except LeaseLostError:
            self.lose(place)
        finally:
            claim.release()

    def lose(self, place: Place) -> None:
        """Note that another worker has a part that was ours."""
        self.lost += 1
        self.held[place.name] = place

    def forget(self) -> None:
        """What was taken for finished and is not whole is to be made again."""
        for place in self.board.places.values():
            self.meeting.bring(sidecar := f"{Path(place.name).stem}.json")
            path = self.board.out / sidecar
            tar = read_json(path)["tar"] if path.is_file() else {}
            if tar is not None and (not tar or not self.meeting.whole(self.board.out, tar)):
                self.meeting.withdraw(place.name)
                self.done.discard(place.name)

    def tell(self, *, part: str, tally: Tally | None = None) -> None:
        """Write this worker's card, which `distill status` reads."""
        if tally is not None:
            self.card |= {"images": tally.images, "samples": tally.samples, "label_s": round(tally.busy, 3)}
        self.card |= {"part": part, "part_since": time.time(), "parts": self.parts, "lost": self.lost}
        self.card |= {"seconds": round(time.monotonic() - self.begun, 3)}
        self.meeting.keep(f"worker-{self.name}", self.card)


def work(
    shards: Sequence[InputShard],
    teachers: Teachers,
    *,
    out: str | Path,
    crops: CropSettings,
    labels: LabelSettings = DEFAULTS,
    seed: int = 0,
    device: torch.device = CPU,
    recipe: Mapping[str, Any] | None = None,
    report: Report | None = None,
    meeting: Meeting | None = None,
    poll_s: float = POLL_S,
) -> LabelOutcome:
    """Label as one of any number of workers, until every part is finished, by whomever; see `label` for the arguments.

    meeting: where the workers meet; by default `out`, which all of them must see then. poll_s: how often it looks for
    what others leave, in seconds. The outcome's `last` is True for the worker that found all finished first.

    Raises what `label` raises, RunLockedError where a run holds `out` alone; parts that are finished stay.
    """
    out = Path(out)
    settings = settings_of(teachers, crops, labels, seed=seed)
    combine(shards)
    if not shards:
        raise ValueError("there are no images to label; check [images]")
    for shard in shards:
        asked_about(shard, teachers)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot make the labels folder {out}: {error.strerror}") from error
    refuse_run(out)
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    place = meeting or Folder(out)
    place.bring(SETTINGS)
    keep_settings(out, settings, suffix=f".{name[-6:]}")
    place.share(SETTINGS)
    keep_settings(out, settings)
    end = partial(finish, out, shards, settings, recipe=recipe or {}, licence=labels.licence, whole=place.whole)
    before = place.stamp()
    if before and _finish(place, end, fresh=False):
        return LabelOutcome(True, 0, len(place.finished()) // 2, 0, 0, 0, 0)
    board = Board(shards, part_sizes(shards, crops, labels), out, place, teachers)
    worker = _Worker(board, place, name, iter(()), min(poll_s, place.lease_s / 4))
    worker.walk = board.walk(random.Random(name).randrange(len(shards)))
    worker.card = {"host": socket.gethostname(), "pid": os.getpid(), "device": device.type, "since": time.time()}
    tally = Tally(0, 0, report, shared=True)
    with crew(max(1, labels.threads)) as team:
        while True:
            _label_all(worker, team, tally, Work(teachers, crops, labels, seed, device, (), team.stopping))
            if (now := place.stamp()) and now != before:
                place.tidy()  # our own card may have come after the last one's tidying
                return _outcome(worker, tally, last=False)
            if _finish(place, end, fresh=True):
                return _outcome(worker, tally, last=True)
            worker.forget()
            time.sleep(worker.poll_s)


def _outcome(worker: _Worker, tally: Tally, *, last: bool) -> LabelOutcome:
    skipped = len(worker.board.places) - worker.parts
    return LabelOutcome(
        True, worker.parts, skipped, tally.images, tally.samples, tally.quarantined, tally.bytes, last=last
    )


def _label_all(worker: _Worker, team: Crew, tally: Tally, work: Work) -> None:
    """Label parts until none is left, by anybody."""
    while got := worker.next(team):
        place, claim = got
        begun = time.monotonic()
        try:
            part = worker.board.part(place)
            tally.total = sum(p.images for p in worker.board.places.values())
            tally.before = sum(p.images for n, p in worker.board.places.items() if n in worker.done) - tally.images
            worker.tell(part=place.name, tally=tally)
            asked = asked_about(part.shard, work.teachers)
            opened = label_part(worker.board.out, part, replace(work, asked=asked, claim=claim), tally, team)
        except LeaseLostError:
            claim.release()
            worker.lose(place)
            continue
        except BaseException:
            claim.release()
            raise
        finally:
            tally.busy += time.monotonic() - begun
        try:
            team.close(partial(worker.close, opened, place, claim))
        except BaseException:  # of the part before
            claim.release()
            with opened.writer:
                raise


def _finish(place: Meeting, end: partial[bool], *, fresh: bool) -> bool:
    """Write the manifest if all is there, and nobody is writing it; whether it is written."""
    claim = place.take(LAST)
    if claim is None:
        return False
    try:
        place.bring()
        if not end(fresh=fresh, suffix=claim.suffix):
            return False
        place.publish()
        place.tidy()
        return True
    finally:
        claim.release()
