"""train a student from label shards, or with teachers online; resumes"""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one recipe key")


def run(args: argparse.Namespace) -> int:
    from distill.journey import run_train
    from distill.recipe import load

    run_train(load(args.recipe, args.set))
    return 0
