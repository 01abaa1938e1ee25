"""the whole loop on the shipped demo recipe: label, train, score, report"""

from __future__ import annotations

import argparse

from distill.app.verbs._recipe import take_recipe


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser, optional=True, what="a recipe other than recipes/demo.toml")


def run(args: argparse.Namespace) -> int:
    from distill.app.commands import run_demo
    from distill.app.recipe import load
    from distill.app.shipped import FOLDER

    run_demo(load(args.recipe or FOLDER / "demo.toml", args.set))
    return 0
