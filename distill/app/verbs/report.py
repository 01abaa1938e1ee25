"""write a run's report.html: one file that opens offline; or print its scores as a table

distill report runs/demo                          writes runs/demo/report.html
distill report runs/demo --format latex > t.tex   the scores alone: md, latex or text, on standard output
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill.app.verbs._recipe import take_recipe


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser, what="a recipe, or a run's folder")
    parser.add_argument("--format", choices=["html", "md", "latex", "text"], default="html", help="default: html")
    parser.add_argument("--metrics", metavar="NAMES", default="abs_rel,delta1", help="of the table, with commas")


def run(args: argparse.Namespace) -> int:
    from distill.app.console import fail, note, say, table
    from distill.app.recipe import load

    folder = Path(args.recipe)
    run = folder if folder.is_dir() else load(args.recipe, args.set, command="report").run.folder
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run; give a run's folder or its recipe")
    if args.format == "html":
        from distill.eval.reports.report import write_report

        say(f"report: {write_report(run).resolve()}")
        return 0
    from distill.eval.reports.report import read_run_scores
    from distill.eval.reports.tables import as_latex, as_markdown, as_text, grid

    scores, faults = read_run_scores(run)
    for fault in faults:
        fail(fault)
    if not scores:
        raise FileNotFoundError(f"{run / 'scores'}: no scores; run distill score with this run's recipe")
    table_of_scores = grid(scores, args.metrics.split(","))
    if args.format == "text":
        table(f"scores of {run} (* best, + second best)", *as_text(table_of_scores))
        for line in table_of_scores.notes:
            note(line)
    else:
        say({"md": as_markdown, "latex": as_latex}[args.format](table_of_scores).rstrip())
    return 1 if faults else 0
