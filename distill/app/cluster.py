"""`distill label --ray`: Ray actors, one per GPU, keep the teachers loaded; each call of an actor labels one part.

Leases (`labelling.worker`) decide which part a call labels, as without Ray, so that work is shared in one way and plain
workers may help. Ray provides the machines: it places the actors, adds nodes where it autoscales, and reports at once
when an actor dies; another one is then started wherever there is room, and the part is labelled again.
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
from distill.app.commands import label_by_parts, print_label_outcome, worker_meeting
from distill.app.console import note, progress, table
from distill.app.inputs import input_shards
from distill.app.recipe import USES, Recipe, as_given, parse, trusted
from distill.core.progress import Report
from distill.core.wording import counted, first_line
from distill.labelling.run import LabelOutcome
from distill.labelling.run_status import RunStatus, run_status
from distill.labelling.worker import MadePart

LOOK_S = 10.0
QUARANTINED = 20
"""At most this many quarantined images are logged while labelling; the manifest lists all of them."""


def resources(recipe: Recipe) -> dict[str, float]:
    """The Ray resources of one worker: a GPU, unless run.device is "cpu", and a core for each of labels.threads."""
    gpu = {} if recipe.run.device == "cpu" else {"num_gpus": 1.0}
    return {"num_cpus": float(max(1, recipe.labels.threads)), **gpu}


def slots(wanted: dict[str, float], nodes: list[dict[str, float]]) -> int:
    """How many workers the nodes have room for, at least one: Ray waits, or adds nodes, until that one fits."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    return max(1, sum(int(min(node.get(names[k], 0.0) // amount for k, amount in wanted.items())) for node in nodes))


class Labeller:
    """A Ray actor, whose teachers stay loaded from one part to the next."""

    def __init__(self, recipe: dict[str, Any], folder: str) -> None:
        from distill.app.console import quiet

        quiet()
        if Path(folder).is_dir():  # a recipe's relative paths start at the caller's folder
            os.chdir(folder)
        self.recipe = trusted(parse(recipe, where="the recipe", uses=USES["label"]))
        self.steps: Iterator[MadePart] | None = None

    def part(self) -> tuple[str, float, MadePart | None]:
        """Labels one part; returns its node, the seconds that it took, and the result, None if no part was left."""
        if self.steps is None:
            self.steps = label_by_parts(self.recipe)
        began = time.monotonic()
        result = next(self.steps, None)
        return f"{socket.gethostname()} {_node()}", time.monotonic() - began, result


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())[:8]


@dataclass(slots=True)
class _NodeStats:
    """What each node has done, counted when a call returns."""

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
        note(f"{counted(self.quarantined, 'image')} in quarantine; {counted(self.died, 'worker')} died")


def label_on(recipe: Recipe, address: str, *, look_s: float = LOOK_S) -> LabelOutcome:
    """Labels on the Ray cluster at `address`; "" for this machine's, which is started if there is none.

    The labels folder must be one that all nodes see, or labels.root an object store. Nodes that join later get workers
    too. Raises a worker's error if no worker is left, and ChildProcessError for a part that kills its workers.
    """
    import ray

    ray.init(address=address or None, ignore_reinit_error=True, log_to_driver=False)
    folder = build.labels_folder(recipe)
    stems = [shard.stem for shard in input_shards(recipe)]
    meeting = worker_meeting(recipe, folder)
    workers = _Workers(recipe)
    with progress("label") as report:
        while True:
            workers.fill()
            workers.look(look_s)
            status = None
            if workers.is_time(look_s) and (folder.is_dir() or recipe.labels.meeting):
                status = run_status(meeting, folder, stems)
                _report_status(report, status)
            if status is not None and status.deadly:
                workers.stop()
                part, count = status.deadly[0]
                raise ChildProcessError(
                    f"{part}: {count} workers were killed while labelling it; see their Ray logs, or label it alone"
                )
            if not workers.calls and (workers.failed or (status is not None and status.complete)):
                break
    workers.console.show()
    if status is None or not status.complete:
        assert workers.failed is not None
        raise workers.failed
    parts, images = sum(workers.console.parts.values()), sum(workers.console.images.values())
    outcome = LabelOutcome(complete=True, parts=parts, skipped=0, images=images, samples=0, quarantined=0, bytes=0)
    print_label_outcome(recipe, folder, outcome)
    return outcome


class _Workers:
    """The actors, and the running call of each."""

    def __init__(self, recipe: Recipe) -> None:
        import ray

        self.wanted, self.table = resources(recipe), as_given(recipe)
        self.make = ray.remote(**self.wanted)(Labeller)
        self.console = _NodeStats()
        self.calls: dict[Any, Any] = {}
        self.failed: Exception | None = None
        self.enough = False
        self.looked = 0.0

    def fill(self) -> None:
        """Starts as many actors as there is room for, unless all parts are taken."""
        import ray

        if self.failed is not None or (self.enough and self.calls):
            return
        self.enough = False
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for _ in range(slots(self.wanted, nodes) - len(self.calls)):
            actor = self.make.remote(self.table, str(Path.cwd()))
            self.calls[actor.part.remote()] = actor

    def look(self, seconds: float) -> None:
        """Waits for calls to return, and gives each actor that has labelled a part the next one."""
        import ray

        for call in ray.wait([*self.calls], timeout=seconds)[0]:
            actor = self.calls.pop(call)
            try:
                node, duration, result = ray.get(call)
            except ray.exceptions.RayTaskError as error:
                self.failed = error.as_instanceof_cause()
                note(f"a worker failed: {first_line(error.cause)}")
                continue
            except ray.exceptions.RayActorError:
                self.console.died += 1
                self.enough = False
                note("a worker died; another one will label its part")
                continue
            if result is None:
                self.enough = True
                continue
            self.console.take(node, duration, result)
            self.calls[actor.part.remote()] = actor

    def is_time(self, every_s: float) -> bool:
        """Whether to read the whole run's status, which takes a while: every `every_s` s while calls are running."""
        if self.calls and time.monotonic() - self.looked < every_s:
            return False
        self.looked = time.monotonic()
        return True

    def stop(self) -> None:
        """Kills all actors at once."""
        import ray

        for actor in self.calls.values():
            ray.kill(actor)


def _report_status(report: Report, now: RunStatus) -> None:
    hosts: dict[str, float] = {}
    for worker in now.workers:
        if worker.state == "running":
            hosts[worker.host] = hosts.get(worker.host, 0.0) + worker.images_per_s
    rates = {f"{host}_images_per_s": rate for host, rate in sorted(hosts.items())}
    eta = {} if now.eta_s is None else {"eta_s": now.eta_s}
    report(now.done_images, now.images, running=len(now.running), lost=len(now.lost), **rates, **eta)
