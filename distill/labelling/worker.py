"""One of any number of workers: it takes parts one by one, and may join and leave at any moment.

A part is somebody's by a lease (labelling.leases). It is written aside under a name of the claim's own and renamed, and
its bytes are the same whoever makes it, so that two who both believe to have it do no harm. Whole parts are taken
first and short ones last, so that all finish at about one time. Of those that find nothing more to take, a few wait, to
take over what one leaves; one of them writes the manifest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import secrets
import socket
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.core.crop_settings import CropSettings
from distill.core.progress import Report
from distill.data.sources import InputShard
from distill.labelling.annotate import CPU
from distill.labelling.board import Board, Place, withdraw
from distill.labelling.jobs import Teachers, asked_about
from distill.labelling.leases import Claim, LeaseLostError
from distill.labelling.lock import refuse_run
from distill.labelling.manifest import finish, keep_settings, settings_of
from distill.labelling.meeting import Folder, Meeting, turn
from distill.labelling.parts import Tell, line_of
from distill.labelling.pools import ThreadPools, thread_pools
from distill.labelling.run import LabelOutcome, OpenPart, Tally, Work, label_part, made_by, make_folder, part_sizes
from distill.labelling.settings import DEFAULTS, LabelSettings
from distill.labelling.worker_costs import RECORD, settle
from distill.shards.shards import SETTINGS, DamagedTableError, read_json

LAST = "manifest"
"""The lease of whoever writes the manifest; no part's name, for those end in .tar."""
WAIT, SPARE = "wait", 8
"""Who waits for what others have has a lease wait-N: one, one more for each SPARE parts that are missing and for each
whose holder is dead. The others leave: machines that wait cost what machines cost that work."""
POLL_S, LISTED_S = 10.0, 60.0
"""Seconds between two looks of who waits, and at least between two listings of what is finished by who works."""
MISSES = 16  # so many parts in a row that others had or have: a listing of what is finished is cheaper than asking on
WATCHED, GLANCED = 8, 2
"""So many of other workers' parts are looked at by who waits, at each look, and by who works, before each part."""


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
    listed: float = -LISTED_S
    wait_slot: tuple[int, Claim] | None = None
    record: dict[str, Any] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def next(self, pools: ThreadPools) -> tuple[Place, Claim] | None:
        """The next part to label; None where none is left to take. Waits for what others have, where few others do."""
        while True:
            for place in list(self.held.values())[:GLANCED]:
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
            if self.misses >= MISSES and time.monotonic() - self.listed >= LISTED_S:
                self._note_finished()
        pools.wait()  # our own part that is being finished is nobody else's to wait for
        while self._left():
            for place in list(self.held.values())[:WATCHED]:
                if claim := self._try(place):
                    self.give_up_wait_slot()
                    return place, claim
            if not self.may_wait(len(self.held)):
                return None
            self.tell(part="")
            time.sleep(self.poll_s)
        return None

    def may_wait(self, missing: int) -> bool:
        """Whether this worker is one of the few that wait while so many parts are missing."""
        slots = 1 + missing // SPARE
        if self.wait_slot is not None and self.wait_slot[0] < slots and not self.wait_slot[1].lost:
            return True
        self.give_up_wait_slot()
        slots += sum(holder.dead for holder in self.meeting.holders())
        for number in random.sample(range(slots), min(slots, WATCHED)):
            if claim := self.meeting.take(f"{WAIT}-{number}"):
                self.wait_slot = (number, claim)
                return True
        return False

    def give_up_wait_slot(self) -> None:
        """Wait no more."""
        if self.wait_slot is not None:
            self.wait_slot[1].release()
            self.wait_slot = None

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
        self.listed = time.monotonic()
        self.done |= there
        return there

    def _is_empty(self, place: Place) -> bool:
        sidecar = f"{Path(place.name).stem}.json"
        self.meeting.bring(sidecar)
        path = self.board.out / sidecar
        return _tar_of(path) is None

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
            if self._is_broken(place):
                self.done.discard(place.name)
                withdraw(self.meeting, place.name, partial(self._is_broken, place))

    def _is_broken(self, place: Place) -> bool:
        self.meeting.bring(sidecar := f"{Path(place.name).stem}.json")
        tar = _tar_of(self.board.out / sidecar)
        return tar is not None and (not tar or not self.meeting.whole(self.board.out, tar))

    def tell(self, *, part: str, tally: Tally | None = None, ended: bool = False) -> None:
        """Write this worker's record, which `distill status` reads."""
        if tally is not None:
            self.record |= {"images": tally.images, "samples": tally.samples, "label_s": round(tally.busy, 3)}
        self.record |= {"part": part, "ended": ended, "parts": self.parts, "lost": self.lost}
        self.record |= {"seconds": round(time.monotonic() - self.begun, 3)}
        self.meeting.keep(f"{RECORD}{self.name}", self.record)

    def leave(self, tally: Tally, *, finished: bool) -> None:
        """The last record. finished: the manifest is there, and records are gathered; then by one worker at a time."""
        self.give_up_wait_slot()
        with contextlib.suppress(OSError):  # a full disk is what many leave for, and has been told
            if not finished:
                self.tell(part="", tally=tally, ended=True)
                return
            with turn(self.meeting, LAST):
                self.tell(part="", tally=tally, ended=True)
                settle(self.meeting)


def _tar_of(sidecar: Path) -> dict[str, Any] | None:
    """The tar that a part's json describes: None for a part of no sample, {} where the json is missing or damaged."""
    try:
        tar: dict[str, Any] | None = read_json(sidecar)["tar"] if sidecar.is_file() else {}
    except (DamagedTableError, FileNotFoundError):  # or withdrawn by another at this moment
        tar = {}
    return tar


@dataclass(frozen=True, slots=True)
class MadePart:
    """A part that was labelled: its images and samples, and which images were quarantined (origin, key, reason)."""

    name: str
    images: int
    samples: int
    quarantine: tuple[dict[str, str], ...]


def work(shards: Sequence[InputShard], teachers: Teachers, **options: Any) -> LabelOutcome:
    """Label as one of any number of workers, until every part is finished, by whomever; as `by_parts`, at once."""
    steps = by_parts(shards, teachers, **options)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            outcome: LabelOutcome = end.value
            return outcome


def by_parts(
    shards: Sequence[InputShard],
    teachers: Teachers,
    *,
    out: str | Path,
    crops: CropSettings,
    labels: LabelSettings = DEFAULTS,
    seed: int = 0,
    device: torch.device = CPU,
    recipe: Mapping[str, Any] | None = None,
    machine: Mapping[str, Any] | None = None,
    report: Report | None = None,
    tell: Tell = lambda line: None,
    meeting: Meeting | None = None,
    poll_s: float = POLL_S,
) -> Generator[MadePart, None, LabelOutcome]:
    """Label as a worker, with a step for each part; see `label` for the arguments.

    A part is being finished while the next one is labelled. meeting: where the workers meet; by default `out`, which
    all of them must see then. poll_s: how often it looks for what others leave, in seconds. The outcome's `last` is
    True for the worker that wrote the manifest; it is not `complete` for those that left before it was written, for
    others had all that was left.

    Raises what `label` raises, RunLockedError where a run holds `out` alone; parts that are finished stay.
    """
    out, settings = Path(out), settings_of(teachers, crops, labels, seed=seed)
    make_folder(out, shards, teachers)
    refuse_run(out)
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    meeting = meeting or Folder(out)
    meeting.bring(SETTINGS)
    keep_settings(out, settings, tell=tell, suffix=f".{name[-6:]}")
    meeting.share(SETTINGS)
    keep_settings(out, settings, tell=tell)
    about = made_by(recipe, machine)
    end = partial(finish, out, shards, settings, about, licence=labels.licence, whole=meeting.whole, tell=tell)
    before = meeting.stamp()
    if before and _finish(meeting, end, fresh=False):
        there = sum(name.endswith(".tar") for name in meeting.finished())
        return LabelOutcome(complete=True, parts=0, skipped=there, images=0, samples=0, quarantined=0, bytes=0)
    board = Board(shards, part_sizes(shards, crops, labels), out, meeting, teachers, tell)
    worker = _Worker(board, meeting, name, iter(()), min(poll_s, meeting.lease_s / 4))
    worker.walk = board.walk(random.Random(name).randrange(len(shards)))
    worker.record = {"host": socket.gethostname(), "pid": os.getpid(), "device": device.type, "since": time.time()}
    tally = Tally(0, 0, report, shared=True)
    with thread_pools(max(1, labels.threads), device) as pools:
        job = Work(teachers, crops, labels, seed, device, (), pools.stopping)
        return (yield from _until_all_is_made(worker, pools, tally, job, end, before))


def _until_all_is_made(
    worker: _Worker, pools: ThreadPools, tally: Tally, work: Work, end: partial[bool], before: str
) -> Generator[MadePart, None, LabelOutcome]:
    """Label, and see to it that the manifest gets written; before: the meeting's stamp when this worker came."""
    meeting, finished = worker.meeting, False
    try:
        while True:
            yield from _label_all(worker, pools, tally, work)
            if (now := meeting.stamp()) and now != before:
                finished = True
                return _outcome(worker, tally, last=False)
            if worker.held:  # others have it, and there are enough who wait for them
                return _outcome(worker, tally, complete=False, last=False)
            written = _finish(meeting, end, fresh=True)
            if written:
                finished = True
                return _outcome(worker, tally, last=True)
            if written is False:
                worker.forget()
            elif not worker.may_wait(0):
                return _outcome(worker, tally, complete=False, last=False)
            time.sleep(worker.poll_s)
    finally:
        worker.leave(tally, finished=finished)


def _outcome(worker: _Worker, tally: Tally, *, last: bool, complete: bool = True) -> LabelOutcome:
    return LabelOutcome(
        complete=complete,
        parts=worker.parts,
        skipped=len(worker.board.places) - worker.parts,
        images=tally.images,
        samples=tally.samples,
        quarantined=tally.quarantined,
        bytes=tally.bytes,
        last=last,
    )


def _label_all(worker: _Worker, pools: ThreadPools, tally: Tally, work: Work) -> Iterator[MadePart]:
    """Label parts until none is left, by anybody."""
    alone = True
    while got := worker.next(pools):
        place, claim = got
        begun, before = time.monotonic(), (tally.images, tally.samples)
        try:
            if alone:  # now that our lease is there to be seen by a run that has begun meanwhile
                refuse_run(worker.board.out)
                alone = False
            part = worker.board.part(place)
            tally.total = sum(p.images for p in worker.board.places.values())
            tally.before = sum(p.images for n, p in worker.board.places.items() if n in worker.done) - tally.images
            worker.tell(part=place.name, tally=tally)
            asked = asked_about(part.shard, work.teachers)
            opened = label_part(worker.board.out, part, replace(work, asked=asked, claim=claim), tally, pools)
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
            pools.close(partial(worker.close, opened, place, claim))
        except BaseException:  # of the part before
            claim.release()
            with opened.writer:
                raise
        lines = tuple(line_of(one) for one in opened.quarantine)
        yield MadePart(place.name, tally.images - before[0], tally.samples - before[1], lines)


def _finish(meeting: Meeting, end: partial[bool], *, fresh: bool) -> bool | None:
    """Write the manifest if all is there; whether it is written, None where somebody else is at it."""
    claim, before = meeting.take(LAST), meeting.stamp()
    if claim is None:
        return None
    try:
        meeting.bring()
        if not end(fresh=fresh, suffix=claim.suffix):
            return False
        meeting.publish()
        settle(meeting)
        return True
    except OSError as error:
        # Whoever took over from one that slept has taken its file aside away, or a disk repeats a rename that was done.
        if error.errno != errno.ENOENT or meeting.stamp() in ("", before):
            raise
        return None
    finally:
        claim.release()
