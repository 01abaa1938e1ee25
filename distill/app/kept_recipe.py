"""The recipe file in a run's folder: written when a command begins, restored if the command fails by a user error."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from distill.app import build
from distill.app.console import note
from distill.app.recipe import USES, Recipe, differences, dumps
from distill.core import files
from distill.core.wording import shortened

NAME = "recipe.toml"
_LISTED = 6


def _relevant(changed: list[str], recipe: Recipe) -> list[str]:
    """The changed keys that affect what is in the run's folder; if that is labels only, the keys of labelling.

    run.out is not among them: a folder that was moved is the same run. Nor is compare.time_at (`compare --size`): a
    timing changes nothing that is kept.
    """
    changed = [key for key in changed if key not in ("run.out", "compare.time_at")]
    made = {path.name for path in recipe.run.folder.iterdir() if path.name != NAME}
    if not made:  # an earlier command failed before it made anything
        return []
    if made == {"labels"}:
        return [key for key in changed if key.partition(".")[0] in USES["label"]]
    return changed


@contextmanager
def kept_recipe(recipe: Recipe) -> Iterator[None]:
    """Writes the resolved recipe into the run's folder, then runs the block; only the first process writes.

    If another recipe of this name began the run, the keys that differ are logged. If the block raises a user error
    (ValueError, LookupError, FileNotFoundError), the earlier recipe, which made the folder's content, is restored.
    """
    if build.process()[0] != 0:
        yield
        return
    path = recipe.run.folder / NAME
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if before is not None and (changed := _relevant(differences(recipe, recipe.run.folder), recipe)):
        note(
            f"{recipe.run.folder} was made with other values of {shortened(changed, _LISTED)}; give "
            "a new experiment its own name: --set run.name=NAME"
        )
    # Workers on several machines are each a first process, and write at the same time.
    aside = f".{secrets.token_hex(6)}"
    files.write_text(path, dumps(recipe), suffix=aside)
    for name in recipe.ignored:
        note(f"[{name}] has faults, which this command ignores; `distill show` lists them")
    try:
        yield
    except (ValueError, LookupError, FileNotFoundError):
        if before is not None:
            files.write_text(path, before, suffix=aside)
        raise
