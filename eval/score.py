"""Stored predictions against a benchmark: aligned, measured, averaged, and honest about what could not be scored.

A mean is over all images of the list or it is not given: where a prediction is missing or unusable, every mean is null,
the images are counted and named, and `allow_failed=True` is needed for the mean over the rest (`partial` is then true).

A score file is JSON, with a .csv of the images beside it:

    {"version": 1, "model": str, "benchmark": str, "kind": str, "created": ISO time, "software": str,
     "protocol": {... every field of eval.protocol.Protocol, "id": str, "setting": str},
     "num_images": n, "num_failed": m, "num_remarks": k, "num_extra": e, "partial": bool,
     "metrics": {name: mean over images or null},      the ten of eval.metrics
     "pooled": {name: over all pixels of all images},  not comparable with any paper
     "floors": {"0.001" and "1/max truth": {name: mean}},  under either floor; only for fits in disparity
     "groups": {group: {"num_images": n, "num_failed": m, "metrics": {...}}},  {} where a benchmark has no parts
     "images": [{"key", "group", "metrics": {...} or null, "scale", "shift", "failed": bool, "problem": str or null}]}

An image with a problem was either not scored (`failed`) or scored with a remark. NaN and infinity are null.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import distill
from distill.depth import Kind
from distill.plugins import find
from eval.benchmarks import Sample, actual
from eval.fit import Measured, NoTruth, measure
from eval.metrics import METRICS, from_sums
from eval.prior import Constant, PlanePrior, fit_plane
from eval.protocol import Protocol, from_dict, require_same
from eval.stored import BadPrediction, predict, read_prediction, read_settings

__all__ = [
    "Constant",
    "ImageScore",
    "PlanePrior",
    "Score",
    "fit_plane",
    "predict",
    "read_scores",
    "score",
    "score_predictions",
    "table",
    "write_scores",
]

Means = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class ImageScore:
    """One image: its ten metrics, or None and the problem. failed: it should have been scored and was not."""

    key: str
    group: str
    metrics: dict[str, float] | None
    problem: str | None = None
    failed: bool = False
    scale: float | None = None
    shift: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one model is worth on one benchmark; the fields of a score file, see the module."""

    model: str
    benchmark: str
    protocol: Protocol
    kind: Kind
    images: tuple[ImageScore, ...]
    metrics: Means
    pooled: Means
    floors: dict[str, Means]
    groups: dict[str, dict[str, Any]]
    num_extra: int = 0
    partial: bool = False
    software: str = ""
    created: str = ""

    @property
    def num_images(self) -> int:
        """Images of the list, scored or not."""
        return len(self.images)

    @property
    def num_failed(self) -> int:
        """Images that should have been scored and were not."""
        return sum(image.failed for image in self.images)

    def problems(self) -> list[str]:
        """One line per image with a problem, the failures first, then one about extra files."""
        marked = sorted((image for image in self.images if image.problem), key=lambda image: not image.failed)
        lines = [f"{image.key}: {image.problem}" for image in marked]
        if self.num_extra:
            lines.append(f"{self.num_extra} .npy files belong to no image of the list")
        return lines


def score(
    store: Path | str,
    kind: Kind | str | None,
    samples: Sequence[Sample],
    protocol: Protocol,
    *,
    mode: str | None = None,
    model: str = "",
    allow_failed: bool = False,
    workers: int | None = None,
    report: Callable[..., None] | None = None,
) -> Score:
    """Score the predictions in `store`, laid out by `Sample.prediction_path`.

    kind: of the predictions; None reads it from what `eval.stored.predict` left there. protocol: the benchmark's own;
    mode: "marigold", "clean", or None for the protocol's. allow_failed: give means over the scored images although some
    failed. workers: images in flight (each holds one map of pred and truth in memory), at most 8 unless said. Raises
    FileNotFoundError where the store holds no prediction at all, ValueError for a kind that the store contradicts.
    """
    store = Path(store)
    protocol = actual(protocol.in_mode(mode or protocol.mode), samples)
    settings = read_settings(store)
    kind = _agree(store, kind, settings)
    protocol = protocol.with_kind(kind)
    expected = [sample.prediction_path for sample in samples]
    double = [path for path, count in Counter(expected).items() if count > 1]
    if double or not samples:
        raise ValueError(f"two images would be stored as {double[0]}" if double else f"{protocol.benchmark}: no images")
    present = {path.relative_to(store).as_posix() for path in store.rglob("*.npy")}
    if present.isdisjoint(expected):
        raise FileNotFoundError(
            f"{store} holds none of the {len(samples)} predictions; the first should be {store / expected[0]}"
        )

    def one(sample: Sample) -> tuple[ImageScore, Measured | None]:
        return _score_image(sample, store, kind, protocol)

    results = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # images run beside each other; threads inside an image would only collide
    try:
        with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
            for done, result in enumerate(pool.map(one, samples), 1):
                results.append(result)
                if report:
                    report(done, len(samples))
    finally:
        torch.set_num_threads(threads)
    return Score(
        model=model or (settings["model"] if settings else store.resolve().name),
        benchmark=protocol.benchmark,
        protocol=protocol,
        kind=kind,
        images=tuple(image for image, _ in results),
        **_summary(results, allow_failed),
        num_extra=len(present.difference(expected)),
        software=f"distill {distill.__version__}",
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
    out: Path | str | None = None,
    model: str = "",
    allow_failed: bool = False,
    workers: int | None = None,
    report: Callable[..., None] | None = None,
) -> Score:
    """What `distill score --predictions` does: score stored predictions of any model, and write `out` and its .csv.

    benchmark: a file name in eval/benchmarks/. protocol: "marigold", "clean", or None for the benchmark's own.
    """
    if not Path(predictions).is_dir():
        raise FileNotFoundError(f"{predictions}: no such folder of predictions")
    module = find("eval.benchmarks", benchmark)
    samples = list(module.samples(root, list_file))
    result = score(
        predictions,
        kind,
        samples,
        module.PROTOCOL,
        mode=protocol,
        model=model,
        allow_failed=allow_failed,
        workers=workers,
        report=report,
    )
    if out is not None:
        write_scores(result, out)
    return result


def write_scores(result: Score, path: Path | str) -> None:
    """Write a score as JSON to `path` and its images as .csv beside it, each aside and renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [
        {
            "key": image.key,
            "group": image.group,
            "metrics": None if image.metrics is None else _finite(image.metrics),
            "scale": image.scale,
            "shift": image.shift,
            "failed": image.failed,
            "problem": image.problem,
        }
        for image in result.images
    ]
    protocol = {**result.protocol.as_dict(), "id": result.protocol.id, "setting": result.protocol.setting}
    content = {
        "version": 1,
        "model": result.model,
        "benchmark": result.benchmark,
        "kind": str(result.kind),
        "created": result.created,
        "software": result.software,
        "protocol": protocol,
        "num_images": result.num_images,
        "num_failed": result.num_failed,
        "num_remarks": sum(image.problem is not None and not image.failed for image in result.images),
        "num_extra": result.num_extra,
        "partial": result.partial,
        "metrics": result.metrics,
        "pooled": result.pooled,
        "floors": result.floors,
        "groups": result.groups,
        "images": images,
    }
    _replace(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    rows: list[list[Any]] = [["key", "group", *METRICS, "scale", "shift", "failed", "problem"]]
    for image in result.images:
        values = [repr((image.metrics or {}).get(name, math.nan)) for name in METRICS]
        rows.append([image.key, image.group, *values, image.scale, image.shift, image.failed, image.problem or ""])
    aside = path.with_suffix(".csv.part")
    with aside.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    aside.replace(path.with_suffix(".csv"))


def read_scores(path: Path | str) -> Score:
    """A score file as a Score; ValueError names the file where it is none, or was edited."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != 1:
            raise ValueError(f"version {content['version']}, this program reads 1")
        protocol = from_dict({key: value for key, value in content["protocol"].items() if key != "setting"})
        images = tuple(
            ImageScore(
                row["key"], row["group"], row["metrics"], row["problem"], row["failed"], row["scale"], row["shift"]
            )
            for row in content["images"]
        )
        return Score(
            protocol=protocol,
            kind=Kind(content["kind"]),
            images=images,
            **{name: content[name] for name in ("model", "benchmark", "metrics", "pooled", "floors", "groups")},
            **{name: content[name] for name in ("num_extra", "partial", "software", "created")},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a score file ({error}); write one with distill score") from error


def table(
    scores: Sequence[Score], metrics: Sequence[str] = ("abs_rel", "delta1"), *, across_alignments: bool = False
) -> list[list[str]]:
    """Rows of text, the head first: model, alignment, then one column per benchmark and metric; "-" where there is
    none.

    Scores of one benchmark must have one protocol (ProtocolError); across_alignments allows different alignments, which
    their column shows. A partial mean is marked with the number of images that it lacks.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise LookupError(f"no metric {', '.join(unknown)}; there are {', '.join(METRICS)}")
    benchmarks = list(dict.fromkeys(result.benchmark for result in scores))
    for benchmark in benchmarks:
        same = {f"{s.model} ({s.kind})": s.protocol for s in scores if s.benchmark == benchmark}
        require_same(same, across_alignments=across_alignments)
    rows = [["model", "alignment", *(f"{benchmark} {name}" for benchmark in benchmarks for name in metrics)]]
    for model, alignment in dict.fromkeys((s.model, s.protocol.alignment) for s in scores):
        own = {s.benchmark: s for s in scores if (s.model, s.protocol.alignment) == (model, alignment)}
        rows.append([model, alignment, *(_cell(own.get(b), name) for b in benchmarks for name in metrics)])
    return rows


def _cell(result: Score | None, name: str) -> str:
    value = None if result is None else result.metrics[name]
    if result is None or value is None:
        return "-"
    text = METRICS[name].format.format(value)
    return f"{text} (without {result.num_failed})" if result.num_failed else text


def _agree(store: Path, kind: Kind | str | None, settings: Mapping[str, Any] | None) -> Kind:
    """The predictions' kind: as said, unless the store knows better."""
    stored = Kind(settings["kind"]) if settings else None
    if kind is None:
        if stored is None:
            raise ValueError(
                f"{store} does not say what kind its predictions are: give --kind, one of {', '.join(Kind)}"
            )
        return stored
    try:
        kind = Kind(kind)
    except ValueError:
        raise ValueError(f"no kind {str(kind)!r}; there are {', '.join(Kind)}") from None
    if stored is not None and stored.quantity != kind.quantity:
        raise ValueError(f"{store} holds {stored}, which cannot be scored as {kind}; leave --kind out")
    return kind


def _score_image(sample: Sample, store: Path, kind: Kind, protocol: Protocol) -> tuple[ImageScore, Measured | None]:
    """One image's row and sums; whatever is wrong with it ends in its row."""
    path = store / sample.prediction_path
    try:
        if not path.is_file():
            raise BadPrediction(f"missing: no {sample.prediction_path}")
        truth = sample.truth()
        height, width = truth.values.shape[-2:]
        pred, remarks = read_prediction(path, (height, width))
        measured = measure(pred, truth, kind, protocol)
    except NoTruth as error:
        # The official mean becomes NaN with such an image; in the clean mode it does not count for anybody.
        return ImageScore(sample.key, sample.group, None, str(error), protocol.mode == "marigold"), None
    except (OSError, ValueError) as error:
        return ImageScore(sample.key, sample.group, None, str(error), True), None
    metrics = {name: float(value) for name, value in from_sums(measured.sums[None]).items()}
    problem = "; ".join([*remarks, *measured.notes]) or None
    return ImageScore(sample.key, sample.group, metrics, problem, scale=measured.scale, shift=measured.shift), measured


def _summary(results: Sequence[tuple[ImageScore, Measured | None]], allow_failed: bool) -> dict[str, Any]:
    """Means, pooled values, floors and groups of a Score; None instead of a mean over the images that happened to be
    there."""
    images = [image for image, _ in results]
    measured = [m for _, m in results if m is not None]
    failed = any(image.failed for image in images)
    withheld = failed and not allow_failed
    groups: dict[str, dict[str, Any]] = {}
    for group in sorted({image.group for image in images} - {""}):
        inside = [image for image in images if image.group == group]
        lost = sum(image.failed for image in inside)
        rows = [image.metrics for image in inside if image.metrics is not None]
        mean = _mean([] if lost and not allow_failed else rows)
        groups[group] = {"num_images": len(inside), "num_failed": lost, "metrics": mean}
    floors = {}
    for name in measured[0].floors if measured and not withheld else ():
        rows = [_values(m.floors[name]) for m in measured if name in m.floors]
        floors[name] = _mean(rows)
    pooled = torch.stack([m.sums for m in measured]).sum(0) if measured and not withheld else None
    return {
        "metrics": _mean([] if withheld else [image.metrics for image in images if image.metrics is not None]),
        "pooled": _finite(_values(pooled)) if pooled is not None else dict.fromkeys(METRICS),
        "floors": floors,
        "groups": groups,
        "partial": failed and allow_failed,
    }


def _values(sums: Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in from_sums(sums[None]).items()}


def _mean(rows: Sequence[Mapping[str, float]]) -> Means:
    """The plain mean of each metric, None where there is no row."""
    if not rows:
        return dict.fromkeys(METRICS)
    return _finite({name: math.fsum(row[name] for row in rows) / len(rows) for name in METRICS})


def _finite(values: Mapping[str, float]) -> Means:
    """JSON has no NaN and no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
