"""Predict, store, then score: predictions on disk, as Marigold's evaluation names them.

A store is a folder of float32 `.npy` maps of the image's size, one per image at `Sample.prediction_path`, in the
predictor's own kind, NaN where it declared its map invalid. What `predict` writes also has a settings.json, which
says who predicted and how; a store of anybody else's predictions has none. Stored maps of other settings are never
overwritten nor mixed with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.core import files
from distill.core.depth import Kind
from distill.core.progress import Report
from distill.data.maps import READ_ERRORS, find_map, read_map
from distill.eval.benchmarks import BenchmarkSample
from distill.teachers import Teacher

SETTINGS = "settings.json"


class BadPredictionError(ValueError):
    """A stored prediction that cannot be scored; the message is the reason, without the file's name."""


def predict(
    teacher: Teacher,
    samples: Sequence[BenchmarkSample],
    store: Path | str,
    *,
    settings: Mapping[str, Any],
    used: Mapping[str, Any] | None = None,
    report: Report | None = None,
    tell: Callable[[str], None] | None = None,
) -> int:
    """Store the teacher's map of every sample, and return how many were predicted now.

    settings: what the maps depend on besides the image (weights, resolution, steps, the benchmark, ...), as JSON takes
    it; it is written to settings.json with the teacher's name and kind. used: how the teacher works in effect, defaults
    included; written beside them, and never a reason to refuse maps. Maps that are there already are kept, so that
    an interrupted run continues; if they were made with other settings, ValueError says which and what to do, and if
    `used` has another "root" than they were made of, `tell` hears of it. Use one folder per benchmark. Each map is
    written aside and renamed; one that was damaged since is predicted again, of which `tell` hears. A teacher that
    takes the camera's focal length is told each image's, where the benchmark knows it.
    """
    store = Path(store)
    told = getattr(teacher, "takes_focal", False) and any(sample.focal for sample in samples)
    settings = {**settings, "focal": "each image's own"} if told else settings
    claim = {"model": teacher.card.name, "kind": str(teacher.card.kind), "settings": dict(settings)}
    before = _claim(store, claim, used=dict(used or {}))
    root, now = before.get("root"), (used or {}).get("root")
    if tell and root and now and root != now:
        tell(f"{store}: its maps are of the images in {root}, now in {now}: where those are others, delete it")
    todo = []
    for sample in samples:
        path = store / sample.prediction_path
        if path.exists() and (damage := _damage(path)):
            if tell:
                tell(f"{path}: {damage}; predicted again")
            todo.append(sample)
        elif not path.exists():
            todo.append(sample)
    done = len(samples) - len(todo)
    if report:
        report(done, len(samples))
    for sample, image in _images(todo):
        more: dict[str, Any] = {"keys": [sample.key]} if teacher.card.seeded else {}
        more |= {"focal": sample.focal()} if told and sample.focal else {}
        with torch.inference_mode():
            depth = teacher.predict(image[None], **more)
        if depth.kind != teacher.card.kind or depth.values.shape[-2:] != image.shape[-2:]:
            raise ValueError(
                f"{teacher.card.name} gave {depth.kind} of {tuple(depth.values.shape[-2:])} for {sample.key}; its card "
                f"says {teacher.card.kind}, and the image is {tuple(image.shape[-2:])}"
            )
        values = torch.where(depth.valid, depth.values, torch.nan)[0].cpu().numpy().astype(np.float32)
        with files.writing(store / sample.prediction_path) as new, new.open("wb") as file:
            np.save(file, values)
        done += 1
        if report:
            report(done, len(samples))
    return len(todo)


def read_settings(store: Path | str) -> dict[str, Any] | None:
    """What `predict` wrote beside the maps: "model", "kind", "settings", "used"; None where somebody else made them."""
    path = Path(store) / SETTINGS
    if not path.is_file():
        return None
    try:
        table = json.loads(files.decoded(path.read_bytes()))
        claim = {"model": str(table["model"]), "kind": str(Kind(table["kind"])), "settings": dict(table["settings"])}
        return {**claim, "used": dict(table.get("used", {}))}
    except (ValueError, KeyError, TypeError) as error:
        what = error if isinstance(error, ValueError) else "model, kind and settings are not in it"
        raise ValueError(
            f"{path}: not settings of stored predictions ({what}); rename it if it is another program's, or "
            "predict into a new folder"
        ) from error


def find_prediction(store: Path, sample: BenchmarkSample) -> Path:
    """Where a sample's map lies: under Marigold's name or `distill predict`'s, in any format that is read.

    `Sample.prediction_path` where there is none. The rule of names is distill.data.maps.stored_stems.
    """
    named = store / sample.prediction_path
    if named.is_file():
        return named
    keys = [sample.key, sample.photo, sample.prediction_path.removesuffix(".npy")]
    return find_map(store, filter(None, keys)) or named


def read_prediction(
    path: Path,
    size: tuple[int, int] | None,
    kind: Kind | None = None,
    *,
    crop: str = "none",
    image: Callable[[], Tensor] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """A stored map as (H,W) float32, and remarks on how it was stored; BadPredictionError says why it is no such map.

    size: what (H,W) must be, None where nobody knows. Axes of length 1 are dropped. Any format of distill.data.maps and
    any real dtype is read; below float32 the loss of precision is remarked on. kind: of the map; a metric one may not
    be integers, whose unit nobody knows. crop: what the protocol cuts out of image and truth, in words. image: to be
    looked at, (3,H,W), where sizes differ: the truth may be of another than its image's.
    """
    try:
        values = read_map(path, kind.quantity if kind else "depth")
    except FileNotFoundError:
        raise BadPredictionError("missing") from None
    except OSError as error:
        raise BadPredictionError(str(error)) from error
    if size not in (None, values.shape):
        if image is not None and tuple(image().shape[-2:]) == values.shape:
            raise BadPredictionError(f"the truth is {size}, and its image {values.shape} as the map: store one size")
        way = "resize to the image" if crop == "none" else f"scored is the {crop}: cut the map alike"
        raise BadPredictionError(f"has the shape {values.shape}, the truth {size}: {way} before storing")
    whole = values.dtype.kind != "f"
    if whole and kind in (Kind.METRIC_DEPTH, Kind.METRIC_DISPARITY) and path.suffix.lower() != ".npy":
        raise BadPredictionError(
            f"integers ({values.dtype}) of no known unit: store metres as .npy, or score another kind"
        )
    remarks = [] if values.dtype.itemsize >= 4 and not whole else [f"stored as {values.dtype}"]
    return np.ascontiguousarray(values, dtype=np.float32), remarks


def _damage(path: Path) -> str:
    """What is wrong with a map that `predict` stored, or nothing. Mapped: its numbers are not read."""
    try:
        values = np.load(path, allow_pickle=False, mmap_mode="r")
    except READ_ERRORS as error:
        return _unreadable(error)
    whole = isinstance(values, np.ndarray) and values.ndim == 2 and values.dtype == np.float32
    return "" if whole else "not a map of float32"


def _unreadable(error: Exception) -> str:
    return f"not a readable .npy ({str(error).splitlines()[0] if str(error) else 'empty'})"


def _claim(store: Path, wanted: dict[str, Any], *, used: dict[str, Any]) -> dict[str, Any]:
    """Make the folder ours for these settings, or raise ValueError where it is not; what was `used` for maps in it.

    Maps of the same weights and settings were made in the same way: what an older settings.json lacks is added.
    """
    wanted = json.loads(json.dumps(wanted))
    settings_there = read_settings(store)
    known = settings_there.pop("used") if settings_there else {}
    if settings_there == wanted:
        if used and not known:
            files.write_json(store / SETTINGS, {**wanted, "used": used}, sort_keys=True, allow_nan=True)
        return known
    if settings_there is not None:
        a, b = ({**table, **table["settings"]} for table in (settings_there, wanted))
        names = sorted(key for key in a.keys() | b.keys() if key != "settings" and a.get(key) != b.get(key))
        differ = ", ".join(f"{key} {a.get(key)!r}, now {b.get(key)!r}" for key in names)
        raise ValueError(
            f"{store} holds predictions of other settings ({differ}); use another folder, or delete this one"
        )
    if store.exists() and next(store.rglob("*.npy"), None) is not None:
        raise ValueError(f"{store} holds predictions with no {SETTINGS}, made by somebody else; use another folder")
    whole = {**wanted, "used": used} if used else wanted
    files.write_json(store / SETTINGS, whole, sort_keys=True, allow_nan=True)
    return {}


def _images(samples: Sequence[BenchmarkSample]) -> Iterator[tuple[BenchmarkSample, Tensor]]:
    """Each sample with its image; the next one is decoded while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(samples[0].image) if samples else None
        for index, sample in enumerate(samples):
            assert ahead is not None
            image = ahead.result()
            ahead = pool.submit(samples[index + 1].image) if index + 1 < len(samples) else None
            yield sample, image
