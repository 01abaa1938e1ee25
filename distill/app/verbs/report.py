"""write a run's report.html: one file that opens offline; or print its scores as a table

distill report runs/demo                          writes runs/demo/report.html
distill report runs/demo --format latex > t.tex   the scores alone: md, latex or text, on standard output
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill.app.verbs._recipe import refuse, take_recipe


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser, what="a recipe, or a run's folder")
    parser.add_argument("--format", choices=["html", "md", "latex", "text"], default="html", help="default: html")
    parser.add_argument("--metrics", metavar="NAMES", help="metrics of the table, separated by commas (abs_rel,delta1)")


def run(args: argparse.Namespace) -> int:
    from distill.app.console import fail, note, say, table
    from distill.app.recipe import differences, load

    if args.format == "html":
        refuse({"--metrics": args.metrics}, "no effect on HTML; give --format md, latex or text")
    folder = Path(args.recipe)
    if not folder.is_dir() and folder.suffix != ".toml":
        _check_name(args.recipe)
    recipe = None if folder.is_dir() else load(args.recipe, args.set, command="report")
    run = folder if recipe is None else recipe.run.folder
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run; give a run's folder or its recipe")
    if recipe is None and args.set:
        raise ValueError("--set changes a recipe, but this is the folder of a run: leave it out")
    if recipe is not None and (changed := differences(recipe, run)):
        note(f"{run} was made with other values of {', '.join(changed)}: the report shows the run as it is")
    if args.format == "html":
        from distill.eval.reports.report import write_report

        _check_run(run)
        path = write_report(run).resolve()
        say(f"report: {path}", report=str(path))
        return 0
    from distill.eval.reports.report import read_run_scores
    from distill.eval.reports.tables import as_latex, as_markdown, as_text, grid

    scores, faults = read_run_scores(run)
    for fault in faults:
        fail(fault)
    if not scores:
        raise FileNotFoundError(f"{run / 'scores'}: no scores; run distill score with this run's recipe")
    metrics = [name.strip() for name in (args.metrics or "abs_rel,delta1").split(",")]
    known = dict.fromkeys(name for score in scores for name in score.task.rows)
    if unknown := [name for name in metrics if name not in known]:
        raise ValueError(f"--metrics: none of these scores has {', '.join(unknown)}; there are {', '.join(known)}")
    table_of_scores = grid(scores, metrics)
    if args.format == "text":
        table(f"scores of {run} (* best, + not told apart from the best by these images)", *as_text(table_of_scores))
        for line in table_of_scores.notes:
            note(line)
    else:
        say({"md": as_markdown, "latex": as_latex}[args.format](table_of_scores).rstrip())
    return 1 if faults else 0


_RUN_FILES = ("recipe.toml", "scores", "train", "labels*", "predictions", "fidelity", "compare")


def _check_run(run: Path) -> None:
    """Raises FileNotFoundError for a folder that is no run: an empty report would only clutter it."""
    if not any(next(run.glob(name), None) for name in _RUN_FILES):
        raise FileNotFoundError(f"{run}: not the folder of a run; give a run's folder or its recipe")


def _check_name(name: str) -> None:
    """Raises FileNotFoundError for a name that is neither a run nor a recipe, listing the runs that are here."""
    from distill.app.shipped import locate
    from distill.app.strict import RecipeError

    try:
        locate(name)
    except RecipeError as error:
        runs = ", ".join(sorted(str(path.parent) for path in Path("runs").glob("*/recipe.toml")))
        listing = f"; runs here: {runs}" if runs else ""
        raise FileNotFoundError(f"{name}: no run or recipe of that name{listing}") from error
