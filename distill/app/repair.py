"""Repairs a labels folder: bad files are set aside and labelled again, with the recipe in the folder's manifest.

That recipe is run only if it is known to have been run here (trusted_recipes.py), or if the user allows it.

The unit is a tar with its json, the smallest thing whose bytes can be reproduced exactly: a network's output depends,
to the last bit, on which crops shared a batch. The json of a good tar needs no teacher: it is rebuilt from the tar.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from distill.app import trusted_recipes
from distill.app.build import labels_folder
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
    """The recipe that a labels folder was made with: its manifest's or, if that is damaged, that of the run it lies in.

    A damaged manifest's own recipe is only taken where the run's makes other labels, or is missing. Raises ValueError
    if there is none.
    """
    try:
        manifest = read_manifest(folder)
    except DamagedTableError as error:
        path = folder.parent.parent / "recipe.toml"
        of_run = load(path, command="label") if path.is_file() else None
        if of_run is not None and labels_folder(of_run).name == folder.name:
            return of_run
        try:
            manifest = read_manifest(folder, whole=False)
        except DamagedTableError:
            if of_run is not None:
                return of_run
            message = str(error).partition(";")[0]
            raise ValueError(f"{message}, and the recipe in it cannot be read: give your own with --recipe") from error
    table: dict[str, Any] = manifest.get("recipe") or {}
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
    """Verifies, sets bad tars aside, labels them again, verifies the result; returns the names of the files made again.

    A bad tar stays as NAME.bad until its replacement is there, so an interrupted repair has lost nothing that was good;
    rerun the same command to resume. A tar that does not belong to these labels is not deleted: it stays as NAME.bad,
    which readers ignore, and a line says so. recipe: what to label with instead of the manifest's; trusted: run the
    manifest's, even if it was never run here. Mirrors are not updated.

    Raises ValueError if the folder is still not whole or another process changed it meanwhile, and what labelling
    raises: RunLockedError if a run holds the folder, ValueError if images or teachers have changed.
    """
    folder = Path(folder)
    old = folder / f"{MANIFEST}{BAD}"
    if old.is_file() and not (folder / MANIFEST).is_file():
        old.replace(folder / MANIFEST)  # an earlier repair was interrupted
    remade: list[str] = []
    # A rebuilt manifest takes its facts from the json files: only then can the tars be verified, in a second pass.
    for _ in range(2):
        verified = _states(folder)
        problems = _problems(folder, report)
        remade += (mended := _repaired_in_place(folder, problems))
        problems = {name: lines for name, lines in problems.items() if name not in mended}
        if not problems and not list(folder.glob(f"*{BAD}")):
            return list(dict.fromkeys(remade))
        chosen = recipe or recipe_of(folder)
        if recipe is None and not trusted and not trusted_recipes.was_run_here(as_table(chosen)):
            note(dumps(chosen))
            raise ValueError(
                f"{folder / MANIFEST}: the recipe in it (above) was never run here, and repairing would run it: give "
                "your own with --recipe RECIPE, or --trust-recipe"
            )
        with run_lock(folder, rank=0, world=1):
            _check_unchanged(folder, problems, verified)
            _set_aside(folder, problems)
        relabel(chosen, folder)
        remade += [name or MANIFEST for name in problems]
        if "" not in problems:
            break
    remaining = find_problems(folder)
    if remaining:
        raise ValueError(f"{folder} still has faults: {next(iter(remaining.values()))[0]}")
    own_files = {MANIFEST, SETTINGS}
    for shard in read_manifest(folder)["shards"]:
        own_files |= {shard["name"], shard["name"].replace(".tar", ".json")}
    for path in folder.glob(f"*{BAD}"):
        if path.name.removesuffix(BAD) in own_files:
            path.unlink()
    for name in (name for name in remade if name not in own_files):
        note(f"{folder / name} is not part of these labels: set aside as {name}{BAD}")
    return list(dict.fromkeys(name for name in remade if name in own_files))


def _problems(folder: Path, report: Report | None) -> dict[str, list[str]]:
    """What `find_problems` returns; if the manifest cannot be read, that alone."""
    try:
        return find_problems(folder, report=report)
    except DamagedTableError as error:
        return {"": [str(error)]}


def _repaired_in_place(folder: Path, problems: Collection[str]) -> list[str]:
    """Rebuilds the bad json files whose tar is good, without a recipe; their names."""
    if "" in problems or not (folder / MANIFEST).is_file():
        return []
    tars = {shard["name"].replace(".tar", ".json"): shard for shard in read_manifest(folder)["shards"]}
    with run_lock(folder, rank=0, world=1):
        return [n for n in problems if n in tars and mend_sidecar(folder / tars[n]["name"], tars[n])]


def _states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells another tar or manifest of the same name: inode, time and size of each."""
    states = {}
    for path in (*folder.glob("*.tar"), folder / MANIFEST):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            states[path.name] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return states


def _check_unchanged(folder: Path, problems: Collection[str], verified: dict[str, tuple[int, int, int]]) -> None:
    """Raises ValueError where a problem may be gone: a run or another repair ended while we verified without a lock."""
    now, names = _states(folder), {MANIFEST, *(f"{Path(name).stem}.tar" for name in problems)}
    if any(now.get(name) != verified.get(name) for name in names):
        raise ValueError(f"another process changed {folder} while it was verified; run the same command again")


def _set_aside(folder: Path, problems: Collection[str]) -> None:
    """Renames bad files: a tar with its json, since both are made again; a json alone, to be rebuilt from its tar.

    The manifest stays beside such a json: it says whether the tar is the one that was written.
    """
    for name in filter(None, problems):
        for path in {folder / name, (folder / name).with_suffix(".json")}:
            with contextlib.suppress(FileNotFoundError):
                path.replace(path.with_name(path.name + BAD))
    if "" in problems:
        (folder / MANIFEST).replace(folder / f"{MANIFEST}{BAD}")
