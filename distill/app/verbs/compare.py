"""run a recipe's teachers and student over the same images, and write a page of where they agree and disagree

Predictions are kept in RUN/compare, so that the page can be written again without any model. [compare] in the recipe
says on how many images (limit) and how large (side); it may name more than two teachers.
"""

from __future__ import annotations

import argparse

from distill.app.verbs._recipe import take_recipe


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser)
    parser.add_argument(
        "--local", action="store_true", help="would patches help? each model aligned to a part and to the whole instead"
    )


def run(args: argparse.Namespace) -> int:
    from distill.app.comparison import run_compare
    from distill.app.recipe import load

    recipe = load(args.recipe, args.set, command="compare")
    if args.local:
        from distill.app.local_gain import run_local

        run_local(recipe)
    else:
        run_compare(recipe)
    return 0
