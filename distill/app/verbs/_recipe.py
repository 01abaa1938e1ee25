"""Arguments that most verbs take: a recipe, and overrides of its keys; and refusal of options without effect."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

RECIPE = "a recipe: a TOML file, or a name from `distill list recipes`"


def take_recipe(parser: argparse.ArgumentParser, *, optional: bool = False, what: str = RECIPE) -> None:
    """Adds RECIPE and --set."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?" if optional else None, help=what)
    take_overrides(parser)


def take_overrides(parser: argparse.ArgumentParser, *, what: str = "override one recipe key") -> None:
    """Adds --set."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=what)


def take_teacher(parser: argparse.ArgumentParser) -> None:
    """Adds --teacher, --weights and --set, which `teacher_options` reads."""
    parser.add_argument("--teacher", metavar="NAME", help="use this teacher instead (`distill list teachers`)")
    parser.add_argument(
        "--weights", metavar="W", help="the teacher's weights: a hub id or a file (default: its first card's)"
    )
    take_overrides(parser, what="one of the teacher's options, as in a recipe's `options`: max_depth=20")


def teacher_options(args: argparse.Namespace) -> dict[str, Any]:
    """The teacher's options from --set.

    Raises ValueError if they are given without a teacher, or for one that another flag sets.
    """
    if not args.teacher:
        if args.weights:
            raise ValueError("--weights needs a teacher: give --teacher NAME too, or --student FOLDER for a student")
        refuse({"--set": args.set}, "no effect without a teacher; give --teacher NAME")
        return {}
    from distill.app.strict import set_key

    options: dict[str, Any] = {}
    for assignment in args.set:
        set_key(options, assignment)
    for key, way_out in {"weights": "give --weights", "device": "give --device", "dtype": "it is float32 here"}.items():
        if key in options:
            raise ValueError(f"--set {key}: not an option of a teacher; {way_out}")
    return options


def refuse(options: Mapping[str, Any], why: str) -> None:
    """Raises ValueError for options that are set (not None, False or empty) although they would change nothing.

    options: by name, "--root". why: the reason and the remedy, "no effect without a gate; give --gate".
    """
    if names := [name for name, value in options.items() if value not in (None, False, [], "")]:
        raise ValueError(f"{', '.join(names)}: {why}, or leave it out")
