"""One of any number of workers: it takes parts one by one, and may join and leave at any moment.

A worker owns a part by a lease (labelling.leases). A part is written to a partial file named after the claim and
renamed, and its bytes are the same whoever makes it, so two workers that both believe to own it do no harm. Full parts
are taken first and short ones last, so that all workers finish at about the same time. Of the workers that find no more
parts, a few wait, to take over what others abandon; one of them writes the manifest.
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
from distill.labelling.board import Board, Place, changed_since, withdraw
from distill.labelling.jobs import Teachers, asked_about
from distill.labelling.leases import Claim, LeaseLostError
from distill.labelling.lock import RunLockedError, refuse_run
from distill.labelling.manifest import finish, keep_settings, settings_of
from distill.labelling.meeting import LAST, Folder, Meeting, turn
from distill.labelling.parts import Tell, line_of
from distill.labelling.pools import ThreadPools, thread_pools
from distill.labelling.run import (
    LabelOutcome,
    OpenPart,
    PartSettings,
    Tally,
    label_part,
    made_by,
    make_folder,
    part_sizes,
)
from distill.labelling.settings import DEFAULTS, LabelSettings
from distill.labelling.worker_costs import RECORD, settle
from distill.shards.shards import SETTINGS, DamagedTableError, read_json

WAIT, SPARE = "wait", 8
"""A worker that waits for others' parts holds a lease wait-N: there is one, plus one for each SPARE missing parts and
for each whose holder is dead. Other workers leave: waiting machines cost as much as working ones."""
POLL_S, LISTED_S = 10.0, 60.0
"""Seconds between two checks of a waiting worker, and at least between two listings by a working one."""
MISSES = 16  # after this many parts in a row that others have or finished, listing is cheaper than trying further
WATCHED, GLANCED = 8, 2
"""Number of other workers' parts that a waiting worker tries at each check, and a working one before each part."""


@dataclass(slots=True)
class _Worker:
    """A worker's state: the parts that it knows to be done, and those that others held when it tried them."""

    board: Board
    meeting: Meeting
    name: str
    walk: Iterator[Place]
    poll_s: float
    joined: str  # the meeting's stamp when this worker joined
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
        """The next part to label; None where none is left. Waits for other workers' parts if few others wait."""
        while True:
            for place in list(self.held.values())[:GLANCED]:
                self.held.pop(place.name)  # tried in turn: back at the end if it is still held
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
        pools.wait()  # for our own part that is being finished, which would look missing
        while self._parts_are_missing():
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
        """Whether this worker is one of the few that wait while `missing` parts are missing."""
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
        """Release the lease of waiting."""
        if self.wait_slot is not None:
            self.wait_slot[1].release()
            self.wait_slot = None

    def _parts_are_missing(self) -> bool:
        """Whether parts are missing; sets `held` to those, in a random order."""
        written = self._note_finished()
        missing = [place for name, place in self.board.places.items() if name not in self.done]
        # Only a json: a part whose images are all in quarantine, or one whose writer is between its two files.
        for place in [p for p in missing if p.sidecar in written]:
            if self._is_empty(place):
                self.done.add(place.name)
        held_before = {name: place for name, place in self.held.items() if name not in self.done}
        others = [place for place in missing if place.name not in self.done and place.name not in held_before]
        random.shuffle(others)
        self.held = held_before | {place.name: place for place in others}
        return bool(self.held)

    def _note_finished(self) -> set[str]:
        """Add the finished names to `done`, by one listing of the meeting place; returns them."""
        names = self.meeting.finished()
        self.listed = time.monotonic()
        self.done |= names
        return names

    def manifest_is_new(self) -> bool:
        """Whether a manifest was written since this worker joined."""
        return self.meeting.stamp() not in ("", self.joined)

    def _is_empty(self, place: Place) -> bool:
        return self._tar_of(place) is None

    def _tar_of(self, place: Place) -> dict[str, Any] | None:
        """The tar that a part's json describes: None for a part of no samples, {} for a missing or damaged json."""
        self.meeting.download(place.sidecar)
        with contextlib.suppress(DamagedTableError, FileNotFoundError):  # or withdrawn by another worker meanwhile
            tar: dict[str, Any] | None = read_json(self.board.out / place.sidecar)["tar"]
            return tar
        return {}

    def _try(self, place: Place) -> Claim | None:
        """The part's lease, if no worker holds it and the part is not finished."""
        if self._is_finished(place):
            self._mark_done(place)
            return None
        claim = self.meeting.take(place.name)
        if claim is None:
            self.held.setdefault(place.name, place)
            return None
        try:
            if not self._is_finished(place):
                self.meeting.begin(place.name, claim)
                # A slow holder may have finished before `begin`, but cannot afterwards.
                if not self._is_finished(place):
                    self.held.pop(place.name, None)
                    return claim
        except BaseException:
            claim.release()
            raise
        claim.release()
        self._mark_done(place)
        return None

    def _is_finished(self, place: Place) -> bool:
        return self.meeting.has(place.name) or (self.meeting.has(place.sidecar) and self._is_empty(place))

    def _mark_done(self, place: Place) -> None:
        self.done.add(place.name)
        self.held.pop(place.name, None)

    def close(self, opened: OpenPart, place: Place, claim: Claim) -> None:
        """Finish a part and release its claim; a part that was lost meanwhile is left to its new holder."""
        try:
            try:
                opened.finish()
            except OSError as error:
                # A network disk that repeats a rename whose answer was lost also reports this for a completed one.
                if error.errno != errno.ENOENT:
                    raise
                if not self._is_finished(place):
                    raise LeaseLostError(f"{place.name}: another worker removed its partial file") from None
            self.meeting.deliver(place.name, claim)
            self.parts += 1
            self.done.add(place.name)
        except LeaseLostError:
            self.lose(place)
        finally:
            claim.release()

    def lose(self, place: Place) -> None:
        """Record that another worker has taken over a part of ours."""
        self.lost += 1
        self.held[place.name] = place

    def forget(self) -> None:
        """Withdraw parts that were thought finished but are broken, so that they are made again."""
        for place in self.board.places.values():
            if self._is_broken(place):
                self.done.discard(place.name)
                withdraw(self.meeting, place.name, partial(self._is_broken, place))

    def _is_broken(self, place: Place) -> bool:
        tar = self._tar_of(place)
        return tar is not None and (not tar or not self.meeting.whole(self.board.out, tar))

    def tell(self, *, part: str, tally: Tally | None = None, ended: bool = False) -> None:
        """Write this worker's record, which `distill status` reads."""
        if tally is not None:
            self.record |= {"images": tally.images, "samples": tally.samples, "label_s": round(tally.busy, 3)}
        self.record |= {"part": part, "ended": ended, "parts": self.parts, "lost": self.lost}
        self.record |= {"seconds": round(time.monotonic() - self.begun, 3)}
        self.meeting.write_note(f"{RECORD}{self.name}", self.record)

    def leave(self, tally: Tally, *, finished: bool) -> None:
        """Write the last record. finished: the manifest exists, so records are merged, by one worker at a time."""
        self.give_up_wait_slot()
        with contextlib.suppress(OSError):  # workers often leave because of a full disk, which was reported
            if not finished:
                self.tell(part="", tally=tally, ended=True)
                return
            with turn(self.meeting, LAST):
                self.tell(part="", tally=tally, ended=True)
                settle(self.meeting)


@dataclass(frozen=True, slots=True)
class MadePart:
    """A part that was labelled: its images and samples, and which images were quarantined (origin, key, reason)."""

    name: str
    images: int
    samples: int
    quarantine: tuple[dict[str, str], ...]


def work(shards: Sequence[InputShard], teachers: Teachers, **options: Any) -> LabelOutcome:
    """Label as one of any number of workers, until all workers together finish every part; exhausts `work_by_parts`."""
    steps = work_by_parts(shards, teachers, **options)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            outcome: LabelOutcome = end.value
            return outcome


def work_by_parts(
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
    """Label as a worker, yielding after each part; see `label` for the arguments.

    A part is finished while the next one is labelled. meeting: where the workers meet; by default `out`, which all of
    them must see then. poll_s: seconds between checks for parts that others abandon. The outcome's `last` is True for
    the worker that wrote the manifest; `complete` is False for workers that left before it was written, because others
    held all remaining parts.

    Raises what `label` raises, RunLockedError where a run holds `out` alone; finished parts stay.
    """
    out, settings = Path(out), settings_of(teachers, crops, labels, seed=seed)
    make_folder(out, shards, teachers)
    refuse_run(out)
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    (meeting := meeting or Folder(out)).download(SETTINGS)
    keep_settings(out, settings, tell=tell, suffix=f".{name[-6:]}")
    meeting.publish_file(SETTINGS)
    keep_settings(out, settings, tell=tell)
    about = made_by(recipe, machine)
    end = partial(finish, out, shards, settings, about, licence=labels.licence, whole=meeting.whole, tell=tell)
    before = meeting.stamp()
    if before and not changed_since(meeting, shards) and _finish(out, meeting, end):
        made_before = sum(name.endswith(".tar") for name in meeting.finished())
        return LabelOutcome(complete=True, parts=0, skipped=made_before, images=0, samples=0, quarantined=0, bytes=0)
    board = Board(shards, part_sizes(shards, crops, labels), out, meeting, teachers, tell)
    worker = _Worker(board, meeting, name, iter(()), min(poll_s, meeting.lease_s / 4), before)
    worker.walk = board.walk(random.Random(name).randrange(len(shards)))
    worker.record = {"host": socket.gethostname(), "pid": os.getpid(), "device": device.type, "since": time.time()}
    tally = Tally(0, 0, report, shared=True)
    with thread_pools(max(1, labels.threads), device) as pools:
        job = PartSettings(teachers, crops, labels, seed, device, (), pools.stopping)
        return (yield from _run_until_done(worker, pools, tally, job, end))


def _run_until_done(
    worker: _Worker, pools: ThreadPools, tally: Tally, work: PartSettings, end: partial[bool]
) -> Generator[MadePart, None, LabelOutcome]:
    """Label until the manifest is written or others hold the rest."""
    finished = False
    try:
        while True:
            yield from _label_all(worker, pools, tally, work)
            if worker.manifest_is_new():
                finished = True
                return _outcome(worker, tally, last=False)
            if worker.held:  # others hold the rest, and enough workers wait for them
                return _outcome(worker, tally, complete=False, last=False)
            written = _finish(worker.board.out, worker.meeting, end, joined=worker.joined)
            if written:
                finished = True
                return _outcome(worker, tally, last=True)
            if written is False:
                worker.forget()
            elif not worker.manifest_is_new() and not worker.may_wait(0):
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


def _label_all(worker: _Worker, pools: ThreadPools, tally: Tally, work: PartSettings) -> Iterator[MadePart]:
    """Label parts until no worker finds another one."""
    while taken := worker.next(pools):
        place, claim = taken
        begun, before = time.monotonic(), (tally.images, tally.samples)
        try:
            # At each part: a run that starts now sees our lease, but one may have started while we had none.
            refuse_run(worker.board.out)
            part = worker.board.part(place)
            tally.total = worker.board.num_images
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
            opened.submit(pools, partial(worker.close, opened, place, claim))
        except BaseException:  # an error of the previous part
            claim.release()
            raise
        lines = tuple(line_of(rejected) for rejected in opened.quarantine)
        yield MadePart(place.name, tally.images - before[0], tally.samples - before[1], lines)


def _finish(out: Path, meeting: Meeting, end: partial[bool], *, joined: str | None = None) -> bool | None:
    """Write the manifest if every part is finished; whether it is written, None where another worker or a run does.

    joined: the meeting's stamp when this worker joined; without it, a manifest that is right is not written again.
    """
    claim, before = meeting.take(LAST), meeting.stamp()
    if claim is None:
        return None
    try:
        if joined is not None and before not in ("", joined):  # written between our last look and our lease
            return None
        refuse_run(out)
        meeting.download()
        if not end(fresh=joined is not None, suffix=claim.suffix):
            return False
        meeting.publish(claim)
        settle(meeting)
        return True
    except (LeaseLostError, RunLockedError):
        return None
    except OSError as error:
        # A worker that took over has removed our partial file, or a disk repeated a rename that was done.
        if error.errno != errno.ENOENT or meeting.stamp() in ("", before):
            raise
        return None
    finally:
        claim.release()
