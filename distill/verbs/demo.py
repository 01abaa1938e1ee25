"""the whole loop on the embedded default: label, train, score, report"""

from __future__ import annotations

import argparse
from pathlib import Path

RECIPES = Path(__file__).parent.parent.parent / "recipes"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="another recipe than recipes/demo.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one recipe key")


def run(args: argparse.Namespace) -> int:
    from distill.journey import run_demo
    from distill.recipe import load

    run_demo(load(args.recipe or RECIPES / "demo.toml", args.set))
    return 0
