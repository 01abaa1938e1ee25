"""The recipe that a run's folder keeps: written when a command begins, put back where the command cannot be done."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from distill.app import build
from distill.app.console import note
from distill.app.recipe import USES, Recipe, differences, dumps
from distill.core import files

NAME = "recipe.toml"
_TOLD = 6


def _mattering(changed: list[str], recipe: Recipe) -> list[str]:
    """The keys by which something in the run's folder was made; where that is labels alone, those of labels.

    run.out is none of them: a folder that was moved is the same run.
    """
    changed = [key for key in changed if key != "run.out"]
    if {path.name for path in recipe.run.folder.iterdir()} <= {NAME, "labels"}:
        return [key for key in changed if key.partition(".")[0] in USES["label"]]
    return changed


@contextmanager
def kept_recipe(recipe: Recipe) -> Iterator[None]:
    """Writes the resolved recipe into the run's folder for what the block does; only the first process does.

    A run that another recipe of this name began is told, with the keys that differ. A block that ends in a person's
    mistake (ValueError, LookupError, FileNotFoundError) leaves the recipe that was there: it made what lies beside it.
    """
    if build.process()[0] != 0:
        yield
        return
    path = recipe.run.folder / NAME
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if before is not None and (changed := _mattering(differences(recipe, recipe.run.folder), recipe)):
        more = f" and {len(changed) - _TOLD} more" if len(changed) > _TOLD else ""
        note(
            f"{recipe.run.folder} was made with other values of {', '.join(changed[:_TOLD])}{more}: an experiment of "
            "its own needs a name of its own, --set run.name=NAME"
        )
    # Workers on several machines are each the first process, and write at once.
    aside = f".{secrets.token_hex(6)}"
    files.write_text(path, dumps(recipe), suffix=aside)
    for name in recipe.unjudged:
        note(f"[{name}] has faults, which do not matter here; `distill show` says which")
    try:
        yield
    except (ValueError, LookupError, FileNotFoundError):
        if before is not None:
            files.write_text(path, before, suffix=aside)
        raise
