"""How well 1 to 512 labelling workers share 11 million images: a simulation of `distill label --worker`'s rules.

    python -m tests.speed.many_workers [--photos-per-s 44 4.4] [--workers 1 8 64 128 256 512] [--fine-tail 1 4]

SA-1B: 1000 tars of 11,186 photos, parts of 1000. A worker is killed after 2 h on average (exponential), losing its
unfinished part, and another machine starts 5 minutes later. The rules are the code's: where a worker begins, which part
it takes next, how it watches leases, when it waits and leaves. Efficiency is the time spent on finished parts divided
by the time that machines are held, from their start (loading the teachers) until they leave. Metadata operations on the
disk are counted as in the code: two for a lease's heartbeat, four to try a held one, twenty for a part begun and
finished, one per hundred names of a listing.

Measured: 44 photos/s is Depth Anything V2 Large on an H100 (docs/results.md, 256 maps/s of 5.8 a photo); the number of
maps of a part is drawn from the crop plans of PLANNED photos of 1500 x 2250, by the real planning code; a scan of such
a tar takes 2.9 s of processor. Assumed: 4.4 photos/s for a diffusion teacher, speeds of machines that differ by 10 %
and of one machine from part to part by 5 % (one sigma), 30 s to start, 60 s for the manifest, 0.1 s to read another
worker's record of a scan.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from distill.core.crop_settings import CropSettings
from distill.core.crops import plan
from distill.labelling.leases import BEATS, LEASE_S
from distill.labelling.run import TAIL
from distill.labelling.worker import GLANCED, LISTED_S, MISSES, POLL_S, SPARE, WATCHED

TARS, PHOTOS, PER_PART, PLANNED = 1000, 11_186, 1000, 20_000
SCAN_S, NOTE_S, START_S, MANIFEST_S = 2.9, 0.1, 30.0, 60.0
LIFE_S, AWAY_S = 7200.0, 300.0
OPS = {"beat": 2, "try": 4, "part": 20, "look": 1}


@functools.cache
def maps_per_photo() -> list[int]:
    plans = (plan(1500, 2250, CropSettings(), key=f"sa_{i}") for i in range(PLANNED))
    return [1 + len(crop_plan.patches) for crop_plan in plans]


@dataclass(slots=True)
class Part:
    tar: int
    images: int
    state: int = 0  # 0 free, 1 leased, 2 finished
    when: float = 0.0  # time at which it was finished
    claim: int = 0
    ended: float = -1.0  # time at which its holder died


@dataclass(slots=True)
class Worker:
    number: int
    speed: float
    born: float
    dies: float
    walk: Iterator[int]
    scanned: set[int] = field(default_factory=set)
    held: dict[int, tuple[int, float]] = field(default_factory=dict)
    misses: int = 0
    listed: float = -LISTED_S
    waits: bool = False


class Run:
    """One simulated run with a number of workers, event by event."""

    def __init__(self, workers: int, photos_per_s: float, fine_tail: int, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.rate, self.now, self.ops, self.paid, self.lost, self.beats = photos_per_s, 0.0, 0.0, 0.0, 0, 0.0
        self.useful, self.waiting, self.maps = 0.0, 0, maps_per_photo()
        self.noted: set[int] = set()
        self.parts: list[Part] = []
        for tar in range(TARS):
            size = PER_PART // fine_tail if tar >= TARS - TARS // TAIL else PER_PART
            self.parts += [Part(tar, min(size, PHOTOS - at)) for at in range(0, PHOTOS, size)]
        self.of_tar: list[list[int]] = [[] for _ in range(TARS)]
        for i, part in enumerate(self.parts):
            self.of_tar[part.tar].append(i)
        self.left = len(self.parts)
        self.seen_done = 0
        self.events: list[tuple[float, int, partial[None]]] = []
        self.order = 0
        self.alive: dict[int, Worker] = {}
        self.workers, self.end = workers, 0.0
        for _ in range(workers):
            self.at(0.0, partial(self.start, self.random.gauss(1.0, 0.1)))

    def at(self, when: float, what: partial[None]) -> None:
        self.order += 1
        heapq.heappush(self.events, (when, self.order, what))

    def start(self, speed: float) -> None:
        if not self.left:
            return
        self.order += 1
        life = self.random.expovariate(1 / LIFE_S)
        begin = self.random.randrange(TARS)
        worker = Worker(self.order, max(0.5, speed), self.now, self.now + life, self.walk(begin))
        self.alive[worker.number] = worker
        self.at(worker.dies, partial(self.die, worker))
        self.at(self.now + START_S, partial(self.next, worker))

    def walk(self, begin: int) -> Iterator[int]:
        short = []
        for tar in (*range(begin, TARS), *range(begin)):
            for i in self.of_tar[tar]:
                if self.parts[i].images < PER_PART:
                    short.append(i)
                else:
                    yield i
        yield from sorted(short, key=lambda i: -self.parts[i].images)

    def die(self, worker: Worker) -> None:
        if self.alive.pop(worker.number, None) is None:
            return
        self.leave(worker)
        for part in self.parts:
            if part.state == 1 and part.claim == worker.number:
                part.ended, self.lost = self.now, self.lost + 1
        self.at(self.now + AWAY_S, partial(self.start, worker.speed))

    def leave(self, worker: Worker) -> None:
        self.paid += self.now - worker.born
        self.beats += (self.now - worker.born) * BEATS / LEASE_S * OPS["beat"]
        self.alive.pop(worker.number, None)
        self.waiting -= worker.waits
        worker.waits = False

    def take(self, worker: Worker, i: int) -> bool:
        """As `_Worker._try`: looks, then tries the lease, whose age counts from when this worker first saw it."""
        part = self.parts[i]
        self.ops += OPS["look"]
        if part.state == 2:
            worker.held.pop(i, None)
            return False
        self.ops += OPS["try"]
        if part.state == 1:
            claim, since = worker.held.pop(i, (0, 0.0))
            if claim != part.claim:
                claim, since = part.claim, self.now
            worker.held[i] = (claim, since)
            if part.ended < 0 or self.now - max(since, part.ended) < LEASE_S:
                return False
            worker.held.pop(i)
        part.state, part.claim, part.ended = 1, worker.number, -1.0
        return True

    def next(self, worker: Worker) -> None:
        if worker.number not in self.alive:
            return
        for i in list(worker.held)[: WATCHED if worker.waits else GLANCED]:
            if self.take(worker, i):
                return self.label(worker, i)
        for i in worker.walk:
            if self.parts[i].state == 2 and self.parts[i].when <= worker.listed:
                continue
            if self.take(worker, i):
                worker.misses = 0
                return self.label(worker, i)
            worker.misses += 1
            if worker.misses >= MISSES and self.now - worker.listed >= LISTED_S:
                self.list_all(worker)
        self.list_all(worker)
        missing = [i for i in range(len(self.parts)) if self.parts[i].state < 2] if self.left else []
        if not missing:
            return self.finish(worker)
        self.random.shuffle(missing)
        worker.held = {i: worker.held.get(i, (0, 0.0)) for i in missing}
        self.waiting -= worker.waits
        dead = sum(0 <= self.parts[i].ended < self.now - LEASE_S for i in missing)
        worker.waits = self.waiting < 1 + len(missing) // SPARE + dead
        self.waiting += worker.waits
        if not worker.waits:
            return self.leave(worker)
        self.at(self.now + POLL_S, partial(self.next, worker))
        return None

    def list_all(self, worker: Worker) -> None:
        self.ops += 2 * len(self.parts) / 100
        worker.listed = self.now

    def label(self, worker: Worker, i: int) -> None:
        part, scan = self.parts[i], 0.0
        self.waiting -= worker.waits
        worker.waits = False
        if part.tar not in worker.scanned:
            worker.scanned.add(part.tar)
            scan = NOTE_S if part.tar in self.noted else SCAN_S
            self.noted.add(part.tar)
        work = sum(self.random.choices(self.maps, k=part.images)) / statistics.fmean(self.maps)
        seconds = work / self.rate / worker.speed * max(0.5, self.random.gauss(1.0, 0.05))
        self.at(self.now + scan + seconds, partial(self.done, worker, i, seconds))

    def done(self, worker: Worker, i: int, seconds: float) -> None:
        if worker.number not in self.alive:
            return
        self.parts[i].state, self.parts[i].when = 2, self.now
        self.useful += seconds
        self.left -= 1
        self.ops += OPS["part"]
        self.next(worker)

    def finish(self, worker: Worker) -> None:
        if not self.end:
            self.end = self.now + MANIFEST_S
            self.paid += MANIFEST_S
        self.leave(worker)

    def play(self) -> None:
        while self.events and (self.left or self.alive):
            self.now, _, event = heapq.heappop(self.events)
            event()

    def row(self) -> list[str]:
        traffic = (self.ops + self.beats) / self.end
        return [
            f"{self.workers}",
            f"{self.end / 3600:.2f}",
            f"{self.paid / 3600:.1f}",
            f"{100 * self.useful / self.paid:.1f} %",
            f"{self.lost}",
            f"{self.beats / self.end:.1f}",
            f"{traffic:.0f}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos-per-s", type=float, nargs="+", default=[44.0, 4.4])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64, 128, 256, 512])
    parser.add_argument("--fine-tail", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    maps = maps_per_photo()
    mean, spread = statistics.fmean(maps), statistics.pstdev(maps)
    print(f"maps a photo: {mean:.2f} +- {spread:.2f}; of a part of {PER_PART}: +- {spread / mean / PER_PART**0.5:.2%}")
    print("photos/s  fine_tail  workers  hours  machine-hours  efficiency  parts lost  beats/s  metadata ops/s")
    for rate in args.photos_per_s:
        for fine in args.fine_tail:
            for workers in args.workers:
                run = Run(workers, rate, fine)
                run.play()
                print(f"{rate:8g}  {fine:9d}  " + "  ".join(f"{cell:>8s}" for cell in run.row()), flush=True)


if __name__ == "__main__":
    main()
