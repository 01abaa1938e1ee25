"""What a check-up says: one line per thing looked at, how bad it is, and the way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `what` states the fact with its numbers, `remedy` what to do; both are for people.

    subject: what it is about, for code: "teacher NAME", a key of the recipe.
    """

    level: Literal["ok", "warn", "bad"]
    what: str
    remedy: str = ""
    subject: str = ""
