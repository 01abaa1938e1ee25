"""print a recipe resolved, defaults included; with --explain, what its keys mean

distill show demo --explain                each key below its meaning, unit and the source of its default
distill show demo --explain crops.size     one key, or one table, with its value in this recipe
distill show --explain crops               without a recipe
"""

from __future__ import annotations

import argparse
import sys

from distill.app.verbs._recipe import refuse, take_recipe


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser, optional=True)
    parser.add_argument("--explain", nargs="?", const="", metavar="KEY", help="what the keys mean, or what KEY means")


def run(args: argparse.Namespace) -> int:
    from distill.app.explain import explain_key, explained
    from distill.app.recipe import dumps, load

    if not (args.recipe or args.explain):
        raise ValueError("show takes a recipe, or --explain KEY with a key such as crops.size")
    if not args.recipe:
        refuse({"--set": args.set}, "no effect without a recipe; give one")
    recipe = load(args.recipe, args.set) if args.recipe else None
    if args.explain:
        text = explain_key(args.explain, recipe)
    else:
        assert recipe is not None
        text = dumps(recipe) if args.explain is None else explained(recipe)
    sys.stdout.write(text)
    return 0
