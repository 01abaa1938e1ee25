"""What most verbs take: a recipe, and keys of it to override."""

from __future__ import annotations

import argparse

RECIPE = "a recipe: a TOML file, or a name of `distill list`"


def take_recipe(parser: argparse.ArgumentParser, *, optional: bool = False, what: str = RECIPE) -> None:
    """Adds RECIPE and --set."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?" if optional else None, help=what)
    take_overrides(parser)


def take_overrides(parser: argparse.ArgumentParser, *, what: str = "override one recipe key") -> None:
    """Adds --set."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=what)
