"""Many small trials in one forked process: counts each input's outcome, and continues after hangs and crashes."""

from __future__ import annotations

import json
import os
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.trial import trial

REPORTED = (ValueError, LookupError, OSError, ImportError, RecursionError, OverflowError, MemoryError)
"""Errors that the command line reports in a line; anything else is a traceback."""
BAD = ("traceback", "hang", "crash", "wrong")
MEMORY = 24 << 30  # of address space: torch maps several GB that it never touches


class WrongError(Exception):
    """An input was accepted, but with the wrong content."""


class _HungError(BaseException):
    pass


@dataclass
class Counts:
    """Outcomes of a part, and a line for each fault."""

    part: str
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, kind: str, what: str, said: str = "") -> None:
        """Count one outcome."""
        self.kinds[kind] += 1
        if kind in BAD:
            self.faults.append(f"{self.part}: {kind}: {what}: {said.strip()[-600:]}")


def sweep(counts: Counts, items: Sequence[tuple[str, Any]], judge: Callable[[Any], object], *, limit: int = 20) -> None:
    """Call `judge` on the item of each (name, item) in a child process, with `limit` seconds for each.

    judge: returns if the item is accepted, raises WrongError if it is accepted wrongly, and one of REPORTED if refused.
    """
    done = 0
    while done < len(items):
        outcome = trial(lambda start=done: _child(items[start:], judge, limit), limit=limit * 3.0 + 2 * len(items))
        outcomes = [json.loads(line[1:]) for line in outcome.said.splitlines() if line.startswith("@[")]
        for (name, _), (kind, said) in zip(items[done:], outcomes, strict=False):
            counts.add(kind, name, said)
        done += len(outcomes)
        if done < len(items) and outcome.rc != 0:
            counts.add("hang" if outcome.kind == "hang" else "crash", items[done][0], outcome.said)
            done += 1


def _child(items: Sequence[tuple[str, Any]], judge: Callable[[Any], object], limit: int) -> int:
    def hung(*_: object) -> None:
        raise _HungError

    signal.signal(signal.SIGALRM, hung)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    for _, item in items:
        signal.alarm(limit)
        kind, said = _judged(item, judge)
        signal.alarm(0)
        os.write(1, f"\n@{json.dumps([kind, said])}\n".encode())
    return 0


def _judged(item: Any, judge: Callable[[Any], object]) -> tuple[str, str]:
    try:
        judge(item)
        return "accepted", ""
    except WrongError as error:
        return "wrong", str(error)
    except _HungError:
        return "hang", ""
    except REPORTED as error:
        return ("told", "") if str(error) or isinstance(error, MemoryError) else ("traceback", repr(error))
    except Exception:  # noqa: BLE001, these are the faults to find
        return "traceback", traceback.format_exc()


def rounds(minutes: float, parts: Sequence[Iterator[object]]) -> None:
    """Take a step of each part in turn, until the minutes are over or all parts are exhausted."""
    import time

    end, alive = time.monotonic() + 60 * minutes, list(parts)
    while alive and time.monotonic() < end:
        for part in list(alive):
            if time.monotonic() >= end:
                break
            if next(part, None) is None:
                alive.remove(part)
