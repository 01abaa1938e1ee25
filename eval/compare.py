"""Compare several models on the same images: store predictions, then measure them against each other and the truth.

    FOLDER/NAME/            the maps of one model, as distill.eval.stored keeps them, with settings.json
    FOLDER/NAME/model.json  its card, the cost of predicting and whether it takes focal lengths, so that measuring does
                            not need the model

Predicting resumes where it stopped and never mixes maps of different settings. Measuring reads only maps and images.
Every map is first converted to affine disparity (eval.agreement.to_disparity); affine_depth maps get the shift that
fits the reference best: the ground truth where an image has one, else the first model that has a disparity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, permutations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from distill.core import files
from distill.core.depth import DepthMap, Kind
from distill.core.progress import Report
from distill.eval import agreement
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.cost import Cost
from distill.eval.fit import NoGroundTruthError, measure
from distill.eval.metrics import from_sums
from distill.eval.protocol import Protocol
from distill.eval.stored import FOCAL, BadPredictionError, predict, read_prediction, read_settings
from distill.teachers import Teacher

CARD = "model.json"
TRUTH = "truth"
PROTOCOL = Protocol(benchmark="compare", min_depth=1e-3, max_depth=80.0, mask="valid truth where the model has a value")

Numbers = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Entrant:
    """A model to compare: its name in tables and folders, how to load it, and what its maps depend on."""

    name: str
    load: Callable[[], Teacher]
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """All measurements as plain JSON values; the fields of compare.json.

    models: per model its name, card, cost and mean numbers. pairs: per two names (or a name and "truth") the mean
    error, order, edges and sky. additions: per (primary, assistant) gain, mixing, share, news, complement. images: per
    image its key, its numbers, and the mean error between models.
    """

    models: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    additions: list[dict[str, Any]]
    images: list[dict[str, Any]]


# --- predicting -------------------------------------------------------------------------------------------------------


def predict_missing(
    entrant: Entrant, samples: Sequence[BenchmarkSample], folder: Path, *, report: Report | None = None
) -> int:
    """Predict the missing maps of one model and return their number; loads the model only if needed.

    Raises ValueError if the folder holds maps of other settings or weights, and whatever the model raises.
    """
    store = folder / entrant.name
    settings = json.loads(json.dumps(dict(entrant.settings)))
    stored, stored_card = read_settings(store), _read_card(store)
    complete = all((store / sample.prediction_path).is_file() for sample in samples)
    if complete and stored and stored_card:
        takes_focal = stored_card.get("takes_focal", FOCAL.items() <= stored["settings"].items())
        gives_focal = takes_focal and any(sample.focal for sample in samples)
        if stored["settings"] == settings | (FOCAL if gives_focal else {}):
            return 0
    cost = Cost()
    teacher = cost.load_and_measure(entrant.load)
    if stored_card and stored_card["card"]["revision"] != teacher.card.revision:
        raise ValueError(
            f"{store} holds predictions made with other weights (revision {stored_card['card']['revision']}, now "
            f"{teacher.card.revision}); delete this folder"
        )
    try:
        done = predict(cost.timed(teacher), samples, store, settings=settings, report=report)
    finally:
        if store.is_dir() and (cost.images or not stored_card):
            files.write_json(
                store / CARD,
                {
                    "card": asdict(teacher.card),
                    "cost": cost.summary(stored_card and stored_card["cost"]),
                    "takes_focal": bool(getattr(teacher, "takes_focal", False)),
                },
                sort_keys=True,
            )
    return done


def _read_card(store: Path) -> dict[str, Any] | None:
    """What `predict_missing` wrote of the model: "card", "cost" and "takes_focal"; None where there is nothing."""
    path = store / CARD
    if not path.is_file():
        return None
    try:
        table = dict(json.loads(path.read_text(encoding="utf-8")))
        return {**table, "card": dict(table["card"]), "cost": dict(table["cost"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not readable ({error}): delete {store} and compare again") from error


# --- one image --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageView:
    """One image with every model's map of it as affine disparity; models without a valid map are left out.

    raw: the maps as predicted. reference: the name of the map that the others are shown against.
    """

    image: Tensor
    raw: dict[str, DepthMap]
    maps: dict[str, DepthMap]
    truth: DepthMap | None
    reference: str


def read_view(sample: BenchmarkSample, names: Sequence[str], folder: Path) -> ImageView:
    """Read one image, its truth and the stored maps; raises BadPredictionError if a map cannot be read."""
    image = sample.image()[None]
    truth = sample.truth()
    known = truth if truth.valid.any() else None
    raw = {}
    for name in names:
        info = read_settings(folder / name)
        if info is None:
            raise BadPredictionError(f"{folder / name} has no predictions")
        values, _ = read_prediction(folder / name / sample.prediction_path, tuple(image.shape[-2:]))  # type: ignore[arg-type]
        tensor = torch.from_numpy(values)[None]
        usable = torch.isfinite(tensor)
        if usable.any():
            raw[name] = DepthMap(torch.where(usable, tensor, 0.0), usable, Kind(info["kind"]))
    reference_map = agreement.to_disparity(known) if known is not None and known.kind != Kind.AFFINE_DEPTH else None
    reference = TRUTH if reference_map is not None else ""
    maps = {TRUTH: reference_map} if reference_map is not None else {}
    for name in sorted(raw, key=lambda n: (raw[n].kind == Kind.AFFINE_DEPTH, names.index(n))):
        maps[name] = agreement.to_disparity(raw[name], reference_map)
        if reference_map is None and raw[name].kind != Kind.AFFINE_DEPTH:
            reference_map, reference = maps[name], name
    ordered = {name: maps[name] for name in [*names, TRUTH] if name in maps}
    return ImageView(image, raw, ordered, known, reference or next(iter(raw), ""))


def measure_image(view: ImageView, *, seed: int = 0) -> dict[str, Any]:
    """The numbers of one image: {"models": {name: ...}, "pairs": {"a|b": ...}, "additions": {"p|a": ...}}."""
    image_edges = agreement.image_edges(view.image)
    models: dict[str, Numbers] = {}
    for name, depth in view.raw.items():
        aligned = view.maps[name]
        models[name] = {
            "sharpness": _number(agreement.sharpness(aligned.values, aligned.valid)),
            "on_image": _number(agreement.edges_on_image(aligned.values, aligned.valid, image_edges)),
            "far": _number(agreement.far_end(aligned.values, aligned.valid).float().mean((-2, -1))),
            "valid": _number(aligned.valid.float().mean((-2, -1))),
            **(_scores(depth, view.truth) if view.truth is not None else {}),
        }
    pairs: dict[str, Numbers] = {}
    for a, b in combinations(view.maps, 2):
        first, second = view.maps[a], view.maps[b]
        both = first.valid & second.valid
        pairs[f"{a}|{b}"] = {
            "error": _number(agreement.alignment_error(first.values, second.values, both)),
            "order": _number(agreement.ordinal_agreement(first.values, second.values, both, seed=seed)),
            "edges": _number(agreement.edge_agreement(first.values, second.values, both)),
            # A pixel without ground truth may be sky or a hole of the sensor.
            "sky": None if b == TRUTH else _number(agreement.sky_disagreement(first, second)),
        }
    return {"models": models, "pairs": pairs, "additions": _additions(view, pairs, image_edges)}


def _additions(view: ImageView, pairs: Mapping[str, Numbers], image: Tensor) -> dict[str, Numbers]:
    truth = view.maps.get(TRUTH)
    errors = {}
    if truth is not None:
        common = truth.valid.clone()
        for name in view.raw:
            common &= view.maps[name].valid
        errors = {name: agreement.region_errors(view.maps[name].values, truth.values, common) for name in view.raw}
    additions: dict[str, Numbers] = {}
    for p, a in permutations(view.raw, 2):
        first, second = view.maps[p], view.maps[a]
        error = (pairs.get(f"{p}|{a}") or pairs[f"{a}|{p}"])["error"]
        news = _number(agreement.new_edges(first.values, second.values, first.valid & second.valid, image))
        gains = agreement.oracle_gain(errors[p], errors[a]) if errors else (None, None, None)
        additions[f"{p}|{a}"] = {
            "news": news,
            "complement": None if error is None or news is None else (1 - error) * news,
            **{k: None if v is None else _number(v) for k, v in zip(("gain", "mixing", "share"), gains, strict=True)},
        }
    return additions


def _scores(depth: DepthMap, truth: DepthMap) -> Numbers:
    """AbsRel and delta1 by the clean protocol, each kind aligned in its own quantity."""
    valid = truth.valid & depth.valid
    try:
        result = measure(
            depth.values[0].numpy(),
            DepthMap(truth.values, valid, truth.kind),
            depth.kind,
            PROTOCOL.with_kind(depth.kind),
        )
    except NoGroundTruthError:
        return {"abs_rel": None, "delta1": None}
    metrics = from_sums(result.sums[None])
    return {name: _number(metrics[name]) for name in ("abs_rel", "delta1")}


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


# --- all images -------------------------------------------------------------------------------------------------------


def compare(
    names: Sequence[str], samples: Sequence[BenchmarkSample], folder: Path, *, report: Report | None = None
) -> ModelComparison:
    """Measure these models' stored maps on these images, without loading any model.

    Raises BadPredictionError or ValueError.
    """
    images = []
    for done, sample in enumerate(samples, 1):
        try:
            view = read_view(sample, names, folder)
        except BadPredictionError as error:
            raise BadPredictionError(f"{sample.key}: {error}; compare again with the models available") from error
        numbers = measure_image(view, seed=done)
        model_errors = [n["error"] for key, n in numbers["pairs"].items() if not key.endswith(f"|{TRUTH}")]
        known_errors = [value for value in model_errors if value is not None]
        images.append(
            {
                "key": sample.key,
                "truth": view.truth is not None,
                "disagreement": fmean(known_errors) if known_errors else None,
                **numbers,
            }
        )
        if report:
            report(done, len(samples))
    return ModelComparison(
        models=[_model(name, folder, images) for name in names],
        pairs=_means(images, "pairs"),
        additions=_means(images, "additions"),
        images=images,
    )


def _model(name: str, folder: Path, images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    table, stored = _read_card(folder / name), read_settings(folder / name)
    if table is None or stored is None:
        raise BadPredictionError(f"{folder / name} has no {CARD}: delete the folder and compare again")
    measured = [image["models"][name] for image in images if name in image["models"]]
    numbers = {
        key: _mean([row.get(key) for row in measured]) for key in dict.fromkeys(k for row in measured for k in row)
    }
    return {
        "name": name,
        "card": table["card"],
        "cost": table["cost"],
        "settings": stored["settings"],
        "images": len(measured),
        "numbers": numbers,
    }


def _means(images: Sequence[Mapping[str, Any]], part: str) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for image in images for key in image[part])
    rows = []
    for key in keys:
        first, second = key.split("|")
        measured = [image[part][key] for image in images if key in image[part]]
        names = dict.fromkeys(name for row in measured for name in row)
        count = {name: sum(row.get(name) is not None for row in measured) for name in names}
        rows.append(
            {"a": first, "b": second, "images": count} | {n: _mean([row.get(n) for row in measured]) for n in names}
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def write_comparison(comparison: ModelComparison, path: Path, *, more: Mapping[str, Any]) -> None:
    """Write all measurements as JSON; `more` holds further entries (rejected images, the settings)."""
    files.write_json(path, {"version": 1, **asdict(comparison), **more}, sort_keys=True)
