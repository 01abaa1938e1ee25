"""run a recipe's teachers and student over the same images, and write a page of where they agree and disagree

Predictions are kept in RUN/compare, so that the page can be written again without any model. [compare] in the recipe
says on how many images (limit) and how large (side); it may name more than two teachers. With --size 512 every model
is timed too, on one image of 512 x 512 pixels: the median of 20 calls after warm-up, beside FiffDepth's Table 3.
"""

from __future__ import annotations

import argparse

from distill.app.verbs._recipe import refuse, take_recipe


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser)
    parser.add_argument(
        "--local", action="store_true", help="instead align each model to a part and to the whole: would patches help?"
    )
    parser.add_argument("--size", type=int, metavar="N", help="also time every model on one image of N x N pixels")


def run(args: argparse.Namespace) -> int:
    from distill.app.comparison import run_compare
    from distill.app.recipe import load

    overrides = [*args.set, *([f"compare.time_at={args.size}"] if args.size is not None else [])]
    recipe = load(args.recipe, overrides, command="compare")
    if args.local:
        refuse({"--size": args.size}, "times models on whole images; give it without --local")
        from distill.app.local_gain import run_local

        run_local(recipe)
    else:
        run_compare(recipe)
    return 0
