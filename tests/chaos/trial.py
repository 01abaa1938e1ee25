"""One trial: a command in a fork of this process, its exit code, and its output.

It is forked because a new process takes seconds to import torch, and there are thousands of trials; a child that hangs,
crashes or is killed does no harm.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HUNG = 124


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended. rc: its exit code, -N for a signal, HUNG if stopped after `limit`. said: its output."""

    rc: int
    said: str
    seconds: float

    @property
    def kind(self) -> str:
        """accepted, told (output and rc 1, 2 or 130), killed, hang, crash, or traceback."""
        if self.rc == HUNG:
            return "hang"
        if self.rc < 0:
            return "killed" if self.rc == -signal.SIGKILL else "crash"
        if "Traceback (most recent call last)" in self.said:
            return "traceback"
        if self.rc == 0:
            return "accepted"
        return "told" if self.rc in (1, 2, 130) and self.said.strip() else "traceback"


def trial(
    work: Callable[[], int], *, limit: float = 60.0, signal_after: float | None = None, number: int = signal.SIGKILL
) -> Outcome:
    """Run `work` in a child; signal_after: seconds until the child (SIGKILL: its whole group) gets signal `number`."""
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        sys.stderr.flush()
        ready, begins = os.pipe()
        child = os.fork()
        if child == 0:
            _child(work, output.fileno(), begins)
        os.close(begins)
        os.read(ready, 1)  # on a busy machine a signal could otherwise arrive before the child is ready
        os.close(ready)
        began = time.monotonic()
        # In parent and child, since either may run first.
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
        rc = _wait(child, began, limit, signal_after, number)
        seconds = time.monotonic() - began
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # the child's own children
        output.seek(0)
        return Outcome(rc, output.read().decode(errors="replace"), seconds)


def _child(work: Callable[[], int], said: int, begins: int) -> None:
    code = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(begins, b"!")
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 2
    except BaseException:  # noqa: BLE001, every error is reported
        os.write(2, traceback.format_exc().encode())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(child: int, began: float, limit: float, signal_after: float | None, number: int) -> int:
    sent = hung = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return HUNG if hung else os.waitstatus_to_exitcode(status)
        now = time.monotonic() - began
        if signal_after is not None and not sent and now >= signal_after:
            sent = True
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if number == signal.SIGKILL else os.kill)(child, number)
        if now > limit and not hung:
            hung = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.002)


def distill(*arguments: str | Path, folder: Path | None = None) -> Callable[[], int]:
    """The command line as `work` of a trial, in `folder`."""
    # Before the fork: an interrupt during these imports is the interpreter's, not the command's.
    from rich.console import Console

    from distill.app import console
    from distill.app.cli import main

    def work() -> int:
        # pytest's capture has replaced the streams with which the consoles were made.
        console._out, console._err = (
            Console(file=os.fdopen(os.dup(number), "w"), soft_wrap=True, width=160) for number in (1, 2)
        )
        if folder is not None:
            os.chdir(folder)
        return main([str(argument) for argument in arguments])

    return work
