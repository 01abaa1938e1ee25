"""Labelling workers under a cluster's failures: the labels must be byte for byte those of a single worker.

    python -m tests.chaos.workers [--kills 100] [--seed 0] [--workers 2] [--url s3://bucket/labels]

Two workers (or more) at a time label twelve tiny tars and are killed at random moments, or stopped for longer than
their lease and continued; leases are stolen and removed; clocks jump by an hour either way, in processes and in times
of lease files; the disk is sometimes full; renames are reported as done but lost, or done but reported as failed. With
--url they coordinate through an object store (AWS_ENDPOINT etc. select a local one), where answers of conditional puts
are lost and the network fails. A finished round is compared with a single worker's output, and the next begins, until
--kills workers were killed. It prints counts of the events, and exits with 1 if a byte differs.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from distill.core import files
from distill.data import sources
from distill.labelling import objects
from distill.labelling.board import Place
from distill.labelling.leases import NOTES, SUFFIX
from distill.labelling.meeting import Folder, Meeting
from distill.labelling.objects import Objects
from distill.labelling.settings import LabelSettings
from distill.labelling.worker import work
from distill.shards import shards
from distill.shards.shards import read_manifest, verify
from tests.labelling.formula import CROPS, Formula, contents, make_tar, run

LEASE_S = 1.0
TARS, PHOTOS = 12, 9


def meeting_at(url: str, out: Path) -> Meeting:
    return Objects(f"{url}/{out.name}", out, lease_s=LEASE_S) if url else Folder(out, lease_s=LEASE_S)


def images(root: Path) -> list[sources.InputShard]:
    return sources.tars(str(root / "sa_*.tar"))


# --- in the worker ----------------------------------------------------------------------------------------------------


def note(log: Path, what: str) -> None:
    with log.open("a") as file:
        file.write(f"{what}\n")


def break_network(rng: random.Random, log: Path) -> None:
    """As `break_things`, for the functions that access an object store."""
    plain_replace, plain_put = objects._Store.replace, objects._Store.put

    def unreachable() -> None:
        if rng.random() < 0.004:
            note(log, "networks that fail")
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    def put(self: objects._Store, name: str, data: bytes | Path) -> None:
        unreachable()
        plain_put(self, name, data)

    def replace(self: objects._Store, name: str, data: bytes, before: Mapping[str, Any] | None) -> dict[str, Any]:
        unreachable()
        result = plain_replace(self, name, data, before)
        if rng.random() < 0.03:
            note(log, "puts done and said to be refused")
            raise objects._Taken
        return result

    objects._Store.replace, objects._Store.put = replace, put  # type: ignore[method-assign]


def break_things(rng: random.Random, log: Path) -> None:
    """Replace functions that use clock and disk by ones that sometimes fail."""
    from filelock._soft import _lease

    count = partial(note, log)
    plain_time, plain_publish, plain_write = time.time, files.publish, shards._Hashing.write
    jump = [0.0]

    def jumping() -> float:
        if rng.random() < 0.02:
            jump[0] = rng.choice([-3600.0, 0.0, 3600.0])
            count("clock jumps")
        return plain_time() + jump[0]

    def touch(name: str, *, fd: int) -> None:
        now = jumping()
        os.utime(fd, (now, now))

    def publish(new: Path, path: Path) -> None:
        fate = rng.random()
        if fate < 0.02 and path.suffix in (".tar", ".json"):
            count("renames lost")
            return
        plain_publish(new, path)
        if fate > 0.98:
            count("renames done and said not to be")
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(new))

    def write(self: shards._Hashing, data: bytes) -> int:
        if rng.random() < 0.001:
            count("full disks")
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain_write(self, data)

    time.time, _lease.touch, files.publish = jumping, touch, publish
    shards._Hashing.write = write  # type: ignore[method-assign]


def one(root: str, out: str, url: str, seed: int) -> None:
    """The main function of a worker's process."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    folder = Path(out)
    log = Path(root) / "log"
    break_things(rng, log)
    break_network(rng, log)
    from distill.labelling import worker as module

    plain = module._Worker.close

    def close(self: module._Worker, opened: object, place: Place, claim: object) -> None:
        before = self.lost
        plain(self, opened, place, claim)  # type: ignore[arg-type]
        note(log, "leases noticed lost" if self.lost > before else f"made {place.name}")

    module._Worker.close = close  # type: ignore[method-assign]
    try:
        work(
            images(Path(root)),
            [("formula", Formula(wait=0.02))],
            out=folder,
            crops=CROPS,
            labels=LabelSettings(samples_per_part=3, threads=1),
            meeting=meeting_at(url, folder),
            poll_s=0.1,
        )
    except OSError as error:
        if not any(word in str(error) for word in ("No space left", "No such file", "Network is unreachable")):
            raise
        os._exit(3)  # the worker ends; its scheduler starts another


# --- in the parent ----------------------------------------------------------------------------------------------------


def steal(out: Path, rng: random.Random) -> str:
    """Take a lease from its holder: its file is removed, or becomes another machine's that never answers."""
    leases = list((out / NOTES).glob(f"*{SUFFIX}")) if (out / NOTES).is_dir() else []
    if not leases:
        return ""
    marker = rng.choice(leases)
    with contextlib.suppress(OSError):
        if rng.random() < 0.5:
            marker.unlink()
            return "leases removed"
        other = marker.with_name(f".{marker.name}.other")
        record = f"filelock/2\npid=7\nhost=elsewhere\nmode=lease\ntoken={rng.random()}\nduration={LEASE_S!r}\n"
        other.write_text(record)
        other.replace(marker)
        return "leases stolen"
    return ""


def steal_at(store: objects._Store, rng: random.Random) -> str:
    """As `steal`, at an object store."""
    leases = [name for name in store.names(NOTES) if name.endswith(f".tar{SUFFIX}")]
    if not leases:
        return ""
    name = f"{NOTES}/{rng.choice(leases)}"
    if rng.random() < 0.5:
        store.delete(name)
        return "leases removed"
    store.put(name, objects._record(f"{rng.random()}", 0))
    return "leases stolen"


class Chaos:
    """Rounds of labelling until enough workers were killed. url: the object store, or "" to coordinate by files."""

    def __init__(self, root: Path, workers: int, seed: int, url: str = "") -> None:
        self.root, self.workers, self.rng, self.url = root, workers, random.Random(seed), url
        self.counts: Counter[str] = Counter()
        self.context = multiprocessing.get_context("forkserver")
        preload = ["distill.labelling.worker", "tests.labelling.formula"]
        self.context.set_forkserver_preload([*preload, "distill.labelling.objects"])
        self.asleep: dict[int, float] = {}

    def start(self, out: Path) -> BaseProcess:
        arguments = (str(self.root), str(out), self.url, self.rng.randrange(1 << 30))
        process = self.context.Process(target=one, args=arguments)
        process.start()
        self.counts["workers started"] += 1
        return process

    def round(self, out: Path, kills: int) -> None:
        """Run workers until the folder is finished; no more are killed after `kills`."""
        alive: list[BaseProcess] = []
        place = meeting_at(self.url, out)
        while True:
            ended = [process for process in alive if process.exitcode is not None]
            alive = [process for process in alive if process.exitcode is None]
            for process in ended:
                process.join()
                self.counts[f"workers that ended with {process.exitcode}"] += process.exitcode not in (0, -9)
            if (finished := place.has("manifest.json")) and not alive:
                return self.bring(place)
            while len(alive) < self.workers and not finished:
                alive.append(self.start(out))
            time.sleep(self.rng.uniform(0.02, 0.3))
            now = time.monotonic()
            for pid in [pid for pid, until in self.asleep.items() if until < now]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                del self.asleep[pid]
            if self.counts["killed"] >= kills or not alive:
                continue
            victim, fate = self.rng.choice(alive), self.rng.random()
            if victim.pid is None or victim.exitcode is not None:
                continue
            if fate < 0.35:
                os.kill(victim.pid, signal.SIGKILL)
                self.counts["killed"] += 1
                self.asleep.pop(victim.pid, None)
            elif fate < 0.45 and victim.pid not in self.asleep:
                os.kill(victim.pid, signal.SIGSTOP)
                self.counts["put to sleep beyond their lease"] += 1
                self.asleep[victim.pid] = now + 2.5 * LEASE_S
            elif fate < 0.6 and (event := self.steal(place, out)):
                self.counts[event] += 1

    def steal(self, place: Meeting, out: Path) -> str:
        return steal_at(place._store, self.rng) if isinstance(place, Objects) else steal(out, self.rng)

    def bring(self, place: Meeting) -> None:
        """Download the output from the URL into the folder."""
        if isinstance(place, Objects):
            for name in place._store.names(""):
                stored = place._store.get(name)
                assert stored is not None
                (place.out / name).write_bytes(stored[0])

    def play(self, kills: int) -> bool:
        for number in range(TARS):
            make_tar(self.root / f"sa_{number}.tar", count=PHOTOS, first=PHOTOS * number, bad=(PHOTOS * number + 2,))
        run(images(self.root), self.root / "one", Formula(), crops_per_image=1, samples_per_part=3)
        whole, good = contents(self.root / "one"), True
        parts = len([name for name in whole if name.endswith(".json")]) - 2
        while self.counts["killed"] < kills and good:
            (self.root / "log").unlink(missing_ok=True)
            out = self.root / f"out{self.counts['rounds']}"
            self.round(out, kills)
            self.counts["rounds"] += 1
            lines = (self.root / "log").read_text().splitlines()
            made = Counter(line for line in lines if line.startswith("made "))
            self.counts.update(line for line in lines if not line.startswith("made "))
            self.counts["parts made again by another"] += sum(made.values()) - len(made)
            run(images(self.root), out, Formula(wait=9.0), crops_per_image=1, samples_per_part=3)  # finds nothing to do
            labels = contents(out)
            differ = sorted(name for name in {*labels, *whole} if labels.get(name) != whole.get(name))
            problems = verify(out)
            keys = read_manifest(out)["images"]["keys"]
            good = not differ and not problems and len(keys) == len(set(keys)) == TARS * (PHOTOS - 1)
            self.counts["parts compared"] += parts
            for line in [*(f"differs: {name}" for name in differ), *problems]:
                print(line)
        return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--url", default="")
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), args.workers, args.seed, args.url.rstrip("/"))
        good = chaos.play(args.kills)
    for event, count in sorted(chaos.counts.items()):
        if count:
            print(f"{count:6d}  {event}")
    print(f"{time.monotonic() - start:6.0f}  seconds; {'every byte is one worker’s' if good else 'BYTES DIFFER'}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
