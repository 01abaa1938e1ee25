"""Commands that are killed at random moments and run again until they finish.

Their output must be byte for byte that of an uninterrupted run.

A part is a generator; each step is one such story. Kills are timed by the clock, so the same seed does not repeat a
story; the files left behind do.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

from distill.training.trainlog import WALL_CLOCK
from distill.training.trainlog import read as read_log
from tests.chaos.lab import Lab, contents
from tests.chaos.mutations import mutate
from tests.chaos.sweep import Counts
from tests.chaos.trial import Outcome, trial

KILLS = 6  # per story; after that it may finish
STOP_S = 3.0


def _story(
    counts: Counts, rng: Random, call: Callable[[float | None], Outcome], whole: float, compare: Callable[[], str]
) -> None:
    """Kill the command up to KILLS times, let it finish, and compare its output."""
    for _ in range(KILLS):
        outcome = call(rng.uniform(0.02, 1.2 * whole))
        if outcome.kind == "accepted":
            break
        counts.add(outcome.kind if outcome.kind != "told" else "traceback", "while it was killed", outcome.said)
    outcome = call(None)
    if outcome.kind != "accepted":
        counts.add("traceback" if outcome.kind == "told" else outcome.kind, "after the kills", outcome.said)
        return
    difference = compare()
    counts.add("wrong" if difference else "same", difference)


def _differ(now: dict[str, str], before: dict[str, str]) -> str:
    return ", ".join(sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name)))


def label(counts: Counts, rng: Random, lab: Lab) -> Iterator[int]:
    """Labelling from scratch."""
    began = time.monotonic()
    before, whole = _labels(lab), time.monotonic() - began
    while True:
        shutil.rmtree(lab.folder / "run", ignore_errors=True)
        _story(
            counts,
            rng,
            lambda after: lab.call("label", "r.toml", signal_after=after),
            whole,
            lambda: _differ(contents(lab.labels), before),
        )
        yield 1


def _labels(lab: Lab) -> dict[str, str]:
    shutil.rmtree(lab.folder / "run", ignore_errors=True)
    done = lab.call("label", "r.toml")
    assert done.rc == 0, done.said
    return contents(lab.labels)


def train(counts: Counts, rng: Random, lab: Lab) -> Iterator[int]:
    """Training from scratch: compares the student, and the log without wall-clock values."""
    _labels(lab)
    done = lab.call("train", "r.toml")
    assert done.rc == 0, done.said
    before = _trained(lab)
    while True:
        shutil.rmtree(lab.train, ignore_errors=True)
        call = lambda after: lab.call("train", "r.toml", signal_after=after)  # noqa: E731
        _story(counts, rng, call, done.seconds, lambda: _differ(_trained(lab), before))
        yield 1


def _trained(lab: Lab, *, checkpoints: bool = True) -> dict[str, str]:
    lines = [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in read_log(lab.train / "log.jsonl")]
    log = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    weights = [name for name in contents(lab.train) if name.endswith("safetensors")]
    kept = {name: contents(lab.train)[name] for name in weights if checkpoints or name.startswith("student")}
    return {**kept, "log.jsonl": log}


def stop(counts: Counts, rng: Random, lab: Lab) -> Iterator[int]:
    """Training that Ctrl-C stops several times, rc 130: compares the student and the log with an undisturbed run's."""
    _labels(lab)
    done = lab.call("train", "r.toml")
    assert done.rc == 0, done.said
    before = _trained(lab, checkpoints=False)
    while True:
        shutil.rmtree(lab.train, ignore_errors=True)
        for _ in range(KILLS):
            after = rng.uniform(0.1, done.seconds)
            outcome = lab.call("train", "r.toml", signal_after=after, number=signal.SIGINT)
            late = outcome.rc == 130 and outcome.seconds - after > STOP_S
            kind = "hang" if late else outcome.kind if outcome.kind in ("accepted", "told") else "traceback"
            saved = "is written" in outcome.said
            counts.add(kind, "with a checkpoint" if saved else "before or after the steps", outcome.said)
        outcome = lab.call("train", "r.toml")
        if outcome.rc:
            counts.add("traceback", "after the stops", outcome.said)
        difference = _differ(_trained(lab, checkpoints=False), before)
        counts.add("wrong" if difference else "same", difference)
        yield 1


def repair(counts: Counts, rng: Random, lab: Lab) -> Iterator[int]:
    """A repair of several damaged files of a labels folder, which is killed."""
    before, whole = _labels(lab), 1.0
    backup = lab.keep()
    while True:
        lab.back(backup)
        for path in rng.sample([path for path in sorted(lab.labels.iterdir()) if path.suffix != ".md"], 3):
            if rng.random() < 0.3:
                path.unlink()
            elif (bad := mutate(data := path.read_bytes(), rng)[1]).rstrip() != data:
                path.write_bytes(bad)  # white space behind a json is no damage

        def call(after: float | None) -> Outcome:
            # A folder without a manifest is unfinished; labelling finishes it.
            nonlocal whole
            done = lab.call("verify", lab.labels, "--repair", signal_after=after)
            whole = max(whole, done.seconds)
            if done.rc == 2 and "labelling has not finished there" in done.said:
                done = lab.call("label", "r.toml", signal_after=after)
                return lab.call("verify", lab.labels, "--repair", signal_after=after) if done.rc == 0 else done
            return done

        _story(counts, rng, call, whole, lambda: _differ(contents(lab.labels), before))
        yield 1


def predict(counts: Counts, rng: Random, lab: Lab) -> Iterator[int]:
    """Prediction of a folder of photographs."""
    out = lab.folder / "maps"
    arguments = ("predict", "photos", "--out", out, "--size", "32", "--formats", "npy", "png", "side")

    def left() -> dict[str, str]:
        return {name: digest for name, digest in contents(out).items() if not name.endswith(".jsonl")}

    done = lab.call(*arguments)
    assert done.rc == 0, done.said
    before = left()
    while True:
        shutil.rmtree(out, ignore_errors=True)
        call = lambda after: lab.call(*arguments, signal_after=after)  # noqa: E731
        _story(counts, rng, call, done.seconds, lambda: _differ(left(), before))
        yield 1


def fetch(counts: Counts, rng: Random, folder: Path) -> Iterator[int]:
    """A download from a host that is slow and drops connections."""
    from distill.eval.fetch import fetch as download

    data = rng.randbytes(3_000_000)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _host(data, rng))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path, url = folder / "a.tar", f"http://127.0.0.1:{server.server_port}/a.tar"

    def work() -> int:
        download(url, path, patience=0.01)
        return 0

    def compare() -> str:
        return "" if path.read_bytes() == data and not path.with_name("a.tar.part").exists() else "other bytes"

    while True:
        shutil.rmtree(folder, ignore_errors=True)
        _story(counts, rng, lambda after: trial(work, signal_after=after), 0.5, compare)
        yield 1


def _host(data: bytes, rng: Random) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested = self.headers.get("Range", "bytes=0-")
            start = int(requested.removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.send_header("ETag", '"a"')
            self.end_headers()
            end = len(data) if rng.random() < 0.7 else rng.randint(start, len(data))
            for at in range(start, end, 1 << 16):
                self.wfile.write(data[at : min(at + (1 << 16), end)])
                time.sleep(0.01)

        def log_message(self, *args: object) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                pass  # the client was killed

    return Handler


def interrupt(counts: Counts, rng: Random, lab: Lab) -> Iterator[int]:
    """Ctrl-C during labelling: one line, rc 130, within STOP_S."""
    _labels(lab)
    began = time.monotonic()
    _labels(lab)
    whole = time.monotonic() - began
    while True:
        shutil.rmtree(lab.folder / "run", ignore_errors=True)
        after = rng.uniform(0.1, whole)
        outcome = lab.call("label", "r.toml", signal_after=after, number=signal.SIGINT)
        late = outcome.seconds - after > STOP_S
        kind = "hang" if late else outcome.kind if outcome.kind in ("accepted", "told") else "traceback"
        counts.add(kind, f"{outcome.seconds - after:.1f} s after", outcome.said)
        yield 1
