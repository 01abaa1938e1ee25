"""`distill status`: what leases, notes and finished files say of a labelling run; loads no teacher, stops nothing."""

from __future__ import annotations

from distill.app import build
from distill.app.commands import meeting_of
from distill.app.console import note, say, table
from distill.app.inputs import input_shards
from distill.app.recipe import Recipe
from distill.labelling.standing import Standing, standing


def show(recipe: Recipe) -> int:
    """Prints where the recipe's labels stand; 0 where they are complete, else 1."""
    folder = build.labels_folder(recipe)
    try:
        stems = [shard.stem for shard in input_shards(recipe)]
    except OSError as error:  # a laptop that sees the labels and not the images
        note(f"{error}; the count of images is that of the tars which a worker has scanned")
        stems = []
    if not folder.is_dir() and not recipe.labels.meeting:
        say(f"{folder}: not begun; distill label writes it")
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    now = standing(meeting_of(recipe, folder), folder, stems)
    at = f"{recipe.labels.meeting.rstrip('/')}/{folder.name}" if recipe.labels.meeting else str(folder)
    say(f"{at}: {sentence(now)}")
    if now.workers:
        rows = [
            [
                worker.name,
                worker.state,
                worker.part or "-",
                _time(worker.part_s) if worker.part else "-",
                str(worker.parts),
                f"{worker.images_per_s:.3g}",
                f"{worker.hours:.2f} {'h' if worker.device == 'cpu' else 'GPU-h'}",
                str(worker.lost),
            ]
            for worker in now.workers
        ]
        table("workers", ["worker", "state", "part", "since", "parts", "images/s", "spent", "taken away"], rows)
    for holder in now.lost:
        note(f"  lost: {holder.name}, with {holder.pid} on {holder.host}, silent for {_time(holder.age)}")
    return 0 if now.complete else 1


def sentence(now: Standing) -> str:
    """A run in a line."""
    about = "" if now.scanned else "about "
    words = [
        f"{now.done} of {about}{now.parts} parts, {now.done_images:,} of {about}{now.images:,} images",
        f"{len(now.running)} running",
        f"{len(now.lost)} lost",
        f"{now.images_per_s:.3g} images/s",
    ]
    if now.gpu_hours:
        words.append(f"{now.gpu_hours:.2f} GPU-hours")
    if now.complete:
        return "complete; " + words[0]
    words.append("nobody works" if now.eta_s is None else f"about {_time(now.eta_s)} left")
    return ", ".join(words)


def _time(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
