"""Findings of a check-up: one line per item checked, its severity and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One checked item. `what` states the fact with its numbers, `remedy` what to do; both are for people.

    subject: the item, for code: "teacher NAME", or a key of the recipe.
    """

    level: Level
    what: str
    remedy: str = ""
    subject: str = ""
