"""The command line. Settings live in recipes; a verb takes a recipe and at most a few switches.

The verbs are the files of distill/verbs; their heavy imports happen when they run, so that help is instant.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence

from distill import __version__
from distill.core.plugins import find, names

# The order of the journey; a verb that is not named here comes last.
ORDER = [
    "demo",
    "label",
    "verify",
    "inspect",
    "train",
    "fetch",
    "score",
    "report",
    "ablate",
    "compare",
    "doctor",
    "predict",
    "export",
]

EPILOG = """examples:
  distill demo                                     the whole loop on the embedded default
  distill label recipes/demo.toml --set crops.crops_per_image=2
  accelerate launch --num_processes 8 -m distill label recipes/sa1b_dav2_genpercept.toml
  distill score --predictions preds/ --kind affine_disparity --benchmark nyu --root data/nyu.tar --out nyu.json
"""


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
    present = names("distill.app.verbs")
    for name in sorted(present, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n)):
        verb = find("distill.app.verbs", name)
        first, _, rest = (verb.__doc__ or "").partition("\n")
        sub = verbs.add_parser(
            name,
            help=first,
            description=first,
            epilog=textwrap.dedent(rest).strip() or None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.arguments(sub)
        sub.set_defaults(verb=verb.run)
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
        from distill.app.console import fail

        missing = isinstance(error, ImportError) and getattr(error, "name", None)
        way_out = f"; install it: pip install 'depth-distill[teachers]' has {missing}" if missing else ""
        fail((str(error.args[0]) if isinstance(error, KeyError) else str(error)) + way_out)
        return 2
    except KeyboardInterrupt:
        from distill.app.console import note

        note("stopped; the same command goes on from here")
        return 130
