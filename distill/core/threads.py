"""How many threads torch computes with in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread an operation within, the former number behind it; also where it raises. Of the whole process.

    Where many small operations or many threads run beside each other, teams of threads gain little and, where the cores
    are busy, lose everything. It also fixes results: the mean of a map is another on more threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
