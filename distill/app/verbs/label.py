"""write label shards: images -> crops -> teachers; resumes"""

from __future__ import annotations

import argparse
import os

from distill.app.verbs._recipe import take_recipe


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser)


def run(args: argparse.Namespace) -> int:
    from distill.app.commands import run_label
    from distill.app.recipe import load

    outcome = run_label(load(args.recipe, args.set, command="label"))
    return 0 if outcome.complete or int(os.environ.get("WORLD_SIZE", "1")) > 1 else 1
