"""Score stored predictions on a benchmark: align, measure, average, and report what could not be scored.

A mean is over all images of the list or it is not given: if a prediction is missing or unusable, every mean is null,
the images are counted and named, and the mean over the others needs `allow_failed=True` (`partial` is then true).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.core import machine
from distill.core.depth import Kind
from distill.core.files import files_below
from distill.core.plugins import find
from distill.core.progress import Report
from distill.core.threads import one_thread
from distill.core.wording import shortened
from distill.data.filetypes import skip_category, summarize_counts
from distill.data.maps import SUFFIXES, stored_stems
from distill.eval.benchmarks import BenchmarkSample, with_listed_images
from distill.eval.fit import ImageErrors, NoGroundTruthError
from distill.eval.plane import fit_plane
from distill.eval.protocol import Protocol, require_same
from distill.eval.scorefile import ImageScore, Means, Score, finite, read_scores, require_writable, write_scores
from distill.eval.stored import BadPredictionError, find_prediction, predict, read_prediction, read_settings
from distill.eval.tasks import TASKS, Task, size_of

__all__ = [
    "ImageScore",
    "Score",
    "fit_plane",
    "predict",
    "read_scores",
    "score",
    "score_predictions",
    "table",
    "write_scores",
]


def score(
    store: Path | str,
    kind: Kind | str | None,
    samples: Sequence[BenchmarkSample],
    protocol: Protocol,
    *,
    mode: str | None = None,
    alignment: str = "auto",
    model: str = "",
    offset_positive: bool = False,
    allow_failed: bool = False,
    workers: int | None = None,
    report: Report | None = None,
) -> Score:
    """Score the predictions in `store`, laid out by `BenchmarkSample.prediction_path`.

    kind: of the predictions; None reads it from what `eval.stored.predict` wrote there. protocol: the benchmark's own;
    mode: "marigold", "clean", or None for the protocol's. alignment: one of eval.protocol.CHOICES.
    offset_positive: see Protocol. allow_failed: give means over the scored images although some failed. workers: images
    in flight (each holds one map of pred and truth in memory), by default at most 8. Raises FileNotFoundError if the
    store holds no prediction at all, ValueError for a kind that contradicts the store.
    """
    store = Path(store)
    protocol = with_listed_images(protocol.in_mode(mode or protocol.mode), samples)
    settings = read_settings(store)
    kind = _checked_kind(store, kind, settings)
    protocol = protocol.with_kind(kind, alignment)
    protocol = protocol.with_offset(kind) if offset_positive else protocol
    expected = [sample.prediction_path for sample in samples]
    duplicates = [path for path, count in Counter(expected).items() if count > 1]
    if duplicates or not samples:
        raise ValueError(
            f"two images would be stored as {duplicates[0]}" if duplicates else f"{protocol.benchmark}: no images"
        )
    stored_paths = {path for path in store.rglob("*") if path.suffix.lower() == ".npy"}
    places = _places(store, samples)

    def score_sample(sample: BenchmarkSample) -> tuple[ImageScore, ImageErrors | None]:
        return _score_image(sample, places.get(sample.key, store / sample.prediction_path), kind, protocol)

    results = []
    # Images are scored in parallel; threads within an image would only compete.
    with one_thread(), ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for done, result in enumerate(pool.map(score_sample, samples), 1):
            results.append(result)
            if report:
                report(done, len(samples))
    return Score(
        model=model or (settings["model"] if settings else store.resolve().name),
        benchmark=protocol.benchmark,
        protocol=protocol,
        kind=kind,
        images=tuple(image for image, _ in results),
        **_summary(TASKS[protocol.task], results, allow_failed),
        num_extra=len(stored_paths.difference(places.values())),
        software=machine.software(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def score_predictions(
    predictions: Path | str,
    *,
    kind: str | None,
    benchmark: str,
    root: Path | str | None,
    list_file: Path | str | None = None,
    protocol: str | None = None,
    alignment: str = "auto",
    offset_positive: bool = False,
    out: Path | str | None = None,
    model: str = "",
    allow_failed: bool = False,
    workers: int | None = None,
    report: Report | None = None,
) -> Score:
    """Score stored predictions of any model, and write `out` and its .csv, as `distill score --predictions` does.

    benchmark: a file name in eval/benchmarks/. protocol: "marigold", "clean", or None for the benchmark's own. Raises,
    before anything is scored, OSError or ValueError for an `out` that cannot be written.
    """
    if out is not None:
        require_writable(out)
    if not Path(predictions).is_dir():
        is_file = Path(predictions).is_file()
        problem = "not a folder; unpack it and give the folder of maps" if is_file else "no such folder of predictions"
        raise FileNotFoundError(f"{predictions}: {problem}")
    module = find("distill.eval.benchmarks", benchmark)
    samples = list(module.samples(root, list_file))
    result = score(
        predictions,
        kind,
        samples,
        module.PROTOCOL,
        mode=protocol,
        alignment=alignment,
        offset_positive=offset_positive,
        model=model,
        allow_failed=allow_failed,
        workers=workers,
        report=report,
    )
    if out is not None:
        write_scores(result, out)
    return result


def table(
    scores: Sequence[Score], metrics: Sequence[str] = ("abs_rel", "delta1"), *, across_alignments: bool = False
) -> list[list[str]]:
    """Rows of text, the head first: model, alignment, then one column per benchmark and metric; "-" without a value.

    A benchmark that has none of these metrics shows its main one. Scores of one benchmark must have one protocol
    (ProtocolError); across_alignments allows different alignments, which their column shows. A partial mean is marked
    with the number of missing images.
    """
    known = dict.fromkeys(name for task in TASKS.values() for name in task.rows)
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise LookupError(f"no metric {', '.join(unknown)}; there are {', '.join(known)}")
    benchmarks = list(dict.fromkeys(result.benchmark for result in scores))
    for benchmark in benchmarks:
        same = {f"{s.model} ({s.kind})": s.protocol for s in scores if s.benchmark == benchmark}
        require_same(same, across_alignments=across_alignments)
    columns = [
        (benchmark, name)
        for benchmark in benchmarks
        for task in [next(s.task for s in scores if s.benchmark == benchmark)]
        for name in [name for name in metrics if name in task.rows] or [task.main]
    ]
    rows = [["model", "alignment", *(f"{benchmark} {name}" for benchmark, name in columns)]]
    for model, alignment in dict.fromkeys((s.model, s.protocol.alignment) for s in scores):
        by_benchmark = {s.benchmark: s for s in scores if (s.model, s.protocol.alignment) == (model, alignment)}
        rows.append([model, alignment, *(_cell(by_benchmark.get(b), name) for b, name in columns)])
    return rows


def _cell(result: Score | None, name: str) -> str:
    value = None if result is None else result.metrics[name]
    if result is None or value is None:
        return "-"
    text = result.task.rows[name].format.format(value)
    return f"{text} (without {result.num_failed})" if result.num_failed else text


def _checked_kind(store: Path, kind: Kind | str | None, settings: Mapping[str, Any] | None) -> Kind:
    """The predictions' kind: the given one if it agrees with the store's settings, or the store's."""
    stored = Kind(settings["kind"]) if settings else None
    if kind is None:
        if stored is None:
            raise ValueError(
                f"{store} does not say of what kind its predictions are: give --kind, one of {', '.join(Kind)}"
            )
        return stored
    try:
        kind = Kind(kind)
    except ValueError:
        raise ValueError(f"no kind {str(kind)!r}; there are {', '.join(Kind)}") from None
    if stored is not None and stored.quantity != kind.quantity:
        raise ValueError(f"{store} holds {stored}, which cannot be scored as {kind}; leave --kind out")
    return kind


def _places(store: Path, samples: Sequence[BenchmarkSample]) -> dict[str, Path]:
    """The path of each sample's map, by its key; raises FileNotFoundError if the store has none at all."""
    places = {sample.key: path for sample in samples if (path := find_prediction(store, sample)).is_file()}
    if not places:
        first = samples[0]
        stems = ", ".join(f"{stem}.npy" for stem in stored_stems(first.photo or first.key))
        all_files = [path.relative_to(store).as_posix() for path in files_below(store)]
        map_files = [name for name in all_files if Path(name).suffix.lower() in SUFFIXES]
        others = summarize_counts(map(skip_category, all_files))
        listed = shortened(map_files)
        raise FileNotFoundError(
            f"{store} holds none of the {len(samples)} predictions; the first should be {store / first.prediction_path}"
            f" (or another of {stems}; .npz, .png, .tif, .exr and .pfm too); there is "
            + (listed or (f"no map, but {others}: store the numbers as .npy" if others else "nothing in it"))
        )
    return places


def _score_image(
    sample: BenchmarkSample, path: Path, kind: Kind, protocol: Protocol
) -> tuple[ImageScore, ImageErrors | None]:
    """One image's row and sums; any problem is recorded in the row."""
    try:
        if not path.is_file():
            raise BadPredictionError(f"missing: no {sample.prediction_path}")
        truth = sample.mark() if sample.mark is not None else sample.truth()
        pred, remarks = read_prediction(path, size_of(truth), kind, crop=protocol.crop, image=sample.image)
        measured = TASKS[protocol.task].measure(pred, truth, kind, protocol)
    except NoGroundTruthError as error:
        # The official mean becomes NaN with such an image; in clean mode it is left out for every model.
        return ImageScore(sample.key, sample.group, None, str(error), protocol.mode == "marigold"), None
    except (OSError, ValueError) as error:
        return ImageScore(sample.key, sample.group, None, str(error), True), None
    metrics = _values(TASKS[protocol.task], measured.sums)
    problem = "; ".join([*remarks, *measured.notes]) or None
    fit: dict[str, Any] = {name: getattr(measured, name) for name in ("scale", "shift", "scale_error")}
    return ImageScore(sample.key, sample.group, metrics, problem, **fit), measured


def _summary(
    task: Task, results: Sequence[tuple[ImageScore, ImageErrors | None]], allow_failed: bool
) -> dict[str, Any]:
    """Means, pooled values, floors and groups of a Score; None instead of a mean over only some of the images."""
    measured = [m for _, m in results if m is not None]
    failed = any(image.failed for image, _ in results)
    shown = measured if allow_failed or not failed else []
    metres = all(m.metres for m in measured)
    groups: dict[str, dict[str, Any]] = {}
    for group in sorted({image.group for image, _ in results} - {""}):
        members = [(image, m) for image, m in results if image.group == group]
        group_failed = sum(image.failed for image, _ in members)
        usable = [] if group_failed and not allow_failed else [m for _, m in members if m is not None]
        mean = _headline(task, [m.sums for m in usable], metres=all(m.metres for m in usable))
        groups[group] = {"num_images": len(members), "num_failed": group_failed, "metrics": mean}
    floors = {
        name: _headline(task, [m.floors[name] for m in shown if name in m.floors], metres=metres)
        for name in (shown[0].floors if shown else ())
    }
    metrics = _headline(task, [m.sums for m in shown], metres=metres)
    if task.group_mean and groups and (allow_failed or not failed):
        metrics[task.group_mean] = _group_mean(task, groups)
    pooled: Means = dict.fromkeys(task.rows)
    if shown:
        pooled_values = finite(_values(task, torch.stack([m.sums for m in shown]).sum(0)))
        pooled |= _of_known_units(task, pooled_values, metres)
    errors = [abs(m.scale_error) for m in shown if m.scale_error is not None]
    return {
        "scale_error": math.fsum(errors) / len(errors) if errors and len(errors) == len(shown) else None,
        "metrics": metrics,
        "pooled": pooled,
        "floors": floors,
        "groups": groups,
        "partial": failed and allow_failed,
        "nonpositive": math.fsum(m.nonpositive for m in measured) / max(1, len(measured)),
    }


def _values(task: Task, sums: Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in task.from_sums(sums[None]).items()}


def _of_known_units(task: Task, values: Means, metres: bool) -> Means:
    """Replace metrics with a unit by None unless every truth is in metres: unknown units have no common mean."""
    return {name: value if metres or not task.rows[name].unit else None for name, value in values.items()}


def _headline(task: Task, sums: Sequence[Tensor], *, metres: bool) -> Means:
    """Each metric's plain mean over images, or its value over all of them if the task says so; None without images.

    metres: whether all their truths are in metres.
    """
    means: Means = dict.fromkeys(task.rows)
    if not sums:
        return means
    rows = [_values(task, torch.stack(list(sums)).sum(0))] if task.over_all else [_values(task, s) for s in sums]
    values = finite({name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]})
    return means | _of_known_units(task, values, metres)


def _group_mean(task: Task, groups: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The plain mean over the benchmark's parts; None if one has no value."""
    values = [group["metrics"][task.main] for group in groups.values() if group["num_images"]]
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None
