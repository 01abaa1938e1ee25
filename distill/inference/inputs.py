"""What lies behind the files, folders and globs that somebody gives: read + refused + not ours = found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.core.files import files_below
from distill.data import filetypes
from distill.data.photos import not_a_file
from distill.inference.outputs import Outputs, PredictionJob

PHOTOS, VIDEOS = filetypes.PHOTOS, filetypes.FILMS
"""Suffixes that a folder is searched for; of a moving picture the first is taken."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found: read + refused + not ours = found.

    jobs: photos and videos to predict. refused: "path: reason" of pictures of a kind that is not read. passed: how many
    other files there are, by suffix. Nothing that was made in the output folder is among them. notes: lines on how an
    input was understood.
    """

    jobs: list[PredictionJob]
    refused: list[str]
    passed: Counter[str]
    notes: tuple[str, ...] = ()


def find(inputs: Sequence[str], *, out: Path) -> list[PredictionJob]:
    """The photos and videos of `survey`."""
    return survey(inputs, out=out).jobs


def survey(inputs: Sequence[str], *, out: Path) -> Survey:
    """What lies behind files, folders (searched to the bottom), globs and FFmpeg's numbered patterns (frames/%04d.png:
    each picture is a photo), but not what was made in `out`.

    Raises FileNotFoundError for an input that matches nothing, ValueError for an empty one, and what Outputs raises.
    """
    outputs = Outputs(out)
    photos: dict[Path, str] = {}
    refused: dict[str, None] = {}
    passed: dict[Path, str] = {}
    for given in inputs:
        if not given.strip():
            raise ValueError(f"{given!r} names no photo; give files, folders or globs (. is this folder)")
        files = list(_files(Path(given).expanduser()))
        mine = [one for one in files if not outputs.holds(one[0])]
        for file, stem, name in mine:
            if stem:
                photos.setdefault(file.absolute(), stem)
            elif reason := _list_of(file, given) or filetypes.refusal(name):
                refused[f"{file}: {reason}"] = None
            else:
                passed[file.absolute()] = filetypes.sort_of(name)
        if not any(stem for _, stem, _ in mine):
            what = f" but what this command made in {out}" if any(stem for _, stem, _ in files) else ""
            rest = f"; there are {filetypes.counted(passed.values())}" if passed and not what else ""
            rest += "".join(f"; {line}" for line in list(refused)[:2])
            if not files and not Path(given).expanduser().exists():
                pattern = set(given) & set("*?[") or _NUMBER.search(given)
                reason = "matches no file" if pattern else "no such file or folder"
                reason = "a link to nothing" if Path(given).expanduser().is_symlink() else reason
                reason = "an address, and files of this machine are read: download it" if "://" in given else reason
                raise FileNotFoundError(f"{given}: {reason}")
            raise FileNotFoundError(f"{given}: no photo or video there{what} ({', '.join((*PHOTOS, *VIDEOS))}){rest}")
    # A photo that is there by its name and by a link goes by its name, and is predicted once.
    chosen: dict[Path, Path] = {}
    for file in photos:
        if reason := not_a_file(file):
            refused[f"{file}: {reason}"] = None
            continue
        real = file.resolve()
        passed.pop(file, None)
        if real in chosen:
            passed[file] = "linked twice"
        if real not in chosen or chosen[real].is_symlink():
            chosen[real] = file
    jobs = [PredictionJob(path, outputs.stem(path, photos[file])) for path, file in chosen.items()]
    notes = [_SEQUENCE.format(given) for given in inputs if _NUMBER.search(given) and not Path(given).exists()]
    return Survey(jobs, list(refused), Counter(passed.values()), tuple(notes))


_LISTS = (".txt", ".lst", ".csv")
_LIST = "a text file, not a photo: give the photos that it lists (`xargs -d '\\n' -a {} distill predict`)"


def _list_of(file: Path, given: str) -> str:
    """Why a text file that is given by its own name is none of the inputs; "" of any other."""
    return _LIST.format(file) if file.suffix.lower() in _LISTS and file == Path(given).expanduser() else ""


_NUMBER = re.compile(r"%0?(\d*)d")
_SEQUENCE = (
    "{0}: each picture is predicted on its own, with colours of its own range; as a film they keep one: "
    "ffmpeg -framerate 25 -i {0} film.mp4"
)


def _files(given: Path) -> Iterator[tuple[Path, str, str]]:
    """Files behind one path or glob: each, the stem that it would like, "" for no photo or video, and its name."""
    for path in [given] if given.exists() else _glob(given):
        if path.is_dir():
            for file in files_below(path):
                inside = file.relative_to(path)
                name = inside.as_posix()
                ours = filetypes.is_photo(name) or filetypes.is_film(name)
                yield file, inside.with_suffix("").as_posix() if ours else "", name
        else:
            yield path, "" if path.suffix.lower() in _LISTS else path.stem, path.name


def _glob(pattern: Path) -> list[Path]:
    # What exists is meant as it is written: a folder may be called "b [1]".
    base, parts = Path(pattern.anchor or "."), list(pattern.relative_to(pattern.anchor).parts)
    while parts and (base / parts[0]).exists():
        base /= parts.pop(0)
    if not parts:
        return []
    rest = "/".join(parts)
    if not _NUMBER.search(rest):
        return sorted(base.glob(rest))
    words = re.split(r"%0?\d*d", rest)
    widths = [int(width or 1) for width in _NUMBER.findall(rest)]
    digits = [rf"(\d{{{width},}})" for width in widths]
    numbered = re.compile("".join(re.escape(w) + d for w, d in zip(words, [*digits, ""], strict=True)))
    found = [
        (numbered.fullmatch(path.relative_to(base).as_posix()), path) for path in base.glob(_NUMBER.sub("*", rest))
    ]
    return [path for _, path in sorted(([int(n) for n in match.groups()], path) for match, path in found if match)]
