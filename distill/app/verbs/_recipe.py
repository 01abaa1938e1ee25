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


def take_teacher(parser: argparse.ArgumentParser) -> None:
    """Adds --teacher, --weights and --set, which `teacher_options` reads."""
    parser.add_argument("--teacher", metavar="NAME", help="a teacher instead (distill list teachers)")
    parser.add_argument("--weights", metavar="W", help="the teacher's: a hub id or a file (default: its first card's)")
    take_overrides(parser, what="one of the teacher's options, as in a recipe's `options`: max_depth=20")


def teacher_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of --set. Raises ValueError where the options of a teacher are given and no teacher is, or for one
    that is said elsewhere.
    """
    if not args.teacher:
        if args.weights:
            raise ValueError("--weights are a teacher's: give --teacher NAME too, or --student FOLDER for a student")
        refuse({"--set": args.set}, "an option of a teacher: give --teacher NAME")
        return {}
    from distill.app.strict import set_key

    options: dict[str, Any] = {}
    for assignment in args.set:
        set_key(options, assignment)
    for key, way_out in {"weights": "give --weights", "device": "give --device", "dtype": "it is float32 here"}.items():
        if key in options:
            raise ValueError(f"--set {key}: no option of a teacher; {way_out}")
    return options


def refuse(options: Mapping[str, Any], why: str) -> None:
    """Raises ValueError for options that are given (not None, False or empty) where they would change nothing.

    options: by their names, "--root". why: what they are for, "of a gate: give --gate too".
    """
    if given := [name for name, value in options.items() if value not in (None, False, [], "")]:
        raise ValueError(f"{', '.join(given)}: {why}, or leave it out")
