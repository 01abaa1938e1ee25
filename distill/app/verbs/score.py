"""score a recipe's models, or stored predictions of any model"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill.app.verbs._recipe import refuse, take_recipe


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser, optional=True)
    parser.add_argument("--predictions", metavar="DIR", help="stored predictions (.npy float32, Marigold's naming)")
    parser.add_argument("--kind", metavar="KIND", help="the maps' depth type: affine_disparity, scale_depth, ...")
    parser.add_argument("--benchmark", metavar="NAME", help="a name from `distill list benchmarks`")
    parser.add_argument("--root", metavar="DIR", help="the benchmark's data: a folder or the published tar")
    parser.add_argument("--list", metavar="FILE", help="a list of other samples, with the published list's columns")
    parser.add_argument(
        "--protocol",
        choices=[
            "marigold",
            "clean",
            "zipdepth",
            "moge_disparity",
            "moge_scale",
            "ultralytics",
            "depth_anything",
            "all",
        ],
        help="default: the benchmark's own; all: one model under each, side by side (docs/protocols.md)",
    )
    parser.add_argument(
        "--alignment",
        choices=["auto", "affine", "scale", "median", "l1"],
        default="auto",
        help="auto: fit what the depth type leaves unknown by least squares; median: only a scale, from the medians",
    )
    parser.add_argument(
        "--offset-positive",
        action="store_true",
        help="marigold mode: add a constant to affine disparity, so that its fit of positive pixels sees all of them",
    )
    parser.add_argument("--model", metavar="NAME", help="the name in tables; the folder's by default")
    parser.add_argument("--allow-failed", action="store_true", help="average over the images that could be scored")
    parser.add_argument("--out", metavar="FILE.json", help="where to write the scores, along with a .csv")


def run(args: argparse.Namespace) -> int:
    if bool(args.recipe) == bool(args.predictions):
        raise ValueError("score takes a recipe, or --predictions with --kind, --benchmark, --root and --out")
    if args.recipe:
        refuse({"--out": args.out}, "a recipe's scores go to its run's folder; give --predictions instead of a recipe")
        prediction_options = ("kind", "model", "allow_failed")
        refuse(
            {f"--{name.replace('_', '-')}": getattr(args, name) for name in prediction_options},
            "only for --predictions",
        )
        benchmark_options = ("benchmark", "root", "list", "protocol", "offset_positive")
        set_options = {f"--{name.replace('_', '-')}": getattr(args, name) for name in benchmark_options}
        set_options["--alignment"] = None if args.alignment == "auto" else args.alignment
        refuse(
            set_options, "only for --predictions; in a recipe set it in [[benchmarks]] (--set benchmarks.0.KEY=VALUE)"
        )
        from distill.app.commands import run_score
        from distill.app.recipe import load

        results = run_score(load(args.recipe, args.set, command="score"))
        return 1 if any(result.num_failed for result in results) else 0
    refuse({"--set": args.set}, "no effect without a recipe; give one")
    if not args.benchmark:
        raise ValueError("--predictions needs --benchmark NAME: the benchmark that was predicted")
    from distill.app.console import note, progress, say, table
    from distill.eval.protocol import RIVAL_MODES
    from distill.eval.score import score_predictions

    if args.protocol in (*RIVAL_MODES, "all"):
        return _under_rivals(args)

    with progress(f"score {args.benchmark}") as report:
        result = score_predictions(
            args.predictions,
            kind=args.kind,
            benchmark=args.benchmark,
            root=args.root,
            list_file=args.list,
            protocol=args.protocol,
            alignment=args.alignment,
            offset_positive=args.offset_positive,
            out=args.out,
            model=args.model or Path(args.predictions).name,
            allow_failed=args.allow_failed,
            report=report,
        )
    means = result.metrics.items()
    rows = result.task.rows
    lines = [[name, "-" if value is None else rows[name].format.format(value)] for name, value in means]
    if result.scale_error is not None:
        lines.append(["scale_error", f"{result.scale_error:.4f}"])
    table(f"{result.model} on {result.benchmark}, protocol {result.protocol.id}", ["metric", "mean"], lines)
    for line in _few(result.problems()):
        note(f"  {line}")
    failed = sum(image.failed for image in result.images)
    if failed:
        first = next(image for image in result.images if image.failed)
        count = f"{failed} of {len(result.images)} images could not be scored{'' if args.allow_failed else '; no mean'}"
        say(f"{count}; the first: {first.key}: {first.problem}")
    if all(value is None for _, value in means):
        if not failed:
            say("no image has a pixel of ground truth to score")
        return 1
    return 1 if failed and not args.allow_failed else 0


def _few(lines: list[str], most: int = 12) -> list[str]:
    """The first lines and the last, with a count of those left out, if there are too many."""
    if len(lines) <= most:
        return lines
    return [*lines[: most - 2], f"... and {len(lines) - most + 1} more", lines[-1]]


def _under_rivals(args: argparse.Namespace) -> int:
    """Scores one model under other people's protocols, a line for each."""
    from distill.app.console import note, progress, say, table
    from distill.eval.rivals import NAMES, score_under_all, sentence

    if args.alignment != "auto" or args.offset_positive:
        raise ValueError("a named protocol has its own alignment: leave --alignment and --offset-positive out")
    if not args.kind:
        raise ValueError("named protocols need --kind, which decides which of them are defined")
    with progress(f"score {args.benchmark}") as report:
        results = score_under_all(
            args.predictions,
            kind=args.kind,
            benchmark=args.benchmark,
            root=args.root,
            list_file=args.list,
            out=Path(args.out) if args.out else None,
            model=args.model or Path(args.predictions).name,
            allow_failed=args.allow_failed,
            names=NAMES if args.protocol == "all" else (args.protocol,),
            report=report,
        )
    failed, lines = 0, []
    for name, result in results.items():
        if isinstance(result, str):
            lines.append([name, "-", "-", "-", "-"])
            continue
        failed += result.num_failed
        values = [result.metrics[key] for key in ("abs_rel", "delta1")]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        lines.append([name, *cells, result.protocol.alignment, result.protocol.id])
    title = f"{args.model or Path(args.predictions).name} on {args.benchmark}, the same predictions"
    table(title, ["protocol", "abs_rel", "delta1", "alignment", "id"], lines)
    for name, result in results.items():
        note(f"  {name}: {sentence(name) if not isinstance(result, str) else f'not available: {result}'}")
        for line in [] if isinstance(result, str) else _few(result.problems(), 3):
            note(f"    {line}")
    if failed:
        say(f"scoring an image failed {failed} times" + ("" if args.allow_failed else "; no mean"))
    return 1 if failed and not args.allow_failed else 0
