"""the whole loop on the embedded default: label, train, score, report"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill.app.verbs._recipe import take_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser, optional=True, what="another recipe than recipes/demo.toml")


def run(args: argparse.Namespace) -> int:
    from distill.app.commands import run_demo
    from distill.app.recipe import load

    run_demo(load(args.recipe or RECIPES / "demo.toml", args.set))
    return 0
