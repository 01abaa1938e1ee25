"""train a student from label shards, or with teachers online; resumes"""

from __future__ import annotations

import argparse

from distill.app.verbs._recipe import take_recipe


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser)


def run(args: argparse.Namespace) -> int:
    from distill.app.commands import run_train
    from distill.app.recipe import load

    run_train(load(args.recipe, args.set, command="train"))
    return 0
