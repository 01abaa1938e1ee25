"""A notice to stop, by Ctrl-C or a scheduler's SIGTERM: the run ends its step and writes a checkpoint before it obeys.

Its reading processes ignore both (training.loading): a terminal, and some schedulers, send them to every process.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_S = 2.0
"""Seconds within which another signal is the same notice: a launcher passes on what the terminal sent to all."""


class Stopped(KeyboardInterrupt):  # noqa: N818  (obeys a notice; not an error)
    """The run has ended before its last step because it, or another of its processes, was told to stop."""


class StopNotice:
    """Holds back SIGINT and SIGTERM for a block, which is to look at `given` and raise Stopped when it can.

    At the end of the block the signal is delivered, to whatever handled it before; an error of the block is raised in
    its place. One that comes SAME_S after the first is delivered at once. Outside the main thread, where Python handles
    no signals, it holds back nothing. tell: called with a message for the user when the first one comes.
    """

    def __init__(self, tell: Callable[[str], object] | None = None) -> None:
        self._tell = tell
        self._before: dict[int, Any] = {}
        self._number: int | None = None
        self._since = 0.0

    @property
    def given(self) -> bool:
        """Whether a signal has come."""
        return self._number is not None

    def __enter__(self) -> StopNotice:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):  # ignored: as nohup wants it
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        if self._number is not None and (kind is None or issubclass(kind, Stopped)):
            signal.raise_signal(self._number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number is None:
            self._number, self._since = number, time.monotonic()
            if self._tell:
                with contextlib.suppress(RuntimeError):  # the signal came while this process was writing a line
                    self._tell("stopping after this step and a checkpoint; once more: at once")
        elif time.monotonic() - self._since >= SAME_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
