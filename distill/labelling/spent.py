"""What a run of workers cost: their cards while it lasts, one note of all cards that stays beside the labels.

Not in the manifest, which is the same whoever made the labels. The card of a worker that was killed ends where its last
part began.
"""

from __future__ import annotations

from typing import Any

from distill.labelling.meeting import AGE, SPENT, Meeting

CARD = "worker-"
"""How the names of workers' cards begin; what follows is the worker's own name."""


def cards(meeting: Meeting) -> dict[str, dict[str, Any]]:
    """The cards of all workers by name, those of a run that is finished too; the latter have no AGE."""
    kept = meeting.note(SPENT).get("workers")
    return {**(kept if isinstance(kept, dict) else {}), **meeting.notes(CARD)}


def settle(meeting: Meeting) -> None:
    """All is finished: the cards become one note, leases and the other notes go.

    By one worker at a time, or of two cards that come at one moment one may be lost. Can be repeated where it stopped.
    """
    if found := cards(meeting):
        plain = {name: {key: value for key, value in card.items() if key != AGE} for name, card in found.items()}
        meeting.keep(SPENT, {"workers": plain})
    meeting.tidy()
