"""How long work tells where it is."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    """`report(done, total, images_per_s=12.5)`: items finished, of how many, and numbers about them by name."""

    def __call__(self, done: int, total: int, **numbers: float) -> None:
        """Tell it."""
        ...
