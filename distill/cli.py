"""The command line. Settings live in recipes; a verb takes a recipe and at most a few switches.

Heavy imports happen inside the verbs, so that help is instant.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from distill import __version__

EPILOG = """examples:
  distill demo                                     the whole loop on the embedded default
  distill label recipes/demo.toml --set crops.draws=2
  accelerate launch --num_processes 8 -m distill label recipes/sa1b_dav2_assistant.toml
  distill score --predictions preds/ --kind affine_disparity --benchmark nyu --root data/nyu.tar --out nyu.json
"""


def label(args: argparse.Namespace) -> int:
    """write label shards: images -> crops -> teachers; resumes"""
    from distill.journey import run_label
    from distill.recipe import load

    outcome = run_label(load(args.recipe, args.set))
    return 0 if outcome.complete or int(os.environ.get("WORLD_SIZE", "1")) > 1 else 1


def train(args: argparse.Namespace) -> int:
    """train a student from label shards, or with teachers online; resumes"""
    from distill.journey import run_train
    from distill.recipe import load

    run_train(load(args.recipe, args.set))
    return 0


def score(args: argparse.Namespace) -> int:
    """score a recipe's models, or stored predictions of any model"""
    if bool(args.recipe) == bool(args.predictions):
        raise ValueError("score takes a recipe, or --predictions with --kind, --benchmark, --root and --out")
    if args.recipe:
        from distill.journey import run_score
        from distill.recipe import load

        run_score(load(args.recipe, args.set))
        return 0
    if not args.benchmark:
        raise ValueError("--predictions needs --benchmark NAME: what the predictions are predictions of")
    from distill.console import note, progress, say, table
    from eval.metrics import METRICS
    from eval.score import score_predictions

    with progress(f"score {args.benchmark}") as report:
        result = score_predictions(
            args.predictions,
            kind=args.kind,
            benchmark=args.benchmark,
            root=args.root,
            list_file=args.list,
            protocol=args.protocol,
            out=args.out,
            model=args.model or Path(args.predictions).name,
            allow_failed=args.allow_failed,
            report=report,
        )
    means = result.metrics.items()
    rows = [[name, "-" if value is None else METRICS[name].format.format(value)] for name, value in means]
    table(f"{result.model} on {result.benchmark}, protocol {result.protocol.id}", ["metric", "mean"], rows)
    for image in result.images:
        if image.problem:
            note(f"  {image.key}: {image.problem}")
    failed = sum(image.failed for image in result.images)
    if failed:
        say(f"{failed} of {len(result.images)} images could not be scored" + ("" if args.allow_failed else "; no mean"))
    return 1 if failed and not args.allow_failed else 0


def report(args: argparse.Namespace) -> int:
    """write a run's report.html: one file that opens offline"""
    from distill.console import say
    from distill.recipe import load
    from eval.report import write_report

    folder = Path(args.recipe)
    run = folder if folder.is_dir() else load(args.recipe, args.set).run.folder
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run; give a run's folder or its recipe")
    say(f"report: {write_report(run).resolve()}")
    return 0


def demo(args: argparse.Namespace) -> int:
    """the whole loop on the embedded default: label, train, score, report"""
    from distill.journey import run_demo
    from distill.recipe import load

    run_demo(load(args.recipe or _shipped("demo.toml"), args.set))
    return 0


def verify(args: argparse.Namespace) -> int:
    """read a labels folder again: checksums, counts, ranges, keys"""
    from distill.console import fail, progress, say
    from distill.shards import verify as verify_labels

    with progress("verify") as tell:
        problems = verify_labels(args.folder, report=tell)
    if problems:
        fail("\n".join(problems))
        return 1
    say(f"{args.folder}: whole")
    return 0


def export(args: argparse.Namespace) -> int:
    """write a student to a folder of its own, smaller or with another card, and check it"""
    from distill.journey import run_export

    card = Path(args.card) if args.card else None
    run_export(Path(args.student), Path(args.out), bits=args.bits, card=card, encoder_weights=args.encoder_weights)
    return 0


def show(args: argparse.Namespace) -> int:
    """print a recipe resolved, defaults included"""
    from distill.recipe import dumps, load

    sys.stdout.write(dumps(load(args.recipe, args.set)))
    return 0


def list_plugins(args: argparse.Namespace) -> int:
    """list teachers (with kinds and licences), decoders, normalizations, benchmarks, recipes"""
    from distill.console import table
    from distill.plugins import find, names

    folders = {
        "teachers": "teachers",
        "decoders": "students.decoders",
        "normalizations": "distill.normalize",
        "benchmarks": "eval.benchmarks",
    }
    for what in [args.what] if args.what else [*folders, "recipes"]:
        if what == "recipes":
            root = Path(__file__).parent.parent / "recipes"
            rows = [
                [str(p.relative_to(root.parent)), _headline(p)]
                for p in sorted(root.rglob("*.toml"))
                if not p.stem.endswith("_card")
            ]
            table("recipes", ["recipe", "what it is"], rows)
        elif what == "teachers" and args.what:
            cards = [card for name in names("teachers") for card in find("teachers", name).CARDS]
            rows = [
                [c.name, c.weights, str(c.kind), c.licence, "yes" if c.commercial else "no", str(c.native_size or "-")]
                for c in cards
            ]
            table("teachers", ["teacher", "weights", "kind", "licence", "commercial", "native size"], rows)
        else:
            table(what, ["name"], [[name] for name in names(folders[what])])
    return 0


def _headline(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def _shipped(name: str) -> Path:
    return Path(__file__).parent.parent / "recipes" / name


def _first_line(verb: Callable[[argparse.Namespace], int]) -> str:
    return (verb.__doc__ or "").splitlines()[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill",
        description="Distil heavy depth teachers into small students, and compare them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def add(verb: Callable[[argparse.Namespace], int], name: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=_first_line(verb), description=_first_line(verb))
        sub.set_defaults(verb=verb)
        return sub

    def with_recipe(sub: argparse.ArgumentParser, nargs: str | None = None, what: str = "a recipe (TOML)") -> None:
        sub.add_argument("recipe", metavar="RECIPE", nargs=nargs, help=what)
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one recipe key")

    with_recipe(add(demo, "demo"), "?", "another recipe than recipes/demo.toml")
    with_recipe(add(label, "label"))
    with_recipe(add(train, "train"))
    scores = add(score, "score")
    with_recipe(scores, "?")
    scores.add_argument("--predictions", metavar="DIR", help="stored predictions (.npy float32, Marigold's naming)")
    scores.add_argument("--kind", metavar="KIND", help="what they are: affine_disparity, scale_depth, ...")
    scores.add_argument("--benchmark", metavar="NAME", help="a file of eval/benchmarks")
    scores.add_argument("--root", metavar="DIR", help="the benchmark's data: a folder or the published tar")
    scores.add_argument("--list", metavar="FILE", help="other samples, in the published list's columns")
    scores.add_argument("--protocol", choices=["marigold", "clean"], help="default: the benchmark's own")
    scores.add_argument("--model", metavar="NAME", help="the name in tables; the folder's by default")
    scores.add_argument("--allow-failed", action="store_true", help="a mean over the images that could be scored")
    scores.add_argument("--out", metavar="FILE.json", help="where to write the scores; a .csv goes beside it")
    with_recipe(add(report, "report"), what="a recipe, or a run's folder")
    add(verify, "verify").add_argument("folder", metavar="LABELS", help="a labels folder")
    exports = add(export, "export")
    exports.add_argument("student", metavar="STUDENT", help="a student's folder, such as RUN/train/student")
    exports.add_argument("out", metavar="OUT", help="the folder to write")
    exports.add_argument("--bits", type=int, choices=[32, 16, 4], default=32, help="precision of the stored matrices")
    exports.add_argument("--card", metavar="FILE.toml", help="plain values to put on the card instead of its own")
    exports.add_argument("--encoder-weights", metavar="FILE", help="of a frozen encoder that stays outside the folder")
    with_recipe(add(show, "show"))
    listing = add(list_plugins, "list")
    listing.add_argument(
        "what", nargs="?", choices=["teachers", "decoders", "normalizations", "benchmarks", "recipes"], help="one kind"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. A person's mistake ends in one line per fault and exit code 2, a stopped run in 130."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.verb(args)
        return code
    except (ValueError, LookupError, OSError, ImportError) as error:
        if args.debug:
            raise
        from distill.console import fail

        missing = isinstance(error, ImportError) and getattr(error, "name", None)
        way_out = f"; install it: pip install 'depth-distill[teachers]' has {missing}" if missing else ""
        fail((str(error.args[0]) if isinstance(error, KeyError) else str(error)) + way_out)
        return 2
    except KeyboardInterrupt:
        from distill.console import note

        note("stopped; the same command goes on from here")
        return 130
