"""How far a labelling run of many workers is, read from its leases and notes without stopping anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.labelling.board import part_name
from distill.labelling.leases import Holder
from distill.labelling.meeting import AGE, Meeting
from distill.labelling.worker_costs import records
from distill.shards.shards import MANIFEST, read_json

DEADLY = 3
"""So many workers that were killed with the same part are not an accident of their machines. Ours."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker: where it is, what it has (part, "" while it waits) and since when in seconds; its pace.

    state: "running", "waiting", "ended", "gone" (it was killed: without a lease, or it was taken over by another) or
    "lost" (it died with a lease). hours: of its device, since it began, as far as it gave signs of life. lost: parts
    that were taken from it. part: what it has, or had when it was killed.
    """

    name: str
    host: str
    device: str
    state: str
    part: str
    part_s: float
    parts: int
    images: int
    images_per_s: float
    hours: float
    lost: int


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A whole run. images: of all parts, an estimate where not every input tar was scanned yet (`scanned` False).

    eta_s: None where nobody works. lost: parts whose holder is dead, which others will take over. deadly: parts with
    which DEADLY workers or more were killed, and how many.
    """

    complete: bool
    parts: int
    done: int
    images: int
    done_images: int
    scanned: bool
    running: tuple[Holder, ...]
    lost: tuple[Holder, ...]
    workers: tuple[WorkerStatus, ...]
    eta_s: float | None
    deadly: tuple[tuple[str, int], ...] = ()

    @property
    def gpu_hours(self) -> float:
        """Of all workers on a GPU, those that are gone too."""
        return sum(worker.hours for worker in self.workers if worker.device != "cpu")

    @property
    def images_per_s(self) -> float:
        """Of those that run now."""
        return sum(worker.images_per_s for worker in self.workers if worker.state == "running")


def run_status(meeting: Meeting, out: Path, stems: Sequence[str]) -> RunStatus:
    """The run that meets at `meeting`. stems: of its input shards, as far as they can be named; the notes have others.

    Raises OSError where the meeting place cannot be reached.
    """
    there = meeting.finished()
    plans = {note["stem"]: note["images"] for note in meeting.notes("plan-").values() if "stem" in note}
    for stem in {*stems} - {*plans}:
        if f"{stem}-000.json" in there:  # made by a run that writes no notes
            first = _json(meeting, out, f"{stem}-000.json")
            full, of = len(first["images"]), first["of"]
            last = f"{stem}-{of - 1:03d}.json"
            rest = len(_json(meeting, out, last)["images"]) if last in there else full
            plans[stem] = [full] * (of - 1) + [rest]
    holders = [holder for holder in meeting.holders() if holder.name.endswith(".tar")]
    taken = {holder.name for holder in holders}
    finished: set[str] = set()
    done_images = 0
    for stem, counts in plans.items():
        for number, count in enumerate(counts):
            name = part_name(stem, number)
            if name in there or (name not in taken and f"{Path(name).stem}.json" in there):
                finished.add(name)
                done_images += count
    unknown = len({*stems} - {*plans})
    parts, images = (sum(map(len, plans.values())), sum(map(sum, plans.values())))
    if plans:
        parts += round(unknown * parts / len(plans))
        images += round(unknown * images / len(plans))
    workers = tuple(_worker(name, record, holders) for name, record in sorted(records(meeting).items()))
    killed = Counter(worker.part for worker in workers if worker.state in ("gone", "lost"))
    pace = sum(worker.images_per_s for worker in workers if worker.state == "running")
    lost = tuple(holder for holder in holders if holder.dead)
    complete = MANIFEST in there and len(finished) == parts and not holders
    return RunStatus(
        complete=complete,
        parts=parts,
        done=len(finished),
        images=images,
        done_images=done_images,
        scanned=not unknown,
        running=tuple(holder for holder in holders if not holder.dead),
        lost=lost,
        workers=workers,
        eta_s=(images - done_images) / pace if pace else None,
        deadly=tuple(
            (part, n) for part, n in killed.most_common() if part and n >= DEADLY and part not in there | finished
        ),
    )


def _json(meeting: Meeting, out: Path, name: str) -> dict[str, Any]:
    meeting.bring(name)
    return read_json(out / name)


def _worker(name: str, record: dict[str, Any], holders: Sequence[Holder]) -> WorkerStatus:
    mine = [holder for holder in holders if _is_of(holder, record)]
    since = record.get(AGE)  # its record is written when it begins a part, and again and again while it waits
    state, heard = "gone", 0.0
    if record["ended"]:
        state = "ended"
    elif since is None:  # of a run that is finished
        pass
    elif any(not holder.dead for holder in mine):
        state, heard = "running", since
    elif mine:
        state, heard = "lost", max(0.0, since - min(holder.age for holder in mine))
    elif not record["part"] and since < 60:
        state, heard = "waiting", since
    return WorkerStatus(
        name=name,
        host=record["host"],
        device=record["device"],
        state=state,
        part=record["part"],
        part_s=since or 0.0,
        parts=record["parts"],
        images=record.get("images", 0),
        images_per_s=record.get("images", 0) / record["label_s"] if record.get("label_s") else 0.0,
        hours=(record["seconds"] + heard) / 3600,
        lost=record["lost"],
    )


def _is_of(holder: Holder, record: dict[str, Any]) -> bool:
    return holder.pid == record["pid"] and holder.host.partition("?")[0] == record["host"]
