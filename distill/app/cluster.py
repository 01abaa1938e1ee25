"""`distill label --ray`: a Ray cluster starts the workers, one for each GPU, and starts them again where they die.

A worker is one Ray task, which keeps its teachers loaded and takes parts until none is left (`labelling.worker`): who
has which part is agreed by leases here too, so that there is one way of sharing work, with Ray and without. What Ray
gives is machines: it places the tasks, adds nodes where it scales, and runs a dead node's worker somewhere else.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distill.app import build
from distill.app.commands import meeting_of, run_label
from distill.app.console import note, progress
from distill.app.inputs import input_shards
from distill.app.recipe import USES, Recipe, as_table, parse
from distill.core.progress import Report
from distill.labelling.run import LabelOutcome
from distill.labelling.standing import Standing, standing

LOOK_S = 10.0


def resources(recipe: Recipe) -> dict[str, float]:
    """What one worker asks of its node: a GPU, unless run.device is "cpu", and a core for each of labels.threads."""
    gpu = {} if recipe.run.device == "cpu" else {"num_gpus": 1.0}
    return {"num_cpus": float(max(1, recipe.labels.threads)), **gpu}


def slots(wanted: dict[str, float], there: dict[str, float]) -> int:
    """How many workers the cluster has room for, at least one: Ray waits, or grows, until that fits."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    return max(1, int(min(there.get(names[key], 0.0) // amount for key, amount in wanted.items())))


def _work(table: dict[str, Any], folder: str) -> LabelOutcome:
    """One worker, on some node."""
    from distill.app.console import quiet

    quiet()
    if Path(folder).is_dir():  # a recipe's paths are from where it was called
        os.chdir(folder)
    return run_label(parse(table, where="the recipe", uses=USES["label"]), worker=True)


def label_on(recipe: Recipe, address: str, *, look_s: float = LOOK_S) -> LabelOutcome:
    """Label on the Ray cluster at `address`, "" for the one of this machine, which is started where there is none.

    The labels folder must be one that all nodes see, or labels.root an object store. Nodes that come later get workers
    too. Returns the outcome of the worker that finished last. Raises what a worker raises, where none is left.
    """
    import ray

    ray.init(address=address or None, ignore_reinit_error=True, log_to_driver=False)
    wanted = resources(recipe)
    task = ray.remote(max_retries=-1, **wanted)(_work)
    folder = build.labels_folder(recipe)
    stems = [shard.stem for shard in input_shards(recipe)]
    meeting = meeting_of(recipe, folder)
    pending: list[Any] = []
    outcome, failed, started = None, None, 0
    with progress("label") as report:
        while True:
            if outcome is None and (room := slots(wanted, ray.cluster_resources()) - len(pending)) > 0 and not failed:
                pending += [task.remote(as_table(recipe), str(Path.cwd())) for _ in range(room)]
                started += room
            done, pending = ray.wait(pending, timeout=look_s)
            for one in done:
                try:
                    outcome = ray.get(one)
                except ray.exceptions.RayTaskError as error:
                    failed = error.as_instanceof_cause()
                    note(f"a worker has failed: {str(error.cause).splitlines()[0]}")
            if folder.is_dir() or recipe.labels.meeting:
                _tell(report, standing(meeting, folder, stems))
            if not pending:
                break
    note(f"{started} workers were started on {len(ray.nodes())} nodes")
    if outcome is None and failed is not None:
        raise failed
    assert outcome is not None
    return outcome


def _tell(report: Report, now: Standing) -> None:
    hosts: dict[str, float] = {}
    for worker in now.workers:
        if worker.state == "running":
            hosts[worker.host] = hosts.get(worker.host, 0.0) + worker.images_per_s
    rates = {f"{host}_images_per_s": rate for host, rate in sorted(hosts.items())}
    eta = {} if now.eta_s is None else {"eta_s": now.eta_s}
    report(now.done_images, now.images, running=len(now.running), lost=len(now.lost), **rates, **eta)
