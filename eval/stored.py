"""Predictions on disk, named as in Marigold's evaluation: predict, store, then score.

A store is a folder of float32 `.npy` maps of the image's size, one per image at its `prediction_path`, in the
predictor's own kind, NaN where its map is invalid. `predict` also writes a settings.json, which records the model and
its settings; a store of another program's predictions has none. Stored maps of other settings are never overwritten or
mixed with new ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.core import files
from distill.core.depth import Kind
from distill.core.progress import Report
from distill.core.wording import first_line
from distill.data.maps import READ_ERRORS, find_map, read_map
from distill.data.orientation import of_size
from distill.data.packing import Gapped
from distill.eval.benchmarks import BenchmarkSample
from distill.teachers import Teacher

SETTINGS = "settings.json"
FOCAL = {"focal": "each image's own"}
"""Added to the settings of maps whose model was given focal lengths."""


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
    """Store the teacher's map of every sample, and return how many were newly predicted.

    settings: what the maps depend on besides the image (weights, resolution, steps, the benchmark, ...), as plain JSON
    values; written to settings.json with the teacher's name and kind. used: the teacher's settings in effect, defaults
    included; written beside them, and never a reason to reject maps. Existing maps are kept, so that an interrupted run
    continues; if they were made with other settings, ValueError says which and what to do, and if "root" in `used`
    differs from theirs, `tell` is called with a warning. Use one folder per benchmark. Each map is written to a
    temporary file and renamed; one that was damaged since is predicted again and reported to `tell`. A teacher that
    takes the camera's focal length gets each image's, where the benchmark knows it.
    """
    store = Path(store)
    gives_focal = getattr(teacher, "takes_focal", False) and any(sample.focal for sample in samples)
    settings = {**settings, **FOCAL} if gives_focal else settings
    claim = {"model": teacher.card.name, "kind": str(teacher.card.kind), "settings": dict(settings)}
    stored_used = _claim(store, claim, used=dict(used or {}))
    stored_root, root = stored_used.get("root"), (used or {}).get("root")
    if tell and stored_root and root and stored_root != root:
        tell(f"{store}: its maps are of the images in {stored_root}, now in {root}; if the images differ, delete it")
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
        kwargs: dict[str, Any] = {"keys": [sample.key]} if teacher.card.seeded else {}
        kwargs |= {"focal": sample.focal()} if gives_focal and sample.focal else {}
        with torch.inference_mode():
            depth = teacher.predict(image[None], **kwargs)
        if depth.kind != teacher.card.kind or depth.values.shape[-2:] != image.shape[-2:]:
            raise ValueError(
                f"{teacher.card.name} predicted {depth.kind} of {tuple(depth.values.shape[-2:])} for {sample.key}, but "
                f"its card says {teacher.card.kind}, and the image is {tuple(image.shape[-2:])}"
            )
        values = torch.where(depth.valid, depth.values, torch.nan)[0].cpu().numpy().astype(np.float32)
        with files.writing(store / sample.prediction_path) as new, new.open("wb") as file:
            np.save(file, values)
        done += 1
        if report:
            report(done, len(samples))
    return len(todo)


def read_settings(store: Path | str) -> dict[str, Any] | None:
    """What `predict` wrote beside the maps: "model", "kind", "settings", "used"; None if another program made them."""
    path = Path(store) / SETTINGS
    if not path.is_file():
        return None
    try:
        table = json.loads(files.decoded(path.read_bytes()))
        claim = {"model": str(table["model"]), "kind": str(Kind(table["kind"])), "settings": dict(table["settings"])}
        return {**claim, "used": dict(table.get("used", {}))}
    except (ValueError, KeyError, TypeError) as error:
        reason = error if isinstance(error, ValueError) else "model, kind or settings is missing"
        raise ValueError(
            f"{path}: not the settings of stored predictions ({reason}); rename it if another program wrote it, or "
            "predict into a new folder"
        ) from error


def find_prediction(store: Path, sample: BenchmarkSample) -> Path:
    """The path of a sample's map, named as by Marigold or `distill predict`, in any readable format.

    `BenchmarkSample.prediction_path` if there is none. The rule of names is distill.data.maps.stored_stems.
    """
    named = store / sample.prediction_path
    if named.is_file():
        return named
    # A photo that lies elsewhere than its key says still gives its suffix to a map: a.jpg.npy.
    named_as_photo = f"{sample.key}{PurePosixPath(sample.photo).suffix}" if sample.photo else ""
    keys = [sample.key, sample.photo, sample.prediction_path.removesuffix(".npy"), named_as_photo]
    return find_map(store, filter(None, keys)) or named


def read_prediction(
    path: Path,
    size: tuple[int, int] | None,
    kind: Kind | None = None,
    *,
    crop: str = "none",
    image: Callable[[], Tensor] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Read a stored map as (H,W) float32, with remarks on how it was stored; raises BadPredictionError with the reason.

    size: the required (H,W), None if unknown. Axes of length 1 are dropped. Any format of distill.data.maps and any
    real dtype is read; precision below float32 is remarked on. kind: of the map; a metric one must not be integers of
    unknown unit. crop: the protocol's crop of image and truth, in words. image: () -> (3,H,W), read if the sizes
    differ, to tell whether the truth's size is that of its image.
    """
    try:
        is_metric = kind in (Kind.METRIC_DEPTH, Kind.METRIC_DISPARITY)
        values = read_map(path, kind.quantity if kind else "", scale=1.0 if is_metric else None)
    except FileNotFoundError:
        raise BadPredictionError("missing") from None
    except OSError as error:
        raise BadPredictionError(str(error)) from error
    values = values if size is None else of_size(values, path, size)
    if size not in (None, values.shape):
        if image is not None and tuple(image().shape[-2:]) == values.shape:
            raise BadPredictionError(
                f"the truth is {size}, but its image and the map are {values.shape}: store them in one size"
            )
        if size == values.shape[::-1]:
            raise BadPredictionError(
                f"the map is {values.shape}, but the truth is {size}: it lies on its side; turn it"
            )
        remedy = "resize it to the image" if crop == "none" else f"crop it like the truth ({crop})"
        raise BadPredictionError(f"the map is {values.shape}, but the truth is {size}: {remedy} before storing")
    is_integer = values.dtype.kind != "f"
    if (is_integer or isinstance(values, Gapped)) and is_metric and path.suffix.lower() != ".npy":
        raise BadPredictionError(
            f"integers ({values.dtype}{'' if is_integer else ' with gaps'}) of unknown unit: store metres as .npy, or "
            "score another kind"
        )
    remarks = [] if values.dtype.itemsize >= 4 and not is_integer else [f"stored as {values.dtype}"]
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which is told
        return np.ascontiguousarray(values, dtype=np.float32), remarks


def _damage(path: Path) -> str:
    """What is wrong with a map that `predict` stored, or "". Memory-mapped: its values are not read."""
    try:
        values = np.load(path, allow_pickle=False, mmap_mode="r")
    except READ_ERRORS as error:
        return _unreadable(error)
    intact = isinstance(values, np.ndarray) and values.ndim == 2 and values.dtype == np.float32
    return "" if intact else "not a map of float32"


def _unreadable(error: Exception) -> str:
    return f"not a readable .npy ({first_line(error)})"


def _claim(store: Path, wanted: dict[str, Any], *, used: dict[str, Any]) -> dict[str, Any]:
    """Claim the folder for these settings, or raise ValueError if it has others; returns what was `used` for its maps.

    Maps of the same weights and settings were made in the same way: `used` is added to a settings.json without it.
    """
    wanted = json.loads(json.dumps(wanted))
    stored = read_settings(store)
    stored_used = stored.pop("used") if stored else {}
    if stored == wanted:
        if used and not stored_used:
            files.write_json(store / SETTINGS, {**wanted, "used": used}, sort_keys=True, allow_nan=True)
        return stored_used
    if stored is not None:
        a, b = ({**table, **table["settings"]} for table in (stored, wanted))
        names = sorted(key for key in a.keys() | b.keys() if key != "settings" and a.get(key) != b.get(key))
        differ = ", ".join(f"{key} {a.get(key)!r}, now {b.get(key)!r}" for key in names)
        raise ValueError(
            f"{store} holds predictions made with other settings ({differ}); use another folder, or delete this one"
        )
    has_maps = store.exists() and next(store.rglob("*.npy"), None) is not None
    if has_maps and not (store / SETTINGS).is_file():
        raise ValueError(f"{store} holds predictions without {SETTINGS}, made by another program; use another folder")
    content = {**wanted, "used": used} if used else wanted
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=True) + "\n"
    if files.write_new(store / SETTINGS, text.encode()):
        return {}
    return _claim(store, wanted, used=used)  # another process was faster: its settings count


def _images(samples: Sequence[BenchmarkSample]) -> Iterator[tuple[BenchmarkSample, Tensor]]:
    """Yield each sample with its image; the next image is decoded while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(samples[0].image) if samples else None
        for index, sample in enumerate(samples):
            assert ahead is not None
            image = ahead.result()
            ahead = pool.submit(samples[index + 1].image) if index + 1 < len(samples) else None
            yield sample, image
