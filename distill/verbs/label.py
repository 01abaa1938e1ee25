"""write label shards: images -> crops -> teachers; resumes"""

from __future__ import annotations

import argparse
import os


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one recipe key")


def run(args: argparse.Namespace) -> int:
    from distill.journey import run_label
    from distill.recipe import load

    outcome = run_label(load(args.recipe, args.set))
    return 0 if outcome.complete or int(os.environ.get("WORLD_SIZE", "1")) > 1 else 1
