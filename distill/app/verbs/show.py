"""print a recipe resolved, defaults included"""

from __future__ import annotations

import argparse
import sys

from distill.app.verbs._recipe import take_recipe


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser)


def run(args: argparse.Namespace) -> int:
    from distill.app.recipe import dumps, load

    sys.stdout.write(dumps(load(args.recipe, args.set)))
    return 0
