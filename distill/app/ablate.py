"""Runs a study: labels once, then every cell (train, score, forget the weights), then tables, pictures and verdicts.

Any number of processes may run the same study, started here or by hand; each takes the next cell that nobody holds. A
killed study goes on where it was: a finished cell has its cell.json, a half-trained one resumes from its checkpoint.

    OUT/labels/HASH/  OUT/cells/HASH/{cell.json, train/log.jsonl, scores/, predictions/}
    OUT/NAME-VERSION/{study.json, table.md, index.html}
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from distill.app import build, commands
from distill.app.console import note, progress, say, table
from distill.app.shipped import locate
from distill.app.study import Column, Study, StudyCell, Version, cells, read_study
from distill.core import files
from distill.eval.reports.ablation import AblationRow, Table, markdown, write_page
from distill.eval.score import read_scores
from distill.eval.verdict import judge
from distill.labelling.lock import RunLockedError, run_lock
from distill.training import trainlog
from distill.training.step import TrainingStoppedError

POLL = 2.0
"""Seconds between looks at cells that other processes hold."""


def run_study(
    path: Path,
    *,
    version: Literal["full", "bench"] = "bench",
    out: Path = Path("runs/ablations"),
    processes: int = 1,
    overrides: Sequence[str] = (),
    worker: bool = False,
) -> Table | None:
    """Runs what is missing of the study `path` (a file, or a shipped one's name), writes its tables; None in a worker.

    processes: how many cells at once; on GPUs each process gets one of them. overrides: for every cell, as --set.
    Raises ValueError or OSError for a recipe or data that cannot be used; a training that diverges is a result.
    """
    path = locate(path, "study")
    study = read_study(path)
    every = cells(study, path, version, out, overrides)
    for cell in {build.labels_folder(cell.recipe): cell for cell in every}.values():
        if not cell.recipe.labels.online:
            _label(cell)
    if processes > 1 and not worker:
        _with_workers(every, path, version, out, processes, overrides)
    else:
        _work(every)
    if worker:
        return None
    result = collect(study, version, every)
    folder = out / f"{study.name}-{version}"
    files.write_json(folder / "study.json", result.as_dict(), allow_nan=True)
    files.write_text(folder / "table.md", markdown(result))
    write_page(result, folder / "index.html")
    _show(result)
    say(f"study: {(folder / 'index.html').resolve()}")
    return result


# --- cells ------------------------------------------------------------------------------------------------------------


def _label(cell: StudyCell) -> None:
    folder = build.labels_folder(cell.recipe)
    while not (folder / "manifest.json").is_file():
        try:
            commands.run_label(cell.recipe)
        except RunLockedError:
            time.sleep(POLL)


def _with_workers(
    every: Sequence[StudyCell], path: Path, version: str, out: Path, processes: int, overrides: Sequence[str]
) -> None:
    """Starts the workers and shows how many cells are done."""
    command = [
        sys.executable,
        "-m",
        "distill",
        "ablate",
        str(path),
        "--version",
        version,
        "--out",
        str(out),
        "--worker",
    ]
    for assignment in overrides:
        command += ["--set", assignment]
    gpus = torch.cuda.device_count()
    running: list[subprocess.Popen[bytes]] = []
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as logs, progress(f"ablate {path.stem}") as report:
        try:
            for i in range(processes):
                log = logs.enter_context((out / f"worker-{i}.log").open("wb"))
                done_cells = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
                if gpus:
                    done_cells["CUDA_VISIBLE_DEVICES"] = str(i % gpus)
                running.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **done_cells})
                )
            while any(one.poll() is None for one in running):
                report(sum(is_done(cell) for cell in every), len(every))
                time.sleep(POLL)
        finally:
            for one in running:
                one.terminate()
            for one in running:
                one.wait()
    failed = [i for i, one in enumerate(running) if one.returncode]
    if failed:
        log_file = out / f"worker-{failed[0]}.log"
        last = log_file.read_text(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"worker {failed[0]} stopped: {' '.join(last)} (all it said is in {log_file})")


def is_done(cell: StudyCell) -> bool:
    """Whether the cell has its result."""
    return (cell.folder / "cell.json").is_file()


def _work(every: Sequence[StudyCell]) -> None:
    """Runs cells until none is left that nobody holds, then waits for the others'."""
    while True:
        held = False
        for cell in every:
            if is_done(cell):
                continue
            cell.folder.mkdir(parents=True, exist_ok=True)
            try:
                with run_lock(cell.folder, rank=0, world=1):
                    if not is_done(cell):
                        _run(cell)
            except RunLockedError:
                held = True
        if not held:
            return
        time.sleep(POLL)


def _run(cell: StudyCell) -> None:
    note(f"{cell.recipe.run.name} ({cell.folder})")
    began, failed = time.monotonic(), ""
    try:
        commands.run_train(cell.recipe)
        commands.run_score(cell.recipe)
    except TrainingStoppedError as error:
        failed = str(error)
    # The numbers, the log and the predictions stay; the weights of sixty students would fill a disk.
    shutil.rmtree(cell.folder / "train" / "checkpoints", ignore_errors=True)
    shutil.rmtree(cell.folder / "train" / "student", ignore_errors=True)
    result_record = {"row": cell.row, "seed": cell.seed, "failed": failed, "seconds": time.monotonic() - began}
    files.write_json(cell.folder / "cell.json", result_record | {"made_by": commands.commit()}, indent=None)


# --- what came out ----------------------------------------------------------------------------------------------------


def _value(cell: StudyCell, column: Column) -> float | None:
    path = cell.folder / "scores" / f"{column.benchmark}--student.json"
    if not path.is_file():
        return None
    score = read_scores(path)
    means = score.groups.get(column.group, {}).get("metrics", {}) if column.group else score.metrics
    value = means.get(column.metric)
    return None if value is None or not math.isfinite(value) else value


def collect(study: Study, version: Literal["full", "bench"], every: Sequence[StudyCell]) -> Table:
    """The study's table from the cells that are done; a cell without a value leaves its place empty."""
    chosen: Version = study.full if version == "full" else study.bench
    columns = chosen.columns
    published = {p.row: p.values for p in study.paper}
    rows = []
    for row in study.all_rows():
        done_cells = [cell for cell in every if cell.row == row.name and is_done(cell)]
        values = {cell.seed: [_value(cell, column) for column in columns] for cell in done_cells}
        failures = [json.loads((cell.folder / "cell.json").read_text())["failed"] for cell in done_cells]
        curves = {cell.seed: _curves(cell) for cell in done_cells}
        rows.append(
            AblationRow(
                row.name,
                values,
                published.get(row.name, ()),
                [f for f in failures if f],
                curves,
                [c.folder for c in done_cells],
            )
        )
    whole = {row.name: {seed: v for seed, v in row.means().items() if v is not None} for row in rows}
    paper = {row.name: {0: sum(row.paper) / len(row.paper)} for row in rows if row.paper}
    verdicts = []
    for o in study.orderings:
        ours = judge(o.kind, o.first, o.second, whole, tolerance=o.tolerance)
        theirs = judge(o.kind, o.first, o.second, paper, tolerance=o.tolerance)
        verdicts.append((o.claim, o.source or study.source, ours, theirs))
    recipes = [cell.recipe for cell in every[:1]]
    return Table(
        name=f"{study.name}-{version}",
        title=study.title,
        source=study.source,
        columns=[column.title for column in columns],
        paper_columns=[column.title for column in study.full.columns],
        rows=rows,
        verdicts=verdicts,
        benchmarks=[(b.alias_or_name, b.name, b.root, b.list) for recipe in recipes for b in recipe.benchmarks],
        made_by=commands.commit(),
    )


def _curves(cell: StudyCell) -> dict[str, list[tuple[int, float]]]:
    """Loss and the output's deviation, relative to the labels', by step."""
    steps = [line for line in trainlog.read(cell.folder / "train" / "log.jsonl") if "loss" in line]
    series: dict[str, list[tuple[int, float]]] = {"loss": [], "scale": []}
    for line in steps:
        if line["loss"] is not None:
            series["loss"].append((line["step"], line["loss"]))
        if line["output_deviation"] is not None and line["label_deviation"]:
            series["scale"].append((line["step"], line["output_deviation"] / line["label_deviation"]))
    return series


def _show(result: Table) -> None:
    head, *body = result.text()
    table(result.title, head, body)
    lines: list[list[Any]] = [[claim, ours.word, result.margin(ours)] for claim, _, ours, _ in result.verdicts]
    if lines:
        table("orderings", ["claim", "here", "margin"], lines)
