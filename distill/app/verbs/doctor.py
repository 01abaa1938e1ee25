"""check a recipe before a run, a training run or its log after it, or a benchmark's data

distill doctor demo                              before a run: weights, disk, speed, time, licences, depth types
distill doctor runs/demo                         after one: drift, collapse, dead contexts, learning rate, data wait
distill doctor --benchmark nyu --root DIR        is the benchmark's data complete?
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from distill.app.verbs._recipe import refuse, take_overrides


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RECIPE|RUN|LOG", nargs="?", help="a recipe, a run's folder or its log")
    take_overrides(parser)
    parser.add_argument("--benchmark", metavar="NAME", help="a name from `distill list benchmarks`")
    parser.add_argument("--root", metavar="DIR", help="its data: a folder or the published tar")
    parser.add_argument("--list", metavar="FILE", help="a list of other samples, with the published list's columns")


def run(args: argparse.Namespace) -> int:
    from distill.app.console import table
    from distill.app.shipped import shipped
    from distill.core.wording import did_you_mean

    if bool(args.target) == bool(args.benchmark):
        raise ValueError("doctor takes a recipe, a run's folder or its log; or --benchmark NAME with --root DIR")
    if not args.benchmark:
        refuse({"--root": args.root, "--list": args.list}, "no effect without a benchmark; give --benchmark NAME")
    if args.benchmark or not _is_recipe(args.target):
        refuse({"--set": args.set}, "no effect without a recipe; give one")
    if args.benchmark:
        from distill.eval.completeness import check_benchmark

        title, findings = args.benchmark, check_benchmark(args.benchmark, args.root, args.list)
    elif _is_recipe(args.target):
        from distill.app.preflight import check_recipe
        from distill.app.recipe import load

        only = _only(args.target, args.set)
        recipe = load(args.target, args.set, command=only)
        title, findings = args.target, check_recipe(recipe, only=only)
    else:
        from distill.training.diagnose import check_run

        if not Path(args.target).exists():
            near = did_you_mean(args.target, shipped())
            raise FileNotFoundError(f"{args.target}: no such recipe, run or log{near}; see `distill list recipes`")
        title, findings = args.target, check_run(Path(args.target))
    head = ["level", "what", "remedy"] if any(f.remedy for f in findings) else ["level", "what"]
    table(f"doctor: {title}", head, [[f.level, f.what, f.remedy][: len(head)] for f in findings], text=True)
    return 1 if any(f.level == "bad" for f in findings) else 0


def _only(target: str, overrides: list[str]) -> Literal["", "compare", "score"]:
    """The only command that a recipe is for, if it has no tables for labelling or training; else ""."""
    from distill.app.shipped import locate
    from distill.app.strict import read_toml

    tables = read_toml(locate(target), overrides).keys()
    if tables & {"crops", "student", "loss", "train"}:
        return ""
    return "compare" if "compare" in tables else "score" if "benchmarks" in tables and "images" not in tables else ""


def _is_recipe(target: str) -> bool:
    """Whether this is a TOML file, or a shipped recipe's name, where no file or folder has that name."""
    from distill.app.shipped import shipped

    return target.endswith(".toml") or (not Path(target).exists() and target in shipped())
