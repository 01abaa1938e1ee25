"""What a run of workers cost: their records while it lasts, one note of all records that stays beside the labels.

Not in the manifest, which is the same whoever made the labels. The record of a worker that was killed ends where
its last part began.
"""

from __future__ import annotations

from typing import Any

from distill.labelling.meeting import AGE, SPENT, Meeting

RECORD = "worker-"
"""How the names of workers' records begin; what follows is the worker's own name."""


def records(meeting: Meeting) -> dict[str, dict[str, Any]]:
    """The records of all workers by name, those of a run that is finished too; the latter have no AGE."""
    kept = meeting.note(SPENT).get("workers")
    return {**(kept if isinstance(kept, dict) else {}), **meeting.notes(RECORD)}


def settle(meeting: Meeting) -> None:
    """All is finished: the records become one note, leases and the other notes go.

    By one worker at a time, or one of two records that come at one moment may be lost. Can be repeated.
    """
    if found := records(meeting):
        plain = {name: {key: value for key, value in record.items() if key != AGE} for name, record in found.items()}
        meeting.keep(SPENT, {"workers": plain})
    meeting.tidy()
