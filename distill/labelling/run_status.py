"""The progress of a labelling run of many workers, read from its leases and notes without disturbing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.labelling.leases import Holder
from distill.labelling.manifest import part_name, sidecar_name
from distill.labelling.meeting import AGE, Meeting
from distill.labelling.worker_costs import records
from distill.shards.shards import MANIFEST, read_json

DEADLY = 3
"""This many workers that were killed with the same part point to the part, not to their machines. Ours."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker: its host, its part ("" while it waits), the seconds since it took that, and its pace.

    state: "running", "waiting", "ended", "gone" (it was killed: without a lease, or its lease was taken over) or "lost"
    (it died with a lease). hours: device time from its start to its last heartbeat. lost: number of parts that were
    taken from it. part: the one that it has, or had when it was killed.
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

    lost: parts whose holder is dead, which others will take over. deadly: parts
    with which DEADLY workers or more were killed, and their numbers.
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
    deadly: tuple[tuple[str, int], ...] = ()

    @property
    def gpu_hours(self) -> float:
        """Device hours of all workers on a GPU, including those that are gone."""
        return sum(worker.hours for worker in self.workers if worker.device != "cpu")

    @property
    def images_per_s(self) -> float:
        """The pace of all running workers."""
        return sum(worker.images_per_s for worker in self.workers if worker.state == "running")

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last image at this pace; None where no worker is running."""
        return (self.images - self.done_images) / self.images_per_s if self.images_per_s else None


def run_status(meeting: Meeting, out: Path, stems: Sequence[str]) -> RunStatus:
    """The status of the run at `meeting`. stems: of its input shards; where they are not known,
    those of the finished parts and of the notes count.

    Raises OSError where the meeting place cannot be reached.
    """
    written_files = meeting.finished()
    plans = {note["stem"]: note["images"] for note in meeting.notes("plan-").values() if "stem" in note}
    stems = stems or [name.removesuffix("-000.json") for name in written_files if name.endswith("-000.json")]
    for stem in {*stems} - {*plans}:
        if f"{stem}-000.json" in written_files:  # made by a run without workers, which writes no notes
            first = _json(meeting, out, f"{stem}-000.json")
            full, of = len(first["images"]), first["of"]
            last = sidecar_name(part_name(stem, of - 1))
            last_count = len(_json(meeting, out, last)["images"]) if last in written_files else full
            plans[stem] = [full] * (of - 1) + [last_count]
    holders = [holder for holder in meeting.holders() if holder.name.endswith(".tar")]
    leased = {holder.name for holder in holders}
    finished: set[str] = set()
    done_images = 0
    for stem, counts in plans.items():
        for number, count in enumerate(counts):
            name = part_name(stem, number)
            if name in written_files or (name not in leased and sidecar_name(name) in written_files):
                finished.add(name)
                done_images += count
    unknown = len({*stems} - {*plans})
    parts, images = (sum(map(len, plans.values())), sum(map(sum, plans.values())))
    if plans:
        parts += round(unknown * parts / len(plans))
        images += round(unknown * images / len(plans))
    workers = tuple(_worker(name, record, holders) for name, record in sorted(records(meeting).items()))
    killed = Counter(worker.part for worker in workers if worker.state in ("gone", "lost"))
    complete = MANIFEST in written_files and len(finished) == parts and not holders
    return RunStatus(
        complete=complete,
        parts=parts,
        done=len(finished),
        images=images,
        done_images=done_images,
        scanned=not unknown,
        running=tuple(holder for holder in holders if not holder.dead),
        lost=tuple(holder for holder in holders if holder.dead),
        workers=workers,
        deadly=tuple(
            (part, n)
            for part, n in killed.most_common()
            if part and n >= DEADLY and part not in written_files | finished
        ),
    )


def _json(meeting: Meeting, out: Path, name: str) -> dict[str, Any]:
    meeting.download(name)
    return read_json(out / name)


def _worker(name: str, record: dict[str, Any], holders: Sequence[Holder]) -> WorkerStatus:
    own_leases = [holder for holder in holders if _is_of(holder, record)]
    since = record.get(AGE)  # the record is written when it begins a part, and repeatedly while it waits
    state, alive_s = "gone", 0.0
    if record["ended"]:
        state = "ended"
    elif since is None:  # the run is finished
        pass
    elif any(not holder.dead for holder in own_leases):
        state, alive_s = "running", since
    elif own_leases:
        state, alive_s = "lost", max(0.0, since - min(holder.age for holder in own_leases))
    elif not record["part"] and since < 60:
        state, alive_s = "waiting", since
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
        hours=(record["seconds"] + alive_s) / 3600,
        lost=record["lost"],
    )


def _is_of(holder: Holder, record: dict[str, Any]) -> bool:
    return holder.pid == record["pid"] and holder.host.partition("?")[0] == record["host"]
