"""Depth maps for people who only want depth maps: files, folders, globs and videos in, pictures and numbers out.

Every file is written aside and renamed, so that what is there is whole, and a second call does only what is missing. A
photo that cannot be read is one line in the outcome, and the rest is done. Surprise: a map of affine disparity has no
unit, so the 16-bit picture stretches each map to its own range and keeps that range in the file ("low" and "high" of
its text: value = low + code / 65535 * (high - low)); a video keeps one slowly moving range, or it would flicker.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from distill import checkpoint
from distill.depth import DepthMap
from distill.photos import BadImage, decode
from distill.sources import SUFFIXES
from eval.figures import NEARNESS, colourise
from teachers.checkpoint import Teacher

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
FORMATS = {"png": ".png", "npy": ".npy", "colour": "_colour.png", "side": "_side.jpg"}
"""What can be written, and how each file ends: 16-bit picture, float32 values, colours, photo beside colours."""
SETTINGS = "predict.json"

Report = Callable[[int, int], None]


class Estimator:
    """A student that takes photos as they are.

    `predict` gives a DepthMap (B,H,W) of affine disparity, larger is nearer, at the size of the images.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self.card = teacher.card

    @torch.no_grad()
    def predict(self, images: Tensor) -> DepthMap:
        """images: (3,H,W) or (B,3,H,W), uint8, or float in [0,1]; RGB."""
        batch = images[None] if images.ndim == 3 else images
        return self._teacher.predict(batch.float() / 255.0 if batch.dtype == torch.uint8 else batch)


def load(
    student: str | Path = "pocket",
    *,
    device: str = "auto",
    size: int | None = None,
    encoder_weights: str | None = None,
) -> Estimator:
    """The student in a folder, "pocket", or OWNER/NAME on the hub (distill.checkpoint.fetch), ready to predict.

    device: "auto" is CUDA, then Apple's GPU, then the CPU. size: the short side it works at, in place of its own.
    """
    folder = checkpoint.fetch(student)
    on = _device() if device == "auto" else device
    return Estimator(Teacher.load(str(folder), device=on, native_size=size, encoder_weights=encoder_weights))


def read(path: str | Path) -> Tensor:
    """(3,H,W) uint8 RGB of an image file, EXIF rotation applied; BadImage with the reason, OSError where it is not."""
    return decode(Path(path).read_bytes())


@dataclass(frozen=True, slots=True)
class Job:
    """One input and the stem of its outputs, relative to the output folder."""

    path: Path
    stem: str

    @property
    def is_video(self) -> bool:
        """True for a file whose suffix is a video's."""
        return self.path.suffix.lower() in VIDEOS


@dataclass
class Outcome:
    """What a call did: inputs written now, found from before, and "path: reason" of those that could not be used."""

    written: int = 0
    present: int = 0
    problems: list[str] = field(default_factory=list)


def find(inputs: Sequence[str], *, out: Path) -> list[Job]:
    """Photos and videos behind files, folders (searched to the bottom) and globs; what lies in `out` is left out.

    Raises FileNotFoundError for an input that matches nothing.
    """
    jobs: dict[Path, str] = {}
    taken: set[str] = set()
    for given in inputs:
        root = Path(given).expanduser()
        named = [root] if root.exists() else _glob(root)
        before = len(jobs)
        matched = False
        for path in named:
            inside = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in inside:
                usable = file.suffix.lower() in (*SUFFIXES, *VIDEOS) and not file.resolve().is_relative_to(
                    out.resolve()
                )
                if not file.is_file() or (path.is_dir() and not usable):
                    continue
                matched = True
                if file.resolve() not in jobs:
                    stem = file.relative_to(path).with_suffix("").as_posix() if path.is_dir() else file.stem
                    stem = _free(stem, file, taken)
                    jobs[file.resolve()] = stem
        if not matched and len(jobs) == before:
            raise FileNotFoundError(f"{given}: no photo or video there ({', '.join((*SUFFIXES, *VIDEOS))})")
    return [Job(path, stem) for path, stem in jobs.items()]


def _glob(pattern: Path) -> list[Path]:
    rest = str(pattern.relative_to(pattern.anchor))
    return sorted(Path(pattern.anchor or ".").glob(rest)) if rest != "." else []


def _free(stem: str, file: Path, taken: set[str]) -> str:
    """`stem`, or with the suffix or a number at its end where another input has it."""
    name, count = stem, 1
    if name in taken:
        name = f"{stem}_{file.suffix.lstrip('.').lower()}"
    while name in taken:
        count += 1
        name = f"{stem}_{count}"
    taken.add(name)
    return name


def run(
    estimator: Estimator, jobs: Sequence[Job], *, out: Path, formats: Sequence[str] = ("png", "side"), report: Report
) -> Outcome:
    """Predict every job that `out` does not hold yet. report(done, total) counts inputs.

    Raises ValueError where `out` holds the predictions of another student or size.
    """
    out.mkdir(parents=True, exist_ok=True)
    _same_settings(estimator, out)
    outcome = Outcome()
    for done, job in enumerate(jobs):
        report(done, len(jobs))
        try:
            new = _video(estimator, job, out, formats) if job.is_video else _photo(estimator, job, out, formats)
            outcome.written += new
            outcome.present += not new
        except (BadImage, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            outcome.problems.append(f"{job.path}: {reason}")
    report(len(jobs), len(jobs))
    return outcome


def _same_settings(estimator: Estimator, out: Path) -> None:
    card, path = estimator.card, out / SETTINGS
    now = {"student": card.weights, "revision": card.revision, "size": card.native_size, "kind": str(card.kind)}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in ("revision", "size") if before.get(key) != now[key]]
        if differing:
            raise ValueError(
                f"{out}: holds predictions with another {' and '.join(differing)} ({before.get('student')}); "
                "give another --out, or delete it"
            )
    with _aside(path) as new:
        new.write_text(json.dumps(now | {"licence": card.licence}, indent=1) + "\n", encoding="utf-8")


def _photo(estimator: Estimator, job: Job, out: Path, formats: Sequence[str]) -> bool:
    """Write one photo's outputs; False where all of them are there."""
    missing = [name for name in formats if not (out / f"{job.stem}{FORMATS[name]}").is_file()]
    if not missing:
        return False
    photo = read(job.path)
    values = estimator.predict(photo).values[0].numpy()
    low, high = float(values.min()), float(values.max())
    for name in missing:
        path = out / f"{job.stem}{FORMATS[name]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, name, values, photo.permute(1, 2, 0).numpy(), (low, high), str(estimator.card.kind))
    return True


def _write(path: Path, name: str, values: np.ndarray, rgb: np.ndarray, span: tuple[float, float], kind: str) -> None:
    with _aside(path) as new:
        if name == "npy":
            np.save(new, values)
        elif name == "png":
            said = PngImagePlugin.PngInfo()
            for key, value in {"kind": kind, "low": repr(span[0]), "high": repr(span[1])}.items():
                said.add_text(key, value)
            Image.fromarray((_position(values, span) * 65535).round().astype(np.uint16)).save(new, pnginfo=said)
        elif name == "colour":
            Image.fromarray(coloured(values, _shown(values))).save(new)
        else:
            Image.fromarray(np.concatenate([rgb, coloured(values, _shown(values))], axis=1)).save(new, quality=92)


def coloured(values: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """(H,W,3) uint8: near is bright."""
    return colourise(_position(values, span), np.isfinite(values), NEARNESS)


def _shown(values: np.ndarray) -> tuple[float, float]:
    """The range that colours show: a few extreme pixels must not darken the rest."""
    low, high = np.percentile(values, [1, 99])
    return float(low), float(high)


def _position(values: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    low, high = span
    return np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)


# --- videos -----------------------------------------------------------------------------------------------------------


def _video(estimator: Estimator, job: Job, out: Path, formats: Sequence[str]) -> bool:
    """Frames as STEM/NNNNNN.png and .npy, colours and side by side as one STEM_*.mp4 each; False where it is done.

    STEM.json is written last: it says that the video is complete.
    """
    done = out / f"{job.stem}.json"
    wanted = sorted(formats)
    if done.is_file() and set(json.loads(done.read_text(encoding="utf-8"))["formats"]) >= set(wanted):
        return False
    frames = _frames(job.path)
    span: tuple[float, float] | None = None
    count = 0
    with contextlib.ExitStack() as stack:
        films = {name: stack.enter_context(_film(out, job, name)) for name in wanted if name in ("colour", "side")}
        for rgb, rate in frames:
            values = estimator.predict(torch.from_numpy(rgb).permute(2, 0, 1)).values[0].numpy()
            own = float(values.min()), float(values.max())
            shown = _shown(values)
            span = shown if span is None else (0.9 * span[0] + 0.1 * shown[0], 0.9 * span[1] + 0.1 * shown[1])
            for name in (n for n in wanted if n in ("png", "npy")):
                path = out / job.stem / f"{count:06d}{FORMATS[name]}"
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.is_file():
                    _write(path, name, values, rgb, own, str(estimator.card.kind))
            for name, film in films.items():
                picture = coloured(values, span)
                film(picture if name == "colour" else np.concatenate([rgb, picture], axis=1), rate)
            count += 1
        if not count:
            raise BadImage("no frame of this video can be decoded")
    with _aside(done) as new:
        new.write_text(json.dumps({"frames": count, "formats": wanted}) + "\n", encoding="utf-8")
    return True


def _frames(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    """(H,W,3) uint8 RGB frames of a video, each with the frames per second."""
    reader = cv2.VideoCapture(str(path))
    try:
        if not reader.isOpened():
            raise BadImage("OpenCV cannot open this video (a codec that it does not have, or not a video)")
        rate = reader.get(cv2.CAP_PROP_FPS) or 25.0
        while True:
            there, frame = reader.read()
            if not there:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), rate
    finally:
        reader.release()


@contextlib.contextmanager
def _film(out: Path, job: Job, name: str) -> Iterator[Callable[[np.ndarray, float], None]]:
    """A writer of frames to STEM_NAME.mp4, which appears when the block ends well."""
    path = out / f"{job.stem}_{name}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    writer: Any = None

    with _aside(path) as new:

        def write(rgb: np.ndarray, rate: float) -> None:
            nonlocal writer
            # mp4v's chroma wants even sides; one row or column is repeated.
            even = np.pad(rgb, ((0, rgb.shape[0] % 2), (0, rgb.shape[1] % 2), (0, 0)), mode="edge")
            if writer is None:
                writer = cv2.VideoWriter(
                    str(new), cv2.VideoWriter.fourcc(*"mp4v"), rate, (even.shape[1], even.shape[0])
                )
                if not writer.isOpened():
                    raise OSError(f"{path}: OpenCV cannot write this video; ask for png or npy instead")
            writer.write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))

        try:
            yield write
        finally:
            if writer is not None:
                writer.release()


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A name to write to (same suffix) that becomes `path` when the block ends well and is removed otherwise."""
    new = path.with_name(f".new.{path.name}")
    try:
        yield new
        if new.is_file():
            new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
