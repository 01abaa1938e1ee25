"""write label shards: images -> crops -> teachers; resumes"""

from __future__ import annotations

import argparse

from distill.app.verbs._recipe import refuse, take_recipe


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser)
    parser.add_argument(
        "--worker",
        action="store_true",
        help="label together with other workers, on any machine; they join and leave freely",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="",
        help="start the workers on a Ray cluster, one per GPU; without an address, this machine's",
    )


def run(args: argparse.Namespace) -> int:
    from distill.app.commands import run_label
    from distill.app.recipe import load

    if args.ray is not None:
        refuse({"--worker": args.worker}, "no effect with --ray, which starts the workers itself; give one of the two")
    recipe = load(args.recipe, args.set, command="label")
    if args.ray is not None:
        from distill.app.cluster import label_on

        label_on(recipe, args.ray)
        return 0
    outcome = run_label(recipe, worker=args.worker)
    return 0 if outcome.complete or not outcome.last else 1
