"""Mending a labels folder: what is bad is set aside and labelled again, from the recipe in the folder's manifest.

That recipe is run only where its owner is known to have run it here (trusted_recipes.py), or says that it may be.

The unit is a tar with its json, the smallest thing whose bytes can be made again exactly: which crops shared a batch
is part of what a network answers, to the last bit. A json beside a good tar takes no teacher: it is made from the tar.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from distill.app import trusted_recipes
from distill.app.commands import run_label
from distill.app.console import note
from distill.app.recipe import USES, Recipe, as_table, dumps, load, parse
from distill.app.renamed import with_current_keys
from distill.core.progress import Report
from distill.labelling.lock import run_lock
from distill.shards.mend import mend_sidecar
from distill.shards.shards import MANIFEST, SETTINGS, DamagedTableError, find_problems, read_manifest

BAD = ".bad"


def recipe_of(folder: Path) -> Recipe:
    """The recipe that a labels folder was made with: its manifest's, or where that is damaged, the run's around it.

    Raises ValueError where there is none.
    """
    try:
        table: dict[str, Any] = read_manifest(folder, whole=False).get("recipe") or {}
    except DamagedTableError as error:
        beside = folder.parent.parent / "recipe.toml"
        if not beside.is_file():
            said = str(error).partition(";")[0]
            raise ValueError(f"{said}, and the recipe in it cannot be read: give your own with --recipe") from error
        return load(beside, command="label")
    if not table:
        raise ValueError(
            f"{folder / MANIFEST} has no recipe, since these labels were not made by `distill label`: remove the bad "
            "tars with their .json and make the same call again"
        )
    return parse(with_current_keys(table), where=f"{folder / MANIFEST}: recipe", uses=USES["label"])


def _label_again(recipe: Recipe, folder: Path) -> object:
    return run_label(recipe, folder, send=False)


def repair(
    folder: str | Path,
    *,
    recipe: Recipe | None = None,
    trusted: bool = False,
    relabel: Callable[[Recipe, Path], object] = _label_again,
    report: Report | None = None,
) -> list[str]:
    """Verify, set bad tars aside, label them again, verify what is new; returns the names of what was made again.

    A bad tar stays as NAME.bad until its place is filled, so that a repair that is interrupted has lost nothing that
    was good; rerun the same command to resume. A tar that is no part of these labels is somebody's: it stays as
    NAME.bad, which readers pass over, and a line says so. recipe: what to label with instead of the manifest's;
    trusted: run the manifest's, though it was never run here. No mirror hears of it.

    Raises ValueError where the folder is still not whole, and what labelling raises: RunLockedError where a run holds
    the folder, ValueError where images or teachers are not what they were.
    """
    folder = Path(folder)
    old = folder / f"{MANIFEST}{BAD}"
    if old.is_file() and not (folder / MANIFEST).is_file():
        old.replace(folder / MANIFEST)  # an earlier repair was interrupted
    made: list[str] = []
    # A manifest that is made again says of its tars what their json says: only then can the tars be looked at.
    for _ in range(2):
        problems = _problems(folder, report)
        made += (mended := _mended(folder, problems))
        problems = {name: lines for name, lines in problems.items() if name not in mended}
        if not problems and not list(folder.glob(f"*{BAD}")):
            return list(dict.fromkeys(made))
        chosen = recipe or recipe_of(folder)
        if recipe is None and not trusted and not trusted_recipes.known(as_table(chosen)):
            note(dumps(chosen))
            raise ValueError(
                f"{folder / MANIFEST}: the recipe in it (above) was never run here, and would be: give your own with "
                "--recipe RECIPE, or --trust-recipe"
            )
        with run_lock(folder, rank=0, world=1):
            _set_aside(folder, problems)
        relabel(chosen, folder)
        made += [name or MANIFEST for name in problems]
        if "" not in problems:
            break
    left = find_problems(folder)
    if left:
        raise ValueError(f"{folder} is still not whole: {next(iter(left.values()))[0]}")
    ours = {MANIFEST, SETTINGS}
    for shard in read_manifest(folder)["shards"]:
        ours |= {shard["name"], shard["name"].replace(".tar", ".json")}
    for path in folder.glob(f"*{BAD}"):
        if path.name.removesuffix(BAD) in ours:
            path.unlink()
    for name in (name for name in made if name not in ours):
        note(f"{folder / name} is no part of these labels: set aside as {name}{BAD}")
    return list(dict.fromkeys(name for name in made if name in ours))


def _problems(folder: Path, report: Report | None) -> dict[str, list[str]]:
    """What `find_problems` finds; where the manifest cannot be read, that alone."""
    try:
        return find_problems(folder, report=report)
    except DamagedTableError as error:
        return {"": [str(error)]}


def _mended(folder: Path, problems: Collection[str]) -> list[str]:
    """Which of the bad files could be put right from what lies beside them: no recipe is needed then."""
    if "" in problems or not (folder / MANIFEST).is_file():
        return []
    tars = {shard["name"].replace(".tar", ".json"): shard for shard in read_manifest(folder)["shards"]}
    with run_lock(folder, rank=0, world=1):
        return [n for n in problems if n in tars and mend_sidecar(folder / tars[n]["name"], tars[n])]


def _set_aside(folder: Path, problems: Collection[str]) -> None:
    """Give what is bad another name: a tar with its json, for it is labelled again; a json alone is made from its tar.

    The manifest stays beside such a json: it says whether the tar is the one that was written.
    """
    for name in filter(None, problems):
        for path in {folder / name, (folder / name).with_suffix(".json")}:
            with contextlib.suppress(FileNotFoundError):
                path.replace(path.with_name(path.name + BAD))
    if "" in problems:
        (folder / MANIFEST).replace(folder / f"{MANIFEST}{BAD}")
