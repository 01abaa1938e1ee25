"""The recipes and studies that ship with the package, by name: "demo", "students/table3_dal_das".

A file of that name in the working directory comes first, with or without .toml; "recipes/demo.toml" is the shipped
recipe too where there is no such file. Nothing is written beside them: a run goes to the working directory.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Literal

import distill
from distill.app.strict import RecipeError
from distill.core.plugins import did_you_mean

Sort = Literal["recipe", "study"]

FOLDER = Path(distill.__file__).parent / "recipes"


def shipped(sort: Sort = "recipe") -> dict[str, Path]:
    """Every shipped recipe, or study, by the name that `locate` takes, sorted."""
    names = {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.toml"))}
    return {name: path for name, path in names.items() if _sort(path) == sort}


def locate(name: str | Path, sort: Sort = "recipe") -> Path:
    """The file of a recipe, or study: the local one, else the shipped one.

    Raises RecipeError where there is neither, with what there is, and where it is the other of the two.
    """
    plain = Path(name).as_posix().removeprefix("recipes/").removesuffix(".toml")
    local = next((file for file in (Path(name), Path(f"{name}.toml")) if file.is_file()), None)
    file = local or next((all_[plain] for all_ in (shipped("recipe"), shipped("study")) if plain in all_), None)
    if file is None:
        raise RecipeError(_missing(Path(name), plain, list(shipped(sort)), sort))
    other: Sort = "study" if sort == "recipe" else "recipe"
    if _sort(file) == other:
        verbs = "ablate" if other == "study" else "show, label, train and score"
        raise RecipeError(f"{file} is a {other}: that is for distill {verbs}")
    return file


def headline(path: Path) -> str:
    """What a recipe or study is: the first sentence of the comment that it begins with, however many lines that has."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    said = first.lstrip("# ")
    for line in lines:
        if said.endswith((".", ")", "?")) or not line.startswith("# ") or line.startswith("#  "):
            break
        said += f" {line[2:].strip()}"
        if end := re.search(r"(?<=[a-z0-9)])\. (?=[A-Z])", said):
            said = said[: end.start() + 1]
    return said


def _missing(asked: Path, plain: str, known: list[str], sort: Sort) -> str:
    folder = asked.parent
    here = sorted(p.name for p in folder.glob("*.toml") if _sort(p) in (sort, "unreadable")) if folder.is_dir() else []
    near = did_you_mean(plain, [*known, *(str(folder / name) for name in here)])
    plural = "recipes" if sort == "recipe" else "studies"
    local = f"; {folder} has {', '.join(here[:12])}" if here else ""
    return f"{asked}: no such {sort}{near}{local}; {plural} that ship: {', '.join(known)}"


def _sort(path: Path) -> str:
    """ "recipe", "study", "" for another file (a card), "unreadable" for one whose reader will say why."""
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, RecursionError):
        return "unreadable"
    return "study" if {"full", "bench"} <= keys else "recipe" if "run" in keys else ""
