"""how far labelling is, from any machine: parts done, running and lost, workers, images/s, GPU-hours, time left"""

from __future__ import annotations

import argparse

from distill.app.verbs._recipe import take_recipe


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser)


def run(args: argparse.Namespace) -> int:
    from distill.app.recipe import load
    from distill.app.status import show

    return show(load(args.recipe, args.set, command="label"))
