"""Resolves files, folders and globs to the photos and videos in them: read + refused + other files = found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.core.files import files_below
from distill.core.home import home_expanded
from distill.data import filetypes
from distill.data.photos import not_a_file
from distill.inference.outputs import Outputs, PredictionJob

PHOTOS, VIDEOS = filetypes.PHOTOS, filetypes.FILMS
"""Suffixes that folders are searched for; only the first frame of an animated picture is used."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The files found: read + refused + other files = found.

    jobs: photos and videos to predict. refused: "path: reason" of pictures in a format that is not read. skipped: the
    number of other files, by suffix. Files made by this command in the output folder are left out. notes: lines on how
    inputs were interpreted.
    """

    jobs: list[PredictionJob]
    refused: list[str]
    skipped: Counter[str]
    notes: tuple[str, ...] = ()


def survey(inputs: Sequence[str], *, out: Path) -> Survey:
    """Find the files in files, folders (searched recursively), globs and FFmpeg's numbered patterns (frames/%04d.png:
    each picture is a photo), except those that this command made in `out`.

    Raises FileNotFoundError for an input that matches nothing, ValueError for an empty one, and what Outputs raises.
    """
    outputs = Outputs(out)
    photos: dict[Path, str] = {}
    refused: dict[str, None] = {}
    skipped: dict[Path, str] = {}
    for argument in inputs:
        if not argument.strip():
            raise ValueError(f"{argument!r} names no photo; give files, folders or globs (. is this folder)")
        given = home_expanded(argument)
        files = list(_files(given))
        candidates = [entry for entry in files if not outputs.holds(entry[0])]
        for file, stem, name in candidates:
            if stem:
                photos.setdefault(file.absolute(), stem)
            elif reason := _list_of(file, given) or filetypes.refusal(name):
                refused[f"{file}: {reason}"] = None
            else:
                skipped[file.absolute()] = filetypes.skip_category(name)
        if not any(stem for _, stem, _ in candidates):
            if not files and not given.exists():
                raise FileNotFoundError(f"{argument}: {_why_missing(argument, given)}")
            only_outputs = f" but what this command made in {out}" if any(stem for _, stem, _ in files) else ""
            counts = filetypes.summarize_counts(skipped.values()) if skipped and not only_outputs else ""
            others = [*([f"there are {counts}"] if counts else []), *list(refused)[:2]]
            suffixes = ", ".join((*PHOTOS, *VIDEOS))
            raise FileNotFoundError(
                "; ".join([f"{argument}: no photo or video there{only_outputs} ({suffixes})", *others])
            )
    chosen = _each_once(photos, refused, skipped)
    jobs = [PredictionJob(path, outputs.stem(path, photos[file])) for path, file in chosen.items()]
    notes = [
        _SEQUENCE.format(argument) for argument in inputs if _NUMBER.search(argument) and not Path(argument).exists()
    ]
    return Survey(jobs, list(refused), Counter(skipped.values()), tuple(notes))


def _why_missing(argument: str, path: Path) -> str:
    if "://" in argument:
        return "a URL, but only local files are read: download it"
    if path.is_symlink():
        return "a link to nothing"
    return "matches no file" if set(argument) & set("*?[") or _NUMBER.search(argument) else "no such file or folder"


def _each_once(photos: Iterable[Path], refused: dict[str, None], skipped: dict[Path, str]) -> dict[Path, Path]:
    """The photos by what they resolve to, once each: under its own name rather than a link's; adds the others to
    `refused` and `skipped`.
    """
    chosen: dict[Path, Path] = {}
    for file in photos:
        if reason := not_a_file(file):
            refused[f"{file}: {reason}"] = None
            continue
        resolved = file.resolve()
        skipped.pop(file, None)
        if resolved in chosen:
            skipped[file] = "linked twice"
        if resolved not in chosen or chosen[resolved].is_symlink():
            chosen[resolved] = file
    return chosen


_LISTS = (".txt", ".lst", ".csv")
_LIST = "a text file, not a photo: give the photos that it lists (`xargs -d '\\n' -a {} distill predict`)"


def _list_of(file: Path, given: Path) -> str:
    """Return why a text file given by its own name is not an input, or "" for any other file."""
    return _LIST.format(file) if file.suffix.lower() in _LISTS and file == given else ""


_NUMBER = re.compile(r"%0?(\d*)d")
_SEQUENCE = (
    "{0}: each picture is predicted on its own, with colours of its own range; as a film they keep one: "
    "ffmpeg -framerate 25 -i {0} film.mp4"
)


def _files(given: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield the files of one path or glob: file, preferred stem ("" if it is not a photo or video), and name."""
    for path in [given] if given.exists() else _glob(given):
        if path.is_dir():
            for file in files_below(path):
                relative = file.relative_to(path)
                name = relative.as_posix()
                is_input = filetypes.is_photo(name) or filetypes.is_film(name)
                yield file, relative.with_suffix("").as_posix() if is_input else "", name
        else:
            yield path, "" if path.suffix.lower() in _LISTS else path.stem, path.name


def _glob(pattern: Path) -> list[Path]:
    # Existing parts are taken literally: a folder may be called "b [1]".
    base, parts = Path(pattern.anchor or "."), list(pattern.relative_to(pattern.anchor).parts)
    while parts and (base / parts[0]).exists():
        base /= parts.pop(0)
    glob = "/".join(parts)
    if not _NUMBER.search(glob):
        # A plain name is not there, but from Python 3.13 on a link to nothing matches its own.
        return sorted(base.glob(glob)) if set(glob) & set("*?[") else []
    literals = re.split(r"%0?\d*d", glob)
    widths = [int(width or 1) for width in _NUMBER.findall(glob)]
    digits = [rf"(\d{{{width},}})" for width in widths]
    numbered = re.compile("".join(re.escape(w) + d for w, d in zip(literals, [*digits, ""], strict=True)))
    matches = [
        (numbered.fullmatch(path.relative_to(base).as_posix()), path) for path in base.glob(_NUMBER.sub("*", glob))
    ]
    return [path for _, path in sorted(([int(n) for n in match.groups()], path) for match, path in matches if match)]
