"""The recipes and studies that ship with the package, by name: "demo", "students/table3_dal_das".

A file of that name in the working directory, with or without .toml, takes precedence; "recipes/demo.toml" names the
shipped recipe too if there is no such file. Nothing is written beside them: a run goes to the working directory.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Literal

import distill
from distill.app.strict import RecipeError
from distill.core.wording import did_you_mean

FileKind = Literal["recipe", "study"]

FOLDER = Path(distill.__file__).parent / "recipes"


def shipped(kind: FileKind = "recipe") -> dict[str, Path]:
    """Every shipped recipe, or study, by the name that `locate` takes, sorted."""
    return {name: path for name, path in _files().items() if _kind_of(path) == kind}


def _files() -> dict[str, Path]:
    """Every TOML file that ships, by name, unparsed: parsing all of them to find one takes half a second."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.toml"))}


def locate(name: str | Path, kind: FileKind = "recipe") -> Path:
    """The file of a recipe, or study: the local one, else the shipped one.

    Raises RecipeError if there is neither, saying what there is, or if it is a study where a recipe is needed, or the
    reverse.
    """
    plain = Path(name).as_posix().removeprefix("recipes/").removesuffix(".toml")
    local = next((file for file in (Path(name), Path(f"{name}.toml")) if file.is_file()), None)
    file = local or _files().get(plain)
    file_kind = _kind_of(file) if file else ""
    if file is None or (not local and file_kind not in ("recipe", "study")):
        raise RecipeError(_missing(Path(name), plain, list(shipped(kind)), kind))
    other_kind: FileKind = "study" if kind == "recipe" else "recipe"
    if file_kind == other_kind:
        verbs = "ablate" if other_kind == "study" else "show, label, train and score"
        raise RecipeError(f"{file} is a {other_kind}: use it with distill {verbs}")
    return file


def headline(path: Path) -> str:
    """What a recipe or study is: the first sentence of its leading comment, over however many lines."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    sentence = first.lstrip("# ")
    for line in lines:
        if sentence.endswith((".", ")", "?")) or not line.startswith("# ") or line.startswith("#  "):
            break
        sentence += f" {line[2:].strip()}"
        if end := re.search(r"(?<=[a-z0-9)])\. (?=[A-Z])", sentence):
            sentence = sentence[: end.start() + 1]
    return sentence


def _missing(asked: Path, plain: str, known: list[str], kind: FileKind) -> str:
    folder = asked if asked.is_dir() else asked.parent
    local_names = (
        sorted(p.name for p in folder.glob("*.toml") if _kind_of(p) in (kind, "unreadable")) if folder.is_dir() else []
    )
    near = did_you_mean(plain, [*known, *(str(folder / name) for name in local_names)])
    plural = "recipes" if kind == "recipe" else "studies"
    local_part = f"; {folder} has {', '.join(local_names[:12])}" if local_names else ""
    return f"{asked}: no such {kind}{near}{local_part}; `distill list {plural}` lists those that ship"


def _kind_of(path: Path) -> str:
    """ "recipe", "study", "" for another file (a card), "unreadable" for one whose reader will raise the reason."""
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, RecursionError):
        return "unreadable"
    return "study" if {"full", "bench"} & keys and "run" not in keys else "recipe" if "run" in keys else ""
