"""`distill status`: a labelling run's state, from leases, notes and finished files; loads no teacher, stops nothing."""

from __future__ import annotations

from distill.app import build
from distill.app.commands import labels_place, worker_meeting
from distill.app.console import note, say, table
from distill.app.inputs import input_shards
from distill.app.recipe import Recipe
from distill.core.wording import counted
from distill.labelling.board import changed_since
from distill.labelling.meeting import SPENT
from distill.labelling.run_status import RunStatus, run_status

SHOWN = 20
"""The table has at least this many workers, if there are as many; all live workers are in it."""


def show(recipe: Recipe) -> int:
    """Prints how far the recipe's labels are; returns 0 if they are complete, else 1."""
    folder = build.labels_folder(recipe)
    try:
        images = input_shards(recipe)
    except OSError as error:  # such as on a laptop that can read the labels but not the images
        note(f"{error}; only images of finished parts, or in tars that a worker has scanned, are counted")
        images = []
    if not folder.is_dir() and not recipe.labels.meeting:
        say(f"{folder}: not started; distill label writes it")
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    meeting = worker_meeting(recipe, folder)
    status = run_status(meeting, folder, [shard.stem for shard in images])
    say(f"{labels_place(recipe, folder)}: {sentence(status)}")
    _show_workers(status)
    for part, count in status.deadly:
        note(f"  {part}: {count} workers were killed while labelling it, and it is still missing: see their logs")
    for holder in status.lost:
        note(f"  lost: {holder.name}, held by process {holder.pid} on {holder.host}, silent for {_time(holder.age)}")
    # A run without workers leaves no note of its images: nothing is known then.
    if status.complete and meeting.note(SPENT).get("inputs") and (changed := changed_since(meeting, images)):
        note(
            f"  {changed[0].origin}{f' and {len(changed) - 1} more' if changed[1:] else ''}: not as when it was "
            "labelled (images, size or time); distill label compares it and labels what is new"
        )
    return 0 if status.complete else 1


def _show_workers(status: RunStatus) -> None:
    order = ("running", "waiting", "lost", "gone", "ended")
    workers = sorted(status.workers, key=lambda worker: order.index(worker.state))
    shown = [worker for worker in workers if worker.state in order[:3]]
    shown = workers[: max(len(shown), SHOWN)]
    if shown:
        rows = [
            [
                worker.name,
                worker.state,
                worker.part or "-",
                _time(worker.part_s) if worker.part and worker.part_s else "-",
                str(worker.parts),
                f"{worker.images_per_s:.3g}",
                f"{worker.hours:.2f} {'h' if worker.device == 'cpu' else 'GPU-h'}",
                str(worker.lost),
            ]
            for worker in shown
        ]
        table("workers", ["worker", "state", "part", "since", "parts", "images/s", "spent", "taken away"], rows)
    if hidden := workers[len(shown) :]:
        hours = sum(worker.hours for worker in hidden)
        note(f"  and {counted(len(hidden), 'more worker')} that ended or were killed: {hours:.2f} h in total")


def sentence(now: RunStatus) -> str:
    """A run's state in one line."""
    about = "" if now.scanned else "about "
    words = [
        f"{now.done} of {about}{counted(now.parts, 'part')}, "
        f"{now.done_images:,} of {about}{counted(now.images, 'image')}",
        f"{len(now.running)} running",
        f"{len(now.lost)} lost",
        f"{now.images_per_s:.3g} images/s",
    ]
    if now.gpu_hours:
        words.append(f"{now.gpu_hours:.2f} GPU-hours")
    if now.complete:
        return "complete; " + ", ".join([words[0], *words[4:]])
    words.append("no worker is running" if now.eta_s is None else f"about {_time(now.eta_s)} left")
    return ", ".join(words)


def _time(seconds: float) -> str:
    hours, remainder = divmod(int(seconds), 3600)
    return f"{hours}:{remainder // 60:02d}:{remainder % 60:02d}"
