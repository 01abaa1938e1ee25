"""The threads of a labelling run: work that is done ahead, in order, beside the thread that asks the teachers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import Event
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

from distill.data import scenes

T = TypeVar("T")
R = TypeVar("R")


def ahead(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], at_most: int) -> Iterator[R]:
    """`work` of every item, in order, with at most `at_most` items begun before they are asked for."""
    begun: deque[Future[R]] = deque()
    for item in items:
        begun.append(pool.submit(work, item))
        if len(begun) > at_most:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _one_thread() -> None:
    """Worker threads compute on one core each: their many small operations, each on every core, would fight."""
    torch.get_num_threads()  # torch sets a new thread's number at its first use, over what was said before
    threadpool_limits(1, user_api="openmp")


@dataclass(slots=True)
class ThreadPools:
    """The threads beside the one that asks: workers decode, cut and encode, a writer writes, a finisher finishes parts.

    A part is synced to the disk while the next is being labelled.
    """

    threads: int
    workers: ThreadPoolExecutor
    writer: ThreadPoolExecutor
    finisher: ThreadPoolExecutor
    closing: Future[None] | None = None
    stopping: Event = field(default_factory=Event)

    def close(self, finish: Callable[[], None]) -> None:
        """Have a part finished by `finish`, after the one before it; raises what that one raised."""
        self.wait()
        self.closing = self.finisher.submit(finish)

    def wait(self) -> None:
        """Until no part is being finished."""
        closing, self.closing = self.closing, None
        if closing is not None:
            closing.result()


STOP_S = 1.5
"""So long a run that is interrupted waits for a part that is being finished; then it is made again."""


@contextmanager
def thread_pools(threads: int, device: torch.device) -> Iterator[ThreadPools]:
    """Pools with so many workers; it waits for what is being finished, or cancels the rest where something failed.

    device: where the teachers are. Beside a GPU the thread that asks computes on one core as well: sixteen would spin
    after each copy of a crop, and take from the workers nine tenths of a processor; and the GPU renders the scenes. An
    interrupted run does not wait for its workers: a photograph that is being decoded takes seconds.
    """
    alone = threadpool_limits(1, user_api="openmp") if device.type == "cuda" else nullcontext()
    with alone, scenes.render_on(device):
        yield from _thread_pools(threads)


def _thread_pools(threads: int) -> Iterator[ThreadPools]:
    pools = (ThreadPoolExecutor(threads, initializer=_one_thread), ThreadPoolExecutor(1), ThreadPoolExecutor(1))
    together = ThreadPools(threads, *pools)
    try:
        yield together
        together.wait()
    except BaseException as error:
        together.stopping.set()  # a worker asks for it between crops: an image of many takes seconds
        interrupted = isinstance(error, KeyboardInterrupt)
        for pool in pools:
            pool.shutdown(wait=not interrupted, cancel_futures=True)
        if together.closing is not None:
            wait([together.closing], STOP_S)
        raise
    for pool in pools:
        pool.shutdown()
