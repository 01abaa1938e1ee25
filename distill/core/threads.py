"""The number of threads that torch computes with in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run the block with one torch thread per operation, process-wide; the former number is always restored.

    With many small operations or many concurrent threads, multithreaded operations gain little, and on busy cores they
    are much slower. One thread also fixes results: the mean of a map differs with more threads.
    """
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
