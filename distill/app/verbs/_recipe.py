"""What most verbs take: a recipe, and keys of it to override; and what they do with an option that has no use."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

RECIPE = "a recipe: a TOML file, or a name of `distill list recipes`"


def take_recipe(parser: argparse.ArgumentParser, *, optional: bool = False, what: str = RECIPE) -> None:
    """Adds RECIPE and --set."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?" if optional else None, help=what)
    take_overrides(parser)


def take_overrides(parser: argparse.ArgumentParser, *, what: str = "override one recipe key") -> None:
    """Adds --set."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=what)


def refuse(options: Mapping[str, Any], why: str) -> None:
    """Raises ValueError for options that are given (not None, False or empty) where they would change nothing.

    options: by their names, "--root". why: what they are for, "of a gate: give --gate too".
    """
    if given := [name for name, value in options.items() if value not in (None, False, [], "")]:
        raise ValueError(f"{', '.join(given)}: {why}, or leave it out")
