"""The trial of a faster backend (a kernel, a GPU renderer) before its first use; its caller has a slower fallback."""

from __future__ import annotations

from collections.abc import Callable

import torch


class DifferentResultError(RuntimeError):
    """The faster backend gives other results than its fallback."""


def failure(trial: Callable[[], object]) -> str:
    """Run the trial; returns why it failed, in one line, or "" if it succeeded.

    Raises only torch.OutOfMemoryError: with other work on the device a trial is inconclusive, and may be repeated.
    """
    try:
        trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:  # noqa: BLE001  a compiler or a driver may raise anything
        return " ".join(f"{type(fault).__name__}: {fault}".split())[:200]
    return ""
