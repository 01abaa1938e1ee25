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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from distill.app import build, commands
from distill.app.console import note, progress, say, table
from distill.app.recipe import Recipe
from distill.app.shipped import locate
from distill.app.study import Column, Study, StudyCell, Version, cells, read_study
from distill.core import files
from distill.data import scenes
from distill.eval.labels import LabelQuality, label_quality
from distill.eval.reports.ablation import CLAIM_HEAD, AblationRow, Claim, Table, markdown, together, write_page
from distill.eval.score import read_scores
from distill.eval.verdict import UNDECIDED, UNKNOWN, holm, judge, paper_effect
from distill.labelling.lock import RunLockedError, run_lock
from distill.shards.shards import MANIFEST, LabelDataset
from distill.training import trainlog
from distill.training.step import TrainingStoppedError

POLL = 2.0
"""Seconds between looks at cells that other processes hold."""


def run_studies(
    paths: Sequence[Path],
    *,
    version: Literal["full", "bench"] = "bench",
    out: Path = Path("runs/ablations"),
    processes: int = 1,
    overrides: Sequence[str] = (),
    worker: bool = False,
    collect_only: bool = False,
) -> list[Table]:
    """Runs what is missing of the studies (files, or shipped ones' names), writes their tables; none in a worker.

    Cells go seed by seed through all studies. processes: how many cells at once; on GPUs each process gets one of them.
    overrides: for every cell, as --set. collect_only: the tables of what is done; nothing runs.
    Raises ValueError or OSError for a recipe or data that cannot be used; a training that diverges is a result.
    """
    paths = [locate(path, "study") for path in paths]
    studies = [(study, cells(study, path, version, out, overrides)) for path in paths for study in [read_study(path)]]
    every = list({cell.folder: cell for _, own in studies for cell in own}.values())
    if processes > 1 and not (worker or collect_only):
        _with_workers(every, paths, version, out, processes, overrides)
    elif not collect_only:
        with scenes.cached_views():  # every cell is scored on the same ones
            if worker:  # all seeds at once, or all workers would wait for the one that labels the first
                _label_all(every)
            _work(every)
    if worker:
        return []
    results = []
    for study, own in studies:
        result = collect(study, version, own)
        folder = out / f"{study.name}-{version}"
        files.write_json(folder / "study.json", result.as_dict(), allow_nan=True)
        files.write_text(folder / "table.md", markdown(result))
        write_page(result, folder / "index.html")
        _show(result)
        say(f"study: {(folder / 'index.html').resolve()}")
        results.append(result)
    if len(results) > 1:
        say(together(results))
    return results


# --- cells ------------------------------------------------------------------------------------------------------------


def _label_all(every: Sequence[StudyCell]) -> None:
    """Labels what these cells learn from, once each; what other processes are labelling is waited for last."""
    wanted = {build.labels_folder(cell.recipe): cell.recipe for cell in every if not cell.recipe.labels.online}
    while wanted := {folder: recipe for folder, recipe in wanted.items() if not (folder / MANIFEST).is_file()}:
        if not any([_labelled(recipe) for recipe in wanted.values()]):
            time.sleep(POLL)


def _labelled(recipe: Recipe) -> bool:
    """Labels what a recipe learns from, unless another process does."""
    try:
        commands.run_label(recipe)
    except RunLockedError:
        return False
    return True


def _with_workers(
    every: Sequence[StudyCell], paths: Sequence[Path], version: str, out: Path, processes: int, overrides: Sequence[str]
) -> None:
    """Starts the workers and shows how many cells are done."""
    command = [
        sys.executable,
        "-m",
        "distill",
        "ablate",
        *map(str, paths),
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
    with contextlib.ExitStack() as logs, progress(f"ablate {', '.join(path.stem for path in paths)}") as report:
        try:
            for i in range(processes):
                log = logs.enter_context((out / f"worker-{i}.log").open("wb"))
                environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
                if gpus:
                    environment["CUDA_VISIBLE_DEVICES"] = str(i % gpus)
                running.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment})
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
    """Runs cells, seed by seed, until none is left that nobody holds, then waits for the others'."""
    seeds = list(dict.fromkeys(cell.seed for cell in every))
    while True:
        held = False
        for seed in seeds:
            own = [cell for cell in every if cell.seed == seed and not is_done(cell)]
            _label_all(own)
            held = sum([_take(cell) for cell in own]) < len(own) or held
        if not held:
            return
        time.sleep(POLL)


def _take(cell: StudyCell) -> bool:
    """Runs a cell that nobody holds, and says whether it is done."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    try:
        with run_lock(cell.folder, rank=0, world=1):
            if not is_done(cell):
                _run(cell)
    except RunLockedError:
        return False
    return True


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


Shown = tuple[float | None, np.ndarray]
"""A cell's number in a column, None where it has none, and the numbers (n,) float64 of the images that it is a mean of,
in the order of the benchmark; of a number of the log itself alone."""


def _shown(cell: StudyCell, column: Column) -> Shown:
    if column.log:
        value = trainlog.number(cell.folder / "train" / "log.jsonl", column.log, relative=bool(column.relative_to))
        return value, np.array([] if value is None else [value], dtype=np.float64)
    paths = [cell.folder / "scores" / f"{name}.json" for name in column.scores]
    score = next((read_scores(path) for path in paths if path.is_file()), None)
    if score is None:
        return None, np.array([])
    means = score.groups.get(column.group, {}).get("metrics", {}) if column.group else score.metrics
    value = means.get(column.metric)
    inside = [image for image in score.images if not column.group or image.group == column.group]
    each = np.array([image.metrics[column.metric] for image in inside if image.metrics], dtype=np.float64)
    return (None if value is None or not math.isfinite(value) else value), each


def collect(study: Study, version: Literal["full", "bench"], every: Sequence[StudyCell]) -> Table:
    """The study's table from the cells that are done; a cell without a value leaves its place empty."""
    chosen: Version = study.full if version == "full" else study.bench
    columns = chosen.columns
    published = {p.row: p.values for p in study.paper}
    rows, images = [], {one: dict[str, dict[int, Any]]() for one in dict.fromkeys(c.measure for c in columns)}
    for row in study.all_rows():
        done_cells = [cell for cell in every if cell.row == row.name and is_done(cell)]
        values: dict[int, list[float | None]] = {}
        for cell in done_cells:
            shown = [_shown(cell, column) for column in columns]
            values[cell.seed] = [value for value, _ in shown]
            for measure, by_row in images.items():
                own = [one for one, column in zip(shown, columns, strict=True) if column.measure == measure]
                if all(value is not None for value, _ in own):
                    by_row.setdefault(row.name, {})[cell.seed] = [each for _, each in own]
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
    recipes = [cell.recipe for cell in every[:1]]
    return Table(
        name=f"{study.name}-{version}",
        title=study.title,
        source=study.source,
        columns=[column.title for column in columns],
        lower_is_better=[column.lower_is_better for column in columns],
        paper_columns=[column.title for column in study.full.columns],
        rows=rows,
        claims=_claims(study, images, columns),
        labels=_label_quality(every),
        equivalence=study.equivalence,
        benchmarks=[(b.alias_or_name, b.name, b.root, b.list) for recipe in recipes for b in recipe.benchmarks],
        made_by=commands.commit(),
    )


def _claims(study: Study, images: Mapping[str, Any], columns: Sequence[Column]) -> list[Claim]:
    """Every claim in every metric that it is about; the paper's effect stands by the metric that its own columns
    show.
    """
    paper = {p.row: sum(p.values) / len(p.values) for p in study.paper}
    printed = {column.measure for column in study.full.columns[: len(study.paper[0].values)]} if study.paper else set()
    found = []
    lower = {column.measure: column.lower_is_better for column in columns}
    for metric, values in images.items():
        for o in study.orderings:
            if o.metrics and metric not in o.metrics:
                continue
            ours = judge(
                o.kind,
                o.first,
                o.second,
                values,
                lower_is_better=lower[metric],
                equivalence=study.equivalence,
                bound=o.bound,
            )
            theirs = paper_effect(o.kind, o.first, o.second, paper, ours.pair) if printed == {metric} else None
            found.append((o, metric, ours, theirs))
    # What is undecided has not been claimed, whatever its p.
    lasting = holm([ours.p for *_, ours, _ in found])
    return [
        Claim(
            o.claim,
            o.source or study.source,
            metric,
            ours,
            theirs,
            last and ours.word not in (UNDECIDED, UNKNOWN),
            bool(o.bound),
        )
        for (o, metric, ours, theirs), last in zip(found, lasting, strict=True)
    ]


def _label_quality(every: Sequence[StudyCell]) -> list[tuple[str, LabelQuality]]:
    """How good the labels of the first seed are, for every choice of teachers and the rows that learn from it."""
    first = [cell for cell in every if cell.seed == every[0].seed]
    rows: dict[Path, list[StudyCell]] = {}
    for cell in first:
        rows.setdefault(build.labels_folder(cell.recipe), []).append(cell)
    found = []
    for folder, own in rows.items():
        if not (folder / MANIFEST).is_file() or not own[0].recipe.benchmarks:
            continue
        protocol = build.benchmark(own[0].recipe.benchmarks[0])[0]
        for one in label_quality(LabelDataset(folder), protocol):
            named = one.teacher if len(rows) == 1 else f"{one.teacher} ({own[0].row}{', ...' if own[1:] else ''})"
            found.append((named, one))
    return found


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
    if result.labels:
        head, *body = result.label_text()
        table("the teachers’ own labels", head, body)
    head, *body = result.text()
    table(result.title, head, body)
    if result.claims:
        table("claims", CLAIM_HEAD, [claim.cells() for claim in result.claims])
        say(result.verdict_line())
