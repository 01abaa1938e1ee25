"""print a recipe resolved, defaults included"""

from __future__ import annotations

import argparse
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one recipe key")


def run(args: argparse.Namespace) -> int:
    from distill.recipe import dumps, load

    sys.stdout.write(dumps(load(args.recipe, args.set)))
    return 0
