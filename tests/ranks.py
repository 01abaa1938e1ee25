"""Runs calls in separate processes at once, for example the gloo ranks of one run."""

from __future__ import annotations

import faulthandler
import socket
from collections.abc import Callable
from multiprocessing.context import BaseContext

PATIENCE = 120.0  # seconds until processes count as hung: they print their tracebacks and are killed


def ranks_of_two(machines: int = 1) -> list[dict[str, str]]:
    """accelerate's environment of two gloo processes, both on one machine or one on each of two."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = str(free_socket.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    local = {"LOCAL_WORLD_SIZE": str(2 // machines)}
    return [{**world, **local, "RANK": r, "LOCAL_RANK": r if machines == 1 else "0"} for r in ("0", "1")]


def _call(function: Callable, *arguments: object) -> None:
    faulthandler.dump_traceback_later(PATIENCE - 10)
    function(*arguments)
    faulthandler.cancel_dump_traceback_later()


def ended_as(calls: list[tuple], processes: BaseContext) -> list[int | None]:
    """Exit codes of the calls (function, *arguments), each in a separate process, all at once.

    `processes` is the fixture: forks of this process would inherit locks held by its threads (pytest-xdist's, for
    example) and wait for them forever, once in hundreds of runs.
    """
    started = [processes.Process(target=_call, args=call) for call in calls]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=PATIENCE)
    exit_codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return exit_codes
