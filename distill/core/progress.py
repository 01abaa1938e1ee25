"""The progress callback of long-running work."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    """`report(done, total, images_per_s=12.5)`: items finished, items in total, and named numbers about them."""

    def __call__(self, done: int, total: int, **numbers: float) -> None:
        """Report progress."""
        ...
