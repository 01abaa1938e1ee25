"""`distill label --ray`: a Ray cluster keeps teachers loaded in actors, one for each GPU; each call of one is a part.

Which part a call labels is agreed by leases (`labelling.worker`), as without Ray, so that there is one way of sharing
work and plain workers may help. What Ray gives is machines: it places the actors, adds nodes where it scales, and tells
at once when one dies; then another actor is started wherever there is room, and the part is made again.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.app import build
from distill.app.commands import label_by_parts, meeting_of, tell_labels
from distill.app.console import note, progress, table
from distill.app.inputs import input_shards
from distill.app.recipe import USES, Recipe, as_table, parse, trusted
from distill.core.progress import Report
from distill.labelling.run import LabelOutcome
from distill.labelling.run_status import RunStatus, run_status
from distill.labelling.worker import MadePart

LOOK_S = 10.0
QUARANTINED = 20
"""So many lines about images in quarantine are told while labelling; the manifest has all of them."""


def resources(recipe: Recipe) -> dict[str, float]:
    """What one worker asks of its node: a GPU, unless run.device is "cpu", and a core for each of labels.threads."""
    gpu = {} if recipe.run.device == "cpu" else {"num_gpus": 1.0}
    return {"num_cpus": float(max(1, recipe.labels.threads)), **gpu}


def slots(wanted: dict[str, float], nodes: list[dict[str, float]]) -> int:
    """How many workers the nodes have room for, at least one: Ray waits, or grows, until that fits."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    return max(1, sum(int(min(node.get(names[k], 0.0) // amount for k, amount in wanted.items())) for node in nodes))


class Labeller:
    """An actor: its teachers stay loaded from one part to the next."""

    def __init__(self, recipe: dict[str, Any], folder: str) -> None:
        from distill.app.console import quiet

        quiet()
        if Path(folder).is_dir():  # a recipe's paths are from where it was called
            os.chdir(folder)
        self.recipe = trusted(parse(recipe, where="the recipe", uses=USES["label"]))
        self.steps: Iterator[MadePart] | None = None

    def part(self) -> tuple[str, float, MadePart | None]:
        """One part: its node, the seconds that it took, and what it came to; None where no more is left to take."""
        if self.steps is None:
            self.steps = label_by_parts(self.recipe)
        begun = time.monotonic()
        made = next(self.steps, None)
        return f"{socket.gethostname()} {_node()}", time.monotonic() - begun, made


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())[:8]


@dataclass(slots=True)
class _Console:
    """What all nodes did, as far as calls came back."""

    parts: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    quarantined: int = 0
    died: int = 0

    def take(self, node: str, seconds: float, made: MadePart) -> None:
        self.parts[node] += 1
        self.images[node] += made.images
        self.seconds[node] = self.seconds.get(node, 0.0) + seconds
        for line in made.quarantine[: max(0, QUARANTINED - self.quarantined)]:
            note(f"  quarantined {line['origin']}: {line['reason']}")
        self.quarantined += len(made.quarantine)

    def show(self) -> None:
        rows = [
            [
                node,
                str(self.parts[node]),
                str(self.images[node]),
                f"{self.images[node] / max(self.seconds[node], 1e-9):.3g}",
            ]
            for node in sorted(self.parts)
        ]
        table("nodes", ["node", "parts", "images", "images/s a worker"], rows)
        note(f"{self.quarantined} images in quarantine; {self.died} workers died")


def label_on(recipe: Recipe, address: str, *, look_s: float = LOOK_S) -> LabelOutcome:
    """Label on the Ray cluster at `address`, "" for the one of this machine, which is started where there is none.

    The labels folder must be one that all nodes see, or labels.root an object store. Nodes that come later get workers
    too. Raises what a worker raises, where none is left, and a ChildProcessError for a part that kills its workers.
    """
    import ray

    ray.init(address=address or None, ignore_reinit_error=True, log_to_driver=False)
    folder = build.labels_folder(recipe)
    stems = [shard.stem for shard in input_shards(recipe)]
    meeting = meeting_of(recipe, folder)
    crowd = _Crowd(recipe)
    with progress("label") as report:
        while True:
            crowd.fill()
            crowd.look(look_s)
            now = None
            if crowd.is_time(look_s) and (folder.is_dir() or recipe.labels.meeting):
                now = run_status(meeting, folder, stems)
                _tell(report, now)
            if now is not None and now.deadly:
                crowd.stop()
                part, count = now.deadly[0]
                raise ChildProcessError(
                    f"{part}: {count} workers were killed with it; see Ray's logs of them, or try it alone"
                )
            if not crowd.calls and (crowd.failed or (now is not None and now.complete)):
                break
    crowd.console.show()
    if now is None or not now.complete:
        assert crowd.failed is not None
        raise crowd.failed
    parts, images = sum(crowd.console.parts.values()), sum(crowd.console.images.values())
    outcome = LabelOutcome(complete=True, parts=parts, skipped=0, images=images, samples=0, quarantined=0, bytes=0)
    tell_labels(recipe, folder, outcome)
    return outcome


class _Crowd:
    """The actors, and the call of a part that each is at."""

    def __init__(self, recipe: Recipe) -> None:
        import ray

        self.wanted, self.table = resources(recipe), as_table(recipe)
        self.make = ray.remote(**self.wanted)(Labeller)
        self.console = _Console()
        self.calls: dict[Any, Any] = {}
        self.failed: Exception | None = None
        self.enough = False
        self.looked = 0.0

    def fill(self) -> None:
        """Start as many as there is room for, unless all parts are somebody's."""
        import ray

        if self.failed is not None or (self.enough and self.calls):
            return
        self.enough = False
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for _ in range(slots(self.wanted, nodes) - len(self.calls)):
            actor = self.make.remote(self.table, str(Path.cwd()))
            self.calls[actor.part.remote()] = actor

    def look(self, seconds: float) -> None:
        """Wait for calls, and have the next part made by whoever has made one."""
        import ray

        for one in ray.wait([*self.calls], timeout=seconds)[0]:
            actor = self.calls.pop(one)
            try:
                node, took, made = ray.get(one)
            except ray.exceptions.RayTaskError as error:
                self.failed = error.as_instanceof_cause()
                note(f"a worker has failed: {str(error.cause).splitlines()[0]}")
                continue
            except ray.exceptions.RayActorError:
                self.console.died += 1
                self.enough = False
                note("a worker has died; its part is made by another")
                continue
            if made is None:
                self.enough = True
                continue
            self.console.take(node, took, made)
            self.calls[actor.part.remote()] = actor

    def is_time(self, every_s: float) -> bool:
        """Whether to look at the whole run now; what all workers write down takes a while to read."""
        if self.calls and time.monotonic() - self.looked < every_s:
            return False
        self.looked = time.monotonic()
        return True

    def stop(self) -> None:
        """All at once."""
        import ray

        for actor in self.calls.values():
            ray.kill(actor)


def _tell(report: Report, now: RunStatus) -> None:
    hosts: dict[str, float] = {}
    for worker in now.workers:
        if worker.state == "running":
            hosts[worker.host] = hosts.get(worker.host, 0.0) + worker.images_per_s
    rates = {f"{host}_images_per_s": rate for host, rate in sorted(hosts.items())}
    eta = {} if now.eta_s is None else {"eta_s": now.eta_s}
    report(now.done_images, now.images, running=len(now.running), lost=len(now.lost), **rates, **eta)
