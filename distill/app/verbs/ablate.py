"""run a study: a grid over recipe keys and seeds, one table in the paper's layout, a verdict per ordering; resumes

distill ablate recipes/ablations/table1.toml --processes 2
distill ablate recipes/ablations/table1.toml --version full --processes 8      one cell per GPU
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill.app.verbs._recipe import take_overrides


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "study", metavar="STUDY", nargs="+", help="a study: a TOML file, or a name from `distill list studies`"
    )
    parser.add_argument(
        "--version", choices=["bench", "full"], default="bench", help="the study's scale (default: bench)"
    )
    parser.add_argument(
        "--out", metavar="DIR", default="runs/ablations", help="shared by studies: equal cells run once"
    )
    parser.add_argument("--processes", type=int, default=1, help="number of cells to run at once")
    take_overrides(parser, what="override a key of every cell")
    parser.add_argument(
        "--collect", action="store_true", help="only write the tables of the finished cells; run nothing"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from distill.app.ablate import run_studies

    run_studies(
        [Path(study) for study in args.study],
        version=args.version,
        out=Path(args.out),
        processes=args.processes,
        overrides=args.set,
        worker=args.worker,
        collect_only=args.collect,
    )
    return 0
