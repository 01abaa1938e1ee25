"""The folder that `distill predict` fills: which input made which file, and names that no two inputs share.

SOURCES has a line for every step, appended; an input's last line counts. A line goes before the files that it announces
("begun") and another behind them ("formats"), so a kill leaves no map that could be taken for another input's; a line
that it cuts is no line, and that work is done again. What the record does not name was not made here: it is never
overwritten, deleted or left out of the inputs.
"""

from __future__ import annotations

import errno
import json
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from distill.core import files
from distill.data import filetypes

SOLID = {"ply": ".ply", "glb": ".glb", "view": "_view.html"}
"""What has three dimensions, of photographs alone: points, a textured surface, a page that shows the points offline."""
FORMATS = {"png": ".png", "npy": ".npy", "colour": "_colour.png", "side": "_side.jpg", **SOLID}
"""What can be written, and how each file ends: 16-bit picture, float32 values, colours, photo beside colours, SOLID."""
FILMS = {"colour": "_colour.mp4", "side": "_side.mp4"}
"""A video's formats that are one file each; of the others every frame is a file, STEM/NNNNNN.png."""
SETTINGS = "predict.json"
SOURCES = "predict_sources.jsonl"


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
    """What one input has made: its path, bytes and time (ns) then; formats are whole, begun may not be."""

    stem: str
    source: str
    size: int
    mtime_ns: int
    formats: tuple[str, ...] = ()
    begun: tuple[str, ...] = ()
    frames: int = 0

    def names(self, formats: Iterable[str] = tuple(FORMATS)) -> set[str]:
        """The files of `formats`, relative to the folder; "v/*.png" stands for the frames of a video."""
        if is_video(self.source):
            return {f"{self.stem}.json", *(f"{self.stem}{FILMS.get(f, '/*' + FORMATS[f])}" for f in formats)}
        return {f"{self.stem}{FORMATS[f]}" for f in formats}

    def has_frames(self, name: str) -> bool:
        """True for a format that is a file for every frame."""
        return name not in FILMS and is_video(self.source)

    def same_input(self, other: OutputRecord) -> bool:
        """True where both are of one input that has not changed, under one stem."""
        mine, its = ((m.stem, m.source, m.size, m.mtime_ns) for m in (self, other))
        return mine == its


class Outputs:
    """The record of one folder, read from it; `begin` and `finish` write to it.

    Raises NotADirectoryError where the folder is a file, ValueError where it holds maps without a record.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder}: is a file, and the maps need a folder; give another --out")
        self.folder = folder
        self._made: dict[str, OutputRecord] = {}
        self._own = {SETTINGS, SOURCES}
        self._taken = {SETTINGS, SOURCES}  # as `_folded` has them
        self._films: set[str] = set()  # the folders of videos' frames
        self._numbered: set[str] = set()  # folders with photos whose maps are called as frames are
        self._cut = False
        record = folder / SOURCES
        if record.is_file():
            text = record.read_text(encoding="utf-8", errors="replace")
            self._cut = bool(text) and not text.endswith("\n")
            for made in {made.source: made for made in map(_parse, text.splitlines()) if made}.values():
                self._keep(made)
        elif (folder / SETTINGS).is_file() and any(path.name != SETTINGS for path in folder.iterdir()):
            raise ValueError(
                f"{folder}: holds maps of an earlier version, which did not note the photos that they were made from; "
                "give another --out"
            )

    def _keep(self, made: OutputRecord) -> None:
        self._made[made.source] = made
        self._own |= made.names((*made.formats, *made.begun))
        self._take(made.stem, made.source)

    def prepare(self) -> None:
        """Make the folder and its record; OSError names the folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / SOURCES).touch()
        except OSError as error:
            reason = "a link to nothing" if self.folder.is_symlink() and not self.folder.exists() else error.strerror
            raise OSError(f"{self.folder}: cannot be written ({reason}); give another --out") from error

    def holds(self, file: Path) -> bool:
        """True for a file that was made here, by the record."""
        # Path.resolve raises RuntimeError for a link to itself before Python 3.13.
        file, folder = Path(os.path.realpath(file)), self.folder.resolve()
        if not file.is_relative_to(folder):
            return False
        inside = file.relative_to(folder).with_name(files.meant(file.name))
        frames = inside.with_name(f"*{inside.suffix}") if inside.stem.isdecimal() else inside
        return bool(self._own & {inside.as_posix(), frames.as_posix()})

    def stem(self, file: Path, wanted: str) -> str:
        """The stem that this input had before; else `wanted`, with its suffix or a number where a name is not free."""
        source = str(file.resolve())
        if source in self._made:
            return self._made[source].stem
        name, count = wanted, 1
        if not self._free(name, source) and file.suffix:
            name = f"{wanted}_{file.suffix.lstrip('.').lower()}"
        while not self._free(name, source):
            count += 1
            name = f"{wanted}_{count}"
        self._take(name, source)
        return name

    def _take(self, stem: str, source: str) -> None:
        self._taken |= {_folded(name) for name in (*OutputRecord(stem, source, 0, 0).names(), stem)}
        folder, _, last = stem.rpartition("/")
        if is_video(source):
            self._films.add(stem)
        elif last.isdecimal():
            self._numbered.add(folder)

    def _free(self, stem: str, source: str) -> bool:
        names = OutputRecord(stem, source, 0, 0).names()
        folder, _, last = stem.rpartition("/")
        if is_video(source):
            met = stem in self._numbered or any(p.stem.isdecimal() for p in (self.folder / stem).glob("*"))
        else:
            met = last.isdecimal() and folder in self._films
        taken = any(_folded(name) in self._taken for name in (*names, stem))
        return not met and not taken and not any(_exists(self.folder / name) for name in names)

    def now(self, job: PredictionJob) -> OutputRecord:
        """What the input has made as it is now: nothing where it is new or has changed; OSError where it is gone."""
        stat = job.path.stat()
        fresh = OutputRecord(job.stem, str(job.path.resolve()), stat.st_size, stat.st_mtime_ns)
        before = self._made.get(fresh.source)
        return before if before is not None and before.same_input(fresh) else fresh

    def missing(self, made: OutputRecord, formats: Iterable[str]) -> list[str]:
        """Those of `formats` that are not there whole."""
        needed = {name: made.frames if made.has_frames(name) else 1 for name in formats}
        return [name for name in needed if name not in made.formats or len(self._there(made, name)) < needed[name]]

    def path(self, made: OutputRecord, name: str, frame: int = 0) -> Path:
        """Where a format of this input lies; frame: which one, where every frame is a file."""
        if made.has_frames(name):
            return self.folder / made.stem / f"{frame:06d}{FORMATS[name]}"
        ending = FILMS[name] if is_video(made.source) else FORMATS[name]
        return self.folder / f"{made.stem}{ending}"

    def begin(self, made: OutputRecord, formats: Iterable[str]) -> OutputRecord:
        """Note that `formats` are about to be written; what an earlier state of the input made is deleted.

        Raises FileExistsError for a file of such a name that was not made from this input.
        """
        before = self._made.get(made.source)
        if before is not None and before.stem == made.stem and not before.same_input(made):
            old = [path for name in {*before.formats, *before.begun} for path in self._there(before, name)]
            for path in (*old, *([self.folder / f"{made.stem}.json"] if is_video(made.source) else [])):
                path.unlink(missing_ok=True)
        for name in {*formats} - {*made.formats, *made.begun}:
            for path in self._there(made, name):
                raise FileExistsError(errno.EEXIST, "is there, and was not made from this input", str(path))
        return self._note(replace(made, begun=_union(made.begun, formats)))

    def finish(self, made: OutputRecord, formats: Iterable[str], *, frames: int = 0) -> OutputRecord:
        """Note that `formats` are whole; frames: of a video."""
        done = _union(made.formats, formats)
        begun = tuple(name for name in made.begun if name not in done)
        return self._note(replace(made, formats=done, begun=begun, frames=frames))

    def _note(self, made: OutputRecord) -> OutputRecord:
        path = self.folder / SOURCES
        with files.naming(path), path.open("a", encoding="utf-8") as file:
            # A line cut by a kill or a full disk is ended first, or it would take this one with it.
            before, self._cut = "\n" if self._cut else "", True
            file.write(f"{before}{json.dumps(asdict(made))}\n")
        self._cut = False
        self._keep(made)
        return made

    def _there(self, made: OutputRecord, name: str) -> list[Path]:
        path = self.path(made, name)
        if made.has_frames(name):
            return [frame for frame in path.parent.glob(f"*{path.suffix}") if frame.stem.isdecimal()]
        return [path] if path.is_file() else []


def _folded(name: str) -> str:
    """A name as macOS and Windows tell it from others: there IMG.png is img.png, and accents have one spelling."""
    return unicodedata.normalize("NFC", name).casefold()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long is found out, with its reason, where the file is written
        return False


def _union(*formats: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in FORMATS if any(name in some for some in formats))


def _parse(line: str) -> OutputRecord | None:
    try:
        fields = json.loads(line)
        return OutputRecord(**{**fields, "formats": _union(fields["formats"]), "begun": _union(fields["begun"])})
    except (ValueError, LookupError, TypeError):
        return None
