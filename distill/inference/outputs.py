"""The output folder of `distill predict`: which input produced which file, and unique names for all inputs.

Every step appends a line to SOURCES; an input's last line counts. One line is written before the files that it
announces ("begun") and another after them ("formats"), so a kill leaves no map that could be taken for another input's;
a line cut by a kill is ignored, and that work is repeated. Files that the record does not name were not made here: they
are never overwritten, deleted or left out of the inputs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from distill.core import files
from distill.data import filetypes

SOLID = {"ply": ".ply", "glb": ".glb", "view": "_view.html"}
"""The 3D formats, for photographs only: points, a textured surface, a page that shows the points offline."""
FORMATS = {"png": ".png", "npy": ".npy", "colour": "_colour.png", "side": "_side.jpg", **SOLID}
"""All formats and their file endings: 16-bit picture, float32 values, colours, photo beside colours, SOLID."""
FILMS = {"colour": "_colour.mp4", "side": "_side.mp4"}
"""Formats of a video that are one file each; in the others every frame is a file, STEM/NNNNNN.png."""
SETTINGS = "predict.json"
SOURCES = "predict_sources.jsonl"
LOCK = ".predict.lock"


@dataclass(frozen=True, slots=True)
class PredictionJob:
    """One input and the stem of its outputs, relative to the output folder."""

    path: Path
    stem: str

    @property
    def is_video(self) -> bool:
        """True for a file whose suffix is a video's."""
        return is_video(self.path)


def is_video(path: str | Path) -> bool:
    """True for a file whose suffix is a video's."""
    return Path(path).suffix.lower() in filetypes.FILMS


@dataclass(frozen=True, slots=True)
class OutputRecord:
    """The outputs of one input: its path, size and mtime then; `formats` are complete, `begun` may not be."""

    stem: str
    source: str
    size: int
    mtime_ns: int
    formats: tuple[str, ...] = ()
    begun: tuple[str, ...] = ()
    frames: int = 0

    def names(self, formats: Iterable[str] = tuple(FORMATS)) -> set[str]:
        """The files of `formats`, relative to the folder; "v/*.png" for the frames of a video."""
        if is_video(self.source):
            return {f"{self.stem}.json", *(f"{self.stem}{FILMS.get(f, '/*' + FORMATS[f])}" for f in formats)}
        return {f"{self.stem}{FORMATS[f]}" for f in formats}

    def has_frames(self, name: str) -> bool:
        """True for a format with one file per frame."""
        return name not in FILMS and is_video(self.source)

    def same_input(self, other: OutputRecord) -> bool:
        """True if both have the same stem and the same, unchanged input."""
        this, that = ((m.stem, m.source, m.size, m.mtime_ns) for m in (self, other))
        return this == that


class Outputs:
    """The record of one output folder, read from it; `begin` and `finish` append to it.

    Raises NotADirectoryError if the folder is a file, ValueError if it holds maps without a record.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder}: is a file, and the maps need a folder; give another --out")
        self.folder = folder
        self._records: dict[str, OutputRecord] = {}
        self._own_names = {SETTINGS, SOURCES}
        self._taken_names = {SETTINGS, SOURCES}  # folded by `_folded`
        self._film_stems: set[str] = set()  # the folders of videos' frames
        self._numbered_folders: set[str] = set()  # folders of photos whose maps are named like frames
        self._last_numbers: dict[tuple[str, bool], int] = {}  # of the stems "wanted_2", "wanted_3", ...
        self._ends_in_cut_line = False
        record = folder / SOURCES
        if record.is_file():
            text = record.read_text(encoding="utf-8", errors="replace")
            self._ends_in_cut_line = bool(text) and not text.endswith("\n")
            for made in {made.source: made for made in map(_parse, text.splitlines()) if made}.values():
                self._remember(made)
        elif (folder / SETTINGS).is_file() and any(path.name != SETTINGS for path in folder.iterdir()):
            raise ValueError(
                f"{folder}: holds maps of an earlier version, which did not note the photos that they were made from; "
                "give another --out"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[Outputs]:
        """Prepare the folder and lock it for this process; yields its record as it is then.

        ValueError if another process holds it: two would delete each other's unfinished files and choose equal names.
        """
        self.prepare()
        lock = files.take_lock(self.folder / LOCK)
        if lock is None:
            raise ValueError(f"{self.folder}: another predict writes here; wait for it or give another --out")
        try:
            yield Outputs(self.folder)
        finally:
            lock.release()

    def _remember(self, made: OutputRecord) -> None:
        self._records[made.source] = made
        self._own_names |= made.names((*made.formats, *made.begun))
        self._reserve(made.stem, made.source)

    def prepare(self) -> None:
        """Create the folder and its record; OSError names the folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / SOURCES).touch()
        except OSError as error:
            reason = "a link to nothing" if self.folder.is_symlink() and not self.folder.exists() else error.strerror
            raise OSError(f"{self.folder}: cannot be written ({reason}); give another --out") from error

    def holds(self, file: Path) -> bool:
        """True for a file that was made here, according to the record."""
        # Path.resolve raises RuntimeError for a link to itself before Python 3.13.
        file, folder = Path(os.path.realpath(file)), self.folder.resolve()
        if not file.is_relative_to(folder):
            return False
        inside = file.relative_to(folder).with_name(files.final_name(file.name))
        frames = inside.with_name(f"*{inside.suffix}") if inside.stem.isdecimal() else inside
        return bool(self._own_names & {inside.as_posix(), frames.as_posix()})

    def stem(self, file: Path, wanted: str) -> str:
        """The stem that this input had before; else `wanted`, with its suffix or a number if a name is taken."""
        source = str(file.resolve())
        if source in self._records:
            return self._records[source].stem
        name, wanted_by = wanted, (wanted, is_video(source))
        if not self._is_free(name, source) and file.suffix:
            name = f"{wanted}_{file.suffix.lstrip('.').lower()}"
        while not self._is_free(name, source):  # from the last number on: ten thousand photos may be called frame.jpg
            self._last_numbers[wanted_by] = count = self._last_numbers.get(wanted_by, 1) + 1
            name = f"{wanted}_{count}"
        self._reserve(name, source)
        return name

    def _reserve(self, stem: str, source: str) -> None:
        self._taken_names |= {_folded(name) for name in (*OutputRecord(stem, source, 0, 0).names(), stem)}
        folder, _, last = stem.rpartition("/")
        if is_video(source):
            self._film_stems.add(stem)
        elif last.isdecimal():
            self._numbered_folders.add(folder)

    def _is_free(self, stem: str, source: str) -> bool:
        names = OutputRecord(stem, source, 0, 0).names()
        folder, _, last = stem.rpartition("/")
        if is_video(source):
            collides = stem in self._numbered_folders or any(p.stem.isdecimal() for p in (self.folder / stem).glob("*"))
        else:
            collides = last.isdecimal() and folder in self._film_stems
        taken = any(_folded(name) in self._taken_names for name in (*names, stem))
        return not collides and not taken and not any(_exists(self.folder / name) for name in names)

    def record_of(self, job: PredictionJob) -> OutputRecord:
        """The record of the input in its current state: empty if it is new or has changed; OSError if it is gone."""
        stat = job.path.stat()
        current = OutputRecord(job.stem, str(job.path.resolve()), stat.st_size, stat.st_mtime_ns)
        previous = self._records.get(current.source)
        return previous if previous is not None and previous.same_input(current) else current

    def missing(self, made: OutputRecord, formats: Iterable[str]) -> list[str]:
        """Return those of `formats` that are not completely written."""
        needed = {name: made.frames if made.has_frames(name) else 1 for name in formats}
        return [name for name in needed if name not in made.formats or len(self._existing(made, name)) < needed[name]]

    def path(self, made: OutputRecord, name: str, frame: int = 0) -> Path:
        """The path of a format of this input; frame: its number, for a format with one file per frame."""
        if made.has_frames(name):
            return self.folder / made.stem / f"{frame:06d}{FORMATS[name]}"
        ending = FILMS[name] if is_video(made.source) else FORMATS[name]
        return self.folder / f"{made.stem}{ending}"

    def begin(self, made: OutputRecord, formats: Iterable[str]) -> OutputRecord:
        """Record that `formats` are about to be written; outputs of an earlier state of the input are deleted.

        Raises FileExistsError for an existing file of such a name that was not made from this input.
        """
        previous = self._records.get(made.source)
        if previous is not None and previous.stem == made.stem and not previous.same_input(made):
            stale = [path for name in {*previous.formats, *previous.begun} for path in self._existing(previous, name)]
            for path in (*stale, *([self.folder / f"{made.stem}.json"] if is_video(made.source) else [])):
                path.unlink(missing_ok=True)
        for name in {*formats} - {*made.formats, *made.begun}:
            for path in self._existing(made, name):
                raise FileExistsError(errno.EEXIST, "is there, and was not made from this input", str(path))
        return self._append(replace(made, begun=_union(made.begun, formats)))

    def finish(self, made: OutputRecord, formats: Iterable[str], *, frames: int = 0) -> OutputRecord:
        """Record that `formats` are complete; frames: number of a video's frames."""
        done = _union(made.formats, formats)
        begun = tuple(name for name in made.begun if name not in done)
        return self._append(replace(made, formats=done, begun=begun, frames=frames))

    def _append(self, made: OutputRecord) -> OutputRecord:
        path = self.folder / SOURCES
        with files.raising_write_errors(path), path.open("a", encoding="utf-8") as file:
            # A line cut by a kill or a full disk is terminated first, or it would spoil this one.
            newline, self._ends_in_cut_line = "\n" if self._ends_in_cut_line else "", True
            file.write(f"{newline}{json.dumps(asdict(made))}\n")
        self._ends_in_cut_line = False
        self._remember(made)
        return made

    def _existing(self, made: OutputRecord, name: str) -> list[Path]:
        path = self.path(made, name)
        if made.has_frames(name):
            return [frame for frame in path.parent.glob(f"*{path.suffix}") if frame.stem.isdecimal()]
        return [path] if path.is_file() else []


def _folded(name: str) -> str:
    """A name as macOS and Windows compare it: IMG.png equals img.png, and accents have one spelling."""
    return unicodedata.normalize("NFC", name).casefold()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long fails, with its reason, when the file is written
        return False


def _union(*formats: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in FORMATS if any(name in names for names in formats))


def _parse(line: str) -> OutputRecord | None:
    try:
        fields = json.loads(line)
        return OutputRecord(**{**fields, "formats": _union(fields["formats"]), "begun": _union(fields["begun"])})
    except (ValueError, LookupError, TypeError):
        return None
