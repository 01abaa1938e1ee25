"""Runs a study: labels once, trains and scores every cell (weights are then deleted), writes tables, figures, verdicts.

Any number of processes may run the same study, started here or by hand; each takes the next cell that no other process
has locked. A killed study resumes: a finished cell has its cell.json, a half-trained one continues from its checkpoint.

    OUT/labels/HASH/  OUT/cells/HASH/{cell.json, train/log.jsonl, scores/, predictions/}
    OUT/NAME-VERSION/{study.json, table.md, index.html}
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
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
from distill.app.study import Column, Study, StudyCell, cells, read_study
from distill.core import files
from distill.data import scenes
from distill.eval.labels import LabelQuality, label_quality
from distill.eval.reports.ablation import CLAIM_HEAD, AblationRow, Claim, Table, joint_holm_line, markdown, write_page
from distill.eval.score import read_scores
from distill.eval.verdict import UNDECIDED, UNKNOWN, holm, judge, paper_effect
from distill.labelling.lock import RunLockedError, run_lock
from distill.shards.shards import MANIFEST, LabelDataset
from distill.training import trainlog
from distill.training.step import TrainingStoppedError

POLL = 2.0
"""Seconds between checks of cells that other processes hold."""


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
    """Runs the unfinished cells of the studies (files, or names of shipped ones), writes and returns their tables.

    Cells run seed by seed across all studies. processes: how many cells at once; with GPUs each process gets one GPU.
    overrides: for every cell, as --set. worker: only run cells, return no tables. collect_only: run nothing, tabulate
    the finished cells.
    Raises ValueError or OSError for a recipe or data that cannot be used; a training that diverges is a result.
    """
    if build.process()[1] > 1 and not collect_only:  # its processes would train different cells as one run
        raise ValueError("a study starts its own processes: distill ablate STUDY --processes N, without a launcher")
    paths = [locate(path, "study") for path in paths]
    studies = [(study, cells(study, path, version, out, overrides)) for path in paths for study in [read_study(path)]]
    all_cells = list({cell.folder: cell for _, study_cells in studies for cell in study_cells}.values())
    if processes > 1 and not (worker or collect_only):
        _run_workers(all_cells, paths, version, out, processes, overrides)
    elif not collect_only:
        with scenes.cached_views():  # every cell is scored on the same scenes
            if worker:  # all seeds at once: else all workers would wait for the one that labels the first seed
                _label_all(all_cells)
            _run_cells(all_cells)
    if worker:
        return []
    results = []
    for study, study_cells in studies:
        result = collect(study, version, study_cells)
        folder = out / f"{study.name}-{version}"
        files.write_json(folder / "study.json", result.as_dict(), allow_nan=True)
        files.write_text(folder / "table.md", markdown(result))
        write_page(result, folder / "index.html")
        _show(result)
        say(f"study: {(folder / 'index.html').resolve()}")
        results.append(result)
    if len(results) > 1:
        say(joint_holm_line(results))
    return results


# --- cells ------------------------------------------------------------------------------------------------------------


def _label_all(every: Sequence[StudyCell]) -> None:
    """Makes every labels folder of these cells once; waits at the end for those that other processes are making."""
    pending = {build.labels_folder(cell.recipe): cell.recipe for cell in every if not cell.recipe.labels.online}
    while pending := {folder: recipe for folder, recipe in pending.items() if not (folder / MANIFEST).is_file()}:
        if not any([_try_label(recipe) for recipe in pending.values()]):
            time.sleep(POLL)


def _try_label(recipe: Recipe) -> bool:
    """Labels for a recipe; returns False if another process holds its labels folder."""
    try:
        commands.run_label(recipe)
    except RunLockedError:
        return False
    return True


def _run_workers(
    every: Sequence[StudyCell],
    paths: Sequence[Path],
    version: str,
    out: Path,
    processes: int,
    overrides: Sequence[str],
) -> None:
    """Starts the workers and shows how many cells are done; raises ValueError if a worker failed and cells are left."""
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
    gpus = _gpus()
    workers: list[subprocess.Popen[bytes]] = []
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as logs, progress(f"ablate {', '.join(path.stem for path in paths)}") as report:
        try:
            for i in range(processes):
                log = logs.enter_context((out / f"worker-{i}.log").open("wb"))
                environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
                if gpus:
                    environment["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
                workers.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment})
                )
            while any(process.poll() is None for process in workers):
                report(sum(is_done(cell) for cell in every), len(every))
                time.sleep(POLL)
        finally:
            for process in workers:
                process.terminate()
            for process in workers:
                process.wait()
    failed = [i for i, process in enumerate(workers) if process.returncode]
    if failed:
        log_file, code = out / f"worker-{failed[0]}.log", workers[failed[0]].returncode
        last_line = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else " ".join(last_line)
        message = f"worker {failed[0]} stopped: {reason} (full output: {log_file})"
        if not all(map(is_done, every)):
            raise ValueError(message)
        note(f"{message}; the other workers ran its cells")


def _gpus() -> list[str]:
    """This process's GPUs, as CUDA_VISIBLE_DEVICES names them: where it is set already, not from 0 on."""
    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in given.split(",")][:count] if given else [str(i) for i in range(count)]


def is_done(cell: StudyCell) -> bool:
    """Whether the cell has its result."""
    return (cell.folder / "cell.json").is_file()


def _run_cells(every: Sequence[StudyCell]) -> None:
    """Runs all cells that are free, seed by seed, then waits for those that other processes hold."""
    for cell in filter(is_done, every):
        _remove_weights(cell)  # its process may have been killed before it did
    seeds = list(dict.fromkeys(cell.seed for cell in every))
    while True:
        any_held = False
        for seed in seeds:
            open_cells = [cell for cell in every if cell.seed == seed and not is_done(cell)]
            _label_all(open_cells)
            any_held = sum([_run_if_free(cell) for cell in open_cells]) < len(open_cells) or any_held
        if not any_held:
            return
        time.sleep(POLL)


def _run_if_free(cell: StudyCell) -> bool:
    """Runs the cell unless another process holds it; returns whether it is done."""
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
        # No column is a teacher's score, and a heavy one would be asked again in every cell.
        commands.run_score(cell.recipe, teachers=False)
    except TrainingStoppedError as error:
        failed = str(error)
    result_record = {"row": cell.row, "seed": cell.seed, "failed": failed, "seconds": time.monotonic() - began}
    files.write_json(cell.folder / "cell.json", result_record | {"made_by": commands.commit()}, indent=None)
    _remove_weights(cell)


def _remove_weights(cell: StudyCell) -> None:
    """Scores, log and predictions are kept; the weights of sixty students would fill a disk."""
    shutil.rmtree(cell.folder / "train" / "checkpoints", ignore_errors=True)
    shutil.rmtree(cell.folder / "train" / "student", ignore_errors=True)


# --- results ----------------------------------------------------------------------------------------------------------


Shown = tuple[float | None, np.ndarray]
"""A cell's value in a column, None if it has none, and the per-image values (n,) float64 that it averages, in the
benchmark's order; for a value of the training log, that value alone."""


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
    group_images = [image for image in score.images if not column.group or image.group == column.group]
    image_values = np.array([image.metrics[column.metric] for image in group_images if image.metrics], dtype=np.float64)
    return (None if value is None or not math.isfinite(value) else value), image_values


def collect(study: Study, version: Literal["full", "bench"], every: Sequence[StudyCell]) -> Table:
    """The study's table from the finished cells; where a cell has no value, the entry is empty."""
    columns = study.version(version).columns
    measures = [column.measure for column in columns]
    published = {p.row: p.values for p in study.paper}
    rows, images = [], {measure: dict[str, dict[int, Any]]() for measure in measures}
    for row in study.all_rows():
        done_cells = [cell for cell in every if cell.row == row.name and is_done(cell)]
        shown = {cell.seed: [_shown(cell, column) for column in columns] for cell in done_cells}
        for seed, entries in shown.items():
            for measure, by_row in images.items():
                measured = [entry for entry, its in zip(entries, measures, strict=True) if its == measure]
                if all(value is not None for value, _ in measured):
                    by_row.setdefault(row.name, {})[seed] = [image_values for _, image_values in measured]
        failures = [json.loads((cell.folder / "cell.json").read_text())["failed"] for cell in done_cells]
        curves = {cell.seed: _curves(cell) for cell in done_cells}
        rows.append(
            AblationRow(
                row.name,
                {seed: [value for value, _ in entries] for seed, entries in shown.items()},
                published.get(row.name, ()),
                [f for f in failures if f],
                curves,
                [c.folder for c in done_cells],
            )
        )
    benchmarks = every[0].recipe.benchmarks if every else ()
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
        benchmarks=[(b.alias_or_name, b.name, b.root, b.list) for b in benchmarks],
        made_by=commands.commit(),
    )


def _claims(study: Study, images: Mapping[str, Any], columns: Sequence[Column]) -> list[Claim]:
    """Judges every claim in each metric that it is about; the paper's effect only in the metric of its own columns."""
    paper = {p.row: sum(p.values) / len(p.values) for p in study.paper}
    paper_measures = (
        {column.measure for column in study.full.columns[: len(study.paper[0].values)]} if study.paper else set()
    )
    judged = []
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
            theirs = paper_effect(o.kind, o.first, o.second, paper, ours.pair) if paper_measures == {metric} else None
            judged.append((o, metric, ours, theirs))
    # An undecided claim is not significant, whatever its p-value.
    significance = holm([ours.p for *_, ours, _ in judged])
    return [
        Claim(
            o.claim,
            o.source or study.source,
            metric,
            ours,
            theirs,
            significant and ours.word not in (UNDECIDED, UNKNOWN),
            bool(o.bound),
        )
        for (o, metric, ours, theirs), significant in zip(judged, significance, strict=True)
    ]


def _label_quality(every: Sequence[StudyCell]) -> list[tuple[str, LabelQuality]]:
    """Quality of the first seed's labels, for every choice of teachers, titled with the rows that train on them."""
    first_seed = [cell for cell in every if cell.seed == every[0].seed]
    rows: dict[Path, list[StudyCell]] = {}
    for cell in first_seed:
        rows.setdefault(build.labels_folder(cell.recipe), []).append(cell)
    qualities = []
    for folder, folder_cells in rows.items():
        if not (folder / MANIFEST).is_file() or not folder_cells[0].recipe.benchmarks:
            continue
        protocol = build.benchmark(folder_cells[0].recipe.benchmarks[0])[0]
        for quality in label_quality(LabelDataset(folder), protocol):
            title = (
                quality.teacher
                if len(rows) == 1
                else f"{quality.teacher} ({folder_cells[0].row}{', ...' if folder_cells[1:] else ''})"
            )
            qualities.append((title, quality))
    return qualities


def _curves(cell: StudyCell) -> dict[str, list[tuple[int, float]]]:
    """Loss by step, and the output's deviation divided by the labels'."""
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
