"""check a labels folder: checksums, counts, ranges, keys; --repair labels bad tars again"""

from __future__ import annotations

import argparse

from distill.app.verbs._recipe import refuse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="LABELS", help="a labels folder")
    parser.add_argument("--repair", action="store_true", help="label bad tars again, from the recipe in the manifest")
    parser.add_argument("--recipe", metavar="RECIPE", help="with --repair: your own recipe instead of the manifest's")
    parser.add_argument(
        "--trust-recipe", action="store_true", help="with --repair: run the manifest's recipe even if it never ran here"
    )


def run(args: argparse.Namespace) -> int:
    from distill.app.console import fail, progress, say
    from distill.shards.shards import verify as verify_labels

    if args.repair:
        from distill.app.recipe import load
        from distill.app.repair import repair

        with progress("verify") as report:
            recipe = load(args.recipe, command="label") if args.recipe else None
            repaired = repair(args.folder, recipe=recipe, trusted=args.trust_recipe, report=report)
        say(f"{args.folder}: complete" + (f"; made again: {', '.join(repaired)}" if repaired else ""))
        return 0
    refuse({"--recipe": args.recipe, "--trust-recipe": args.trust_recipe}, "no effect without a repair; give --repair")
    with progress("verify") as report:
        problems = verify_labels(args.folder, report=report)
    if problems:
        fail("\n".join(problems))
        return 1
    say(f"{args.folder}: complete")
    return 0
