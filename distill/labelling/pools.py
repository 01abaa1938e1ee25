"""The thread pools of a labelling run: work that is done ahead, in order, beside the thread that asks the teachers."""

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
    """Yield work(item) for every item, in order, with at most `at_most` items submitted ahead."""
    futures: deque[Future[R]] = deque()
    for item in items:
        futures.append(pool.submit(work, item))
        if len(futures) > at_most:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _one_thread() -> None:
    """Initializer: worker threads compute on one core each, as many small operations on all cores would compete."""
    torch.get_num_threads()  # torch sets a new thread's number at its first use, overriding earlier limits
    threadpool_limits(1, user_api="openmp")


@dataclass(slots=True)
class ThreadPools:
    """The threads beside the one that asks: workers decode, cut and encode, a writer writes, a finisher finishes parts.

    A part is synced to disk while the next one is being labelled.
    """

    threads: int
    workers: ThreadPoolExecutor
    writer: ThreadPoolExecutor
    finisher: ThreadPoolExecutor
    closing: Future[None] | None = None
    stopping: Event = field(default_factory=Event)

    def close(self, finish: Callable[[], None]) -> None:
        """Submit `finish` for a part, after waiting for the previous part; raises what that one raised."""
        self.wait()
        self.closing = self.finisher.submit(finish)

    def wait(self) -> None:
        """Wait until no part is being finished."""
        closing, self.closing = self.closing, None
        if closing is not None:
            closing.result()


STOP_S = 1.5
"""Seconds that an interrupted run waits for a part that is being finished; after that the part is made again later."""


@contextmanager
def thread_pools(threads: int, device: torch.device) -> Iterator[ThreadPools]:
    """Pools with `threads` workers. On exit, waits for the part being finished; after an error, cancels pending work.

    device: where the teachers are. Beside a GPU the thread that asks computes on one core as well: sixteen would spin
    after each copy of a crop and take nine tenths of a processor from the workers; and the GPU renders the scenes. An
    interrupted run does not wait for its workers, because decoding a photograph takes seconds.
    """
    main_thread_limit = threadpool_limits(1, user_api="openmp") if device.type == "cuda" else nullcontext()
    with main_thread_limit, scenes.render_on(device):
        yield from _thread_pools(threads)


def _thread_pools(threads: int) -> Iterator[ThreadPools]:
    pools = (ThreadPoolExecutor(threads, initializer=_one_thread), ThreadPoolExecutor(1), ThreadPoolExecutor(1))
    bundle = ThreadPools(threads, *pools)
    try:
        yield bundle
        bundle.wait()
    except BaseException as error:
        bundle.stopping.set()  # workers check it between crops: an image of many crops takes seconds
        interrupted = isinstance(error, KeyboardInterrupt)
        for pool in pools:
            pool.shutdown(wait=not interrupted, cancel_futures=True)
        if bundle.closing is not None:
            wait([bundle.closing], STOP_S)
        raise
    for pool in pools:
        pool.shutdown()
