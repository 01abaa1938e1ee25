"""The cost of a run of workers: one record per worker while it lasts, then one note of all records beside the labels.

That note also has the fingerprints of the input shards (labelling.board), by which later workers see that none changed.

It is not in the manifest, which does not depend on who made the labels. The record of a killed worker ends where its
last part began.
"""

from __future__ import annotations

from typing import Any

from distill.labelling.meeting import AGE, SPENT, Meeting

RECORD = "worker-"
"""Prefix of the names of workers' records; the worker's own name follows."""


def records(meeting: Meeting) -> dict[str, dict[str, Any]]:
    """The records of all workers by name, also of a finished run; the latter have no AGE."""
    single = meeting.notes(RECORD)  # first: they are removed once the note of all is written
    stored = meeting.note(SPENT).get("workers")
    return {**(stored if isinstance(stored, dict) else {}), **single}


def settle(meeting: Meeting) -> None:
    """Merge the records of a finished run into one note, and remove leases and the other notes.

    One worker at a time must call it, or one of two simultaneous records may be lost. Can be repeated.
    """
    all_records, plans = records(meeting), meeting.notes("plan-").values()
    if all_records or plans:
        plain = {
            name: {key: value for key, value in record.items() if key != AGE} for name, record in all_records.items()
        }
        before = meeting.note(SPENT).get("inputs")
        inputs = before if isinstance(before, dict) else {}
        inputs |= {note["stem"]: note["input"] for note in plans if {"stem", "input"} <= {*note}}
        meeting.write_note(SPENT, {"workers": plain, "inputs": inputs})
    meeting.tidy()
