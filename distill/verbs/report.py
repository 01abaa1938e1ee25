"""write a run's report.html: one file that opens offline"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe, or a run's folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one recipe key")


def run(args: argparse.Namespace) -> int:
    from distill.console import say
    from distill.recipe import load
    from eval.report import write_report

    folder = Path(args.recipe)
    run = folder if folder.is_dir() else load(args.recipe, args.set).run.folder
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run; give a run's folder or its recipe")
    say(f"report: {write_report(run).resolve()}")
    return 0
