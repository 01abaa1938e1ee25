"""Prediction of depth maps: files, folders, globs and videos in, pictures and arrays out.

Every file is written under a temporary name and renamed, so existing files are complete, and a second call only makes
what is missing or was made from a file that has changed since (inference.outputs). A photo that cannot be used is one
line in the outcome, and the others are still processed. Surprise: a map of affine disparity has no unit, so the 16-bit
picture stretches each map to its own range and stores that range in the file ("low" and "high" of its text:
value = low + code / 65535 * (high - low); with "invalid", code 0 is a pixel without a value); a video uses one slowly
moving range, or it would flicker.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from distill.core import files, machine
from distill.core.depth import DepthMap, Kind
from distill.core.division import unit_range
from distill.core.plugins import find as find_plugin
from distill.core.plugins import option_faults
from distill.core.progress import Report
from distill.data.photos import BadImageError, decode
from distill.eval.reports.figures import NEARNESS, colourise
from distill.inference import solid, video
from distill.inference.inputs import Survey, survey
from distill.inference.outputs import FILMS, SETTINGS, SOLID, Outputs, PredictionJob
from distill.inference.pictures import checked, within_jpeg
from distill.inference.solid import Lens
from distill.students import checkpoint
from distill.teachers import Teacher as AnyTeacher
from distill.teachers.checkpoint import Teacher

__all__ = [
    "Estimator",
    "PredictOutcome",
    "PredictionJob",
    "Survey",
    "coloured",
    "load",
    "load_teacher",
    "nearness",
    "read",
    "run",
    "survey",
    "write_map",
]


class Estimator:
    """A student or a teacher that accepts photos of any size.

    `predict` returns a DepthMap (B,H,W) at the size of the images; its `kind` depends on the model: affine disparity,
    larger is nearer, for most students.
    """

    def __init__(self, teacher: AnyTeacher, options: Mapping[str, Any] | None = None) -> None:
        """options: those that the teacher was loaded with, if not its defaults."""
        self._teacher, self.options = teacher, dict(options or {})
        self.card = teacher.card
        self.takes_focal: bool = getattr(teacher, "takes_focal", False)

    @torch.no_grad()
    def predict(self, images: Tensor, *, focal: float | None = None) -> DepthMap:
        """images: (3,H,W) or (B,3,H,W), uint8, or float in [0,1]; RGB. ValueError with advice for anything else.

        focal: the camera's focal length in pixels of the images, for a model that `takes_focal`.
        """
        images = checked(images)
        batch = images[None] if images.ndim == 3 else images
        focal_option: Any = {"focal": focal} if self.takes_focal and focal is not None else {}
        return self._teacher.predict(unit_range(batch) if batch.dtype == torch.uint8 else batch, **focal_option)


def load(
    student: str | Path = "pocket",
    *,
    device: str = "auto",
    size: int | None = None,
    encoder_weights: str | None = None,
) -> Estimator:
    """Load the student of a run or in a folder, "pocket", or OWNER/NAME on the hub (students.checkpoint.fetch).

    device: "auto" is CUDA, then Apple's GPU, then the CPU. size: the short side at which it runs, instead of its own.
    Raises ValueError for a device that cannot be used here, or a size below one patch.
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be a positive number of pixels, not {size}")
    resolved = machine.usable_device(device)
    folder = checkpoint.fetch(student)
    teacher = Teacher.load(str(folder), device=resolved, native_size=size, encoder_weights=encoder_weights)
    if size is not None and size < teacher.card.multiple:
        patch = teacher.card.multiple
        raise ValueError(f"size {size} is less than one patch of {student} ({patch} pixels): give {patch} or more")
    return Estimator(teacher)


def load_teacher(name: str, weights: str | Path | None = None, *, device: str = "auto", **options: Any) -> Estimator:
    """Load the teacher `name`, or that in the file `name`, with `weights` (None: those of its first card) and options.

    Raises LookupError for an unknown teacher, ValueError for options that it does not have or a device that cannot be
    used, OSError for missing weights.
    """
    module = find_plugin("distill.teachers", name)
    if faults := option_faults(module.Teacher.load, options, "options"):
        raise ValueError(f"{name}: {'; '.join(faults)}")
    resolved = machine.usable_device(device)
    return Estimator(module.Teacher.load(str(weights or module.CARDS[0].weights), device=resolved, **options), options)


def read(path: str | Path) -> Tensor:
    """Read an image file as (3,H,W) uint8 RGB, EXIF rotation applied; BadImageError with the reason, or OSError."""
    return decode(Path(path).read_bytes())


@dataclass
class PredictOutcome:
    """Result of a call: inputs written now, inputs already present, and "path: reason" of those that failed."""

    written: int = 0
    present: int = 0
    problems: list[str] = field(default_factory=list)


def run(
    estimator: Estimator,
    jobs: Sequence[PredictionJob],
    *,
    out: Path,
    formats: Sequence[str] = ("png", "side"),
    report: Report,
    lens: Lens | None = None,
) -> PredictOutcome:
    """Predict every job for which `out` has no maps made from the current state of its file.

    lens: the camera of the 3D formats, if the caller knows it.
    report: (done, total) inputs, and within a video frame and frames (0: unknown).
    Raises ValueError if `out` holds the predictions of another student or size or another process writes there, and
    what Outputs raises.
    """
    with Outputs(out).locked() as outputs:
        return _run(estimator, jobs, outputs, formats, report, lens)


def _run(
    estimator: Estimator,
    jobs: Sequence[PredictionJob],
    outputs: Outputs,
    formats: Sequence[str],
    report: Report,
    lens: Lens | None,
) -> PredictOutcome:
    lens = lens or Lens()
    uses_lens = estimator.takes_focal or not SOLID.keys().isdisjoint(formats)
    _check_settings(estimator, outputs.folder, lens if uses_lens else None)
    outcome = PredictOutcome()
    for done, job in enumerate(jobs):
        report(done, len(jobs))
        try:
            if job.is_video:
                was_written = _video(estimator, job, outputs, formats, partial(report, done, len(jobs)), lens)
            else:
                was_written = _photo(estimator, job, outputs, formats, lens)
            outcome.written += was_written
            outcome.present += not was_written
        except (BadImageError, OSError, MemoryError, RuntimeError) as error:
            if not (problem := _problem(job, error)):
                raise
            is_full = isinstance(error, OSError) and error.errno in files.DISK_FULL  # the rest would be in vain
            untried = f"; the {len(jobs) - done - 1} after it were not tried: make room and rerun" if is_full else ""
            outcome.problems.append(problem + untried)
            if is_full:
                return outcome
    report(len(jobs), len(jobs))
    return outcome


def _problem(job: PredictionJob, error: Exception) -> str:
    """Return the line for an input that could not be used, or "" for an error that the input did not cause."""
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        return f"{job.path}: not enough memory; --size N or a smaller image"
    if isinstance(error, OSError):
        source = f" (a map of {job.path})" if error.filename and Path(error.filename) != job.path else ""
        advice = ": give the photo a shorter name" if error.errno == errno.ENAMETOOLONG else ""
        return f"{error.filename or job.path}: {error.strerror or error}{source}{advice}"
    if isinstance(error, BadImageError):
        return f"{job.path}: {error}"
    # PyTorch has an exception class only for CUDA; on a CPU or Apple's GPU it is a RuntimeError with these words.
    phrases = ("out of memory", "not enough memory", "allocate memory")
    if isinstance(error, torch.OutOfMemoryError) or any(phrase in str(error) for phrase in phrases):
        return f"{job.path}: not enough memory; --size N or a smaller image"
    return ""


def _check_settings(estimator: Estimator, out: Path, lens: Lens | None) -> None:
    """Write what makes the maps of a folder; ValueError if it holds maps that something else made.

    lens: None if no map depends on the camera; the folder's earlier one is then kept.
    """
    card, path = estimator.card, out / SETTINGS
    settings = {"student": card.weights, "revision": card.revision, "size": card.native_size, "kind": str(card.kind)}
    camera = json.loads(json.dumps(asdict(lens))) if lens else None
    options = json.loads(json.dumps(estimator.options, default=str))
    if path.is_file():
        try:
            existing = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key in ("revision", "size") if existing[key] != settings[key]]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path}: damaged, or not from distill predict; give another --out, or delete this file if the maps "
                "beside it are of this student and size"
            ) from error
        earlier_camera = existing.get("camera")
        differing += ["options"] if existing.get("options", {}) != options else []
        differing += ["camera"] if camera and earlier_camera and camera != earlier_camera else []
        camera = camera or earlier_camera
        if differing:
            raise ValueError(
                f"{out}: holds predictions with another {' and '.join(differing)} ({existing.get('student')}); "
                "give another --out"
            )
    settings |= {"camera": camera} if camera else {}
    settings |= {"options": options} if options else {}
    files.write_json(path, settings | {"licence": card.licence})


def _photo(estimator: Estimator, job: PredictionJob, outputs: Outputs, formats: Sequence[str], lens: Lens) -> bool:
    """Write one photo's missing outputs; returns False if there are none."""
    entry = outputs.record_of(job)
    missing = outputs.missing(entry, formats)
    if not missing:
        return False
    photo = read(job.path)
    depth = estimator.predict(photo, **_focal(estimator, job, photo, lens))
    values = _whole(depth, photo)
    rgb = photo.permute(1, 2, 0).numpy()
    entry = outputs.begin(entry, missing)
    for name in missing:
        path = outputs.path(entry, name)
        if name in SOLID:
            solid_inputs = (depth.values[0], depth.valid[0], depth.kind, rgb, lens.of(job.path, *values.shape))
            files.write_bytes(path, solid.encode(name, *solid_inputs, far=lens.far, title=job.path.name))
        else:
            write_map(path, name, values, rgb, str(estimator.card.kind))
    outputs.finish(entry, missing)
    return True


def _focal(estimator: Estimator, job: PredictionJob, image: Tensor, lens: Lens) -> dict[str, float]:
    """Return the focal length of an image (3,H,W) as an option, for a model that takes it."""
    return {"focal": lens.of(job.path, *image.shape[-2:]).focal} if estimator.takes_focal else {}


def _whole(depth: DepthMap, photo: Tensor) -> np.ndarray:
    """Return the map's values (H,W), NaN where the model gives none, as some do for sky; BadImageError for a useless
    map, as from a student whose training diverged.

    photo: (3,H,W); a constant map is accepted only for a constant photo.
    """
    values, valid = depth.values[0].numpy(), depth.valid[0].numpy()
    usable = np.isfinite(values) & valid
    if not valid.any():
        raise BadImageError("the model leaves out every pixel of it: there is no map")
    if (usable != valid).any():
        share = 100 * float(usable.mean())
        raise BadImageError(f"the model's map is not finite ({share:.0f} % of it is): its training has diverged")
    valid_values = values[valid]
    if valid_values.size > 1 and valid_values.min() == valid_values.max() and photo.min() < photo.max():
        raise BadImageError(f"the model's map is {valid_values[0]:g} everywhere: its training has collapsed")
    return values if valid.all() else np.where(valid, values, np.float32(np.nan))


def write_map(path: Path, name: str, values: np.ndarray, rgb: np.ndarray, kind: str, *, durable: bool = True) -> None:
    """Write a map (H,W), not NaN everywhere, as one of outputs.FORMATS; rgb: (H,W,3) uint8.

    NaN marks a pixel without a value: NaN in "npy", grey in colours, code 0 in "png", whose text then has "invalid"
    = "0"; no other pixel has that code.
    """
    with files.writing(path, durable=durable) as new, new.open("wb") as file:
        if name == "npy":
            buffer = io.BytesIO()  # straight into a file, NumPy hides the reason why it cannot be written
            np.save(buffer, values)
            file.write(buffer.getbuffer())
        elif name == "png":
            png_text = PngImagePlugin.PngInfo()
            low, high, invalid_text = float(np.nanmin(values)), float(np.nanmax(values)), {}
            if np.isnan(values).any():
                low -= (high - low) / 65534 or max(abs(high), 1.0)
                invalid_text = {"invalid": "0"}
            for key, value in {"kind": kind, "low": repr(low), "high": repr(high), **invalid_text}.items():
                png_text.add_text(key, value)
            codes = (np.nan_to_num(_position(values, (low, high))) * 65535).round().astype(np.uint16)
            Image.fromarray(codes).save(file, "PNG", pnginfo=png_text)
        else:
            near = nearness(values, kind)
            picture = coloured(near, _shown(near))
            if name == "colour":
                Image.fromarray(picture).save(file, "PNG")
            else:
                side_by_side = within_jpeg(np.concatenate([rgb, picture], axis=1))
                Image.fromarray(np.ascontiguousarray(side_by_side)).save(file, "JPEG", quality=92)


def nearness(values: np.ndarray, kind: str) -> np.ndarray:
    """The values to colour, (H,W): larger is nearer. Depth is inverted, or negated if its shift is unknown."""
    kind_ = Kind(kind)
    if kind_.quantity == "disparity":
        return values
    return -values if kind_.unknown == "affine" else 1.0 / np.maximum(values, 1e-3)


def coloured(values: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Colour values (H,W) as (H,W,3) uint8: near is bright."""
    return colourise(_position(values, span), np.isfinite(values), NEARNESS)


def _shown(values: np.ndarray) -> tuple[float, float]:
    """The range of the colours: percentiles, so that a few extreme pixels do not darken the rest."""
    low, high = np.nanpercentile(values, [1, 99])
    return float(low), float(high)


def _position(values: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    low, high = span
    return np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)


def _video(
    estimator: Estimator,
    job: PredictionJob,
    outputs: Outputs,
    formats: Sequence[str],
    report: Callable[..., None],
    lens: Lens,
) -> bool:
    """Write frames as STEM/NNNNNN.png and .npy, colours and side by side as a STEM_*.mp4 each; False if all exist.

    STEM.json is written last and marks the video as complete. The decodable part of a damaged video is kept.
    """
    entry = outputs.record_of(job)
    if not (formats := [name for name in formats if name not in SOLID]):
        raise BadImageError(f"a video has no {', '.join(SOLID)}: give one of its frames, or other formats")
    missing = outputs.missing(entry, formats)
    if not missing:
        return False
    span: tuple[float, float] | None = None
    count = 0
    film = video.Film(job.path)
    with contextlib.ExitStack() as stack:
        films: dict[str, Callable[[np.ndarray, float], None]] = {}
        for rgb in film:
            report(frame=count, frames=film.total)
            if not count:
                entry = outputs.begin(entry, missing)
                films = {n: stack.enter_context(video.writer(outputs.path(entry, n))) for n in missing if n in FILMS}
            frame_formats = [
                name for name in missing if name not in FILMS and not outputs.path(entry, name, count).is_file()
            ]
            if frame_formats or films:
                frame_rgb = torch.from_numpy(rgb).permute(2, 0, 1)
                values = _whole(estimator.predict(frame_rgb, **_focal(estimator, job, frame_rgb, lens)), frame_rgb)
                for name in frame_formats:
                    frame_path = outputs.path(entry, name, count)
                    write_map(frame_path, name, values, rgb, str(estimator.card.kind), durable=False)
                near = nearness(values, str(estimator.card.kind))
                shown = _shown(near)
                span = shown if span is None else (0.9 * span[0] + 0.1 * shown[0], 0.9 * span[1] + 0.1 * shown[1])
                picture = coloured(near, span)
                for name, write in films.items():
                    write(picture if name == "colour" else np.concatenate([rgb, picture], axis=1), film.rate)
            count += 1
    if film.problem:
        raise BadImageError(film.problem)
    if any(name not in FILMS for name in missing):  # once: syncing after every frame doubles the time
        files.sync_tree(outputs.folder / entry.stem)
    facts = {"frames": count, "formats": sorted({*entry.formats, *missing})}
    files.write_json(outputs.folder / f"{entry.stem}.json", facts, indent=None)
    outputs.finish(entry, missing, frames=count)
    return True
