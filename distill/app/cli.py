"""The command line. Settings live in recipes; a verb takes a recipe and at most a few switches.

The verbs are the files of distill/app/verbs; their heavy imports happen when they run, so that help is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from distill import __version__
from distill.core.plugins import find, names

# The order of the journey; a verb that is not named here comes last.
ORDER = [
    "demo",
    "label",
    "status",
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
    "publish",
]

STOPPED = 130

EPILOG = """examples:
  distill demo                                     the whole loop on the recipe that ships
  distill label demo --set crops.crops_per_image=2  a recipe that ships (`distill list recipes`), or a file of yours
  accelerate launch --num_processes 8 -m distill label sa1b_dav2_genpercept
  distill score --predictions preds/ --kind affine_disparity --benchmark nyu --root data/nyu.tar --out nyu.json
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line; each command's own help is in its file."""
    whole = argparse.ArgumentParser(
        prog="distill",
        description="Distil heavy depth teachers into small students, and compare them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=__version__)
    _switches(whole, default=False)
    verbs = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
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
        _switches(sub, default=argparse.SUPPRESS)  # before the command or behind it
        sub.set_defaults(verb=verb.run)
    return whole


def _switches(parser: argparse.ArgumentParser, *, default: Any) -> None:
    """What every command takes."""
    every = parser.add_argument_group("every command")
    for name, help_ in (
        ("--quiet", "results and errors alone: no notes, no progress"),
        ("--json", "a JSON object per line: results on standard output; notes, progress and errors on standard error"),
        ("--debug", "show the traceback of an error"),
    ):
        every.add_argument(name, action="store_true", default=default, help=help_)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. A person's mistake ends in one line per fault and exit code 2, a stopped run in 130."""
    debug = False
    try:
        args = parser().parse_args([_from_home(word) for word in (sys.argv[1:] if argv is None else argv)])
        debug = args.debug
        from distill.app import console

        console.quiet(args.quiet)
        console.as_json(args.json)
        code: int = args.verb(args)
        return code
    except (ValueError, LookupError, OSError, ImportError, RecursionError, OverflowError, MemoryError) as error:
        if debug:
            raise
        from distill.app import console

        way_out = _way_out(error.name) if isinstance(error, ModuleNotFoundError) and error.name else ""
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            message = f"{os.fspath(error.filename)}: {error.strerror[:1].lower()}{error.strerror[1:]}"
        console.fail((message or type(error).__name__) + way_out)
        return 2
    except KeyboardInterrupt:
        from distill.app import console

        console.note("stopped; rerun the same command to resume")
        return STOPPED


def _from_home(word: str) -> str:
    """`--out=~/depth` and `hypersim=~/data` as they are meant: shells leave a "~" behind a "=", or in quotes."""
    named = re.fullmatch(r"((?:--[\w-]+|[\w.]+)=|)(~(?:/.*)?)", word, re.DOTALL)
    return named[1] + os.path.expanduser(named[2]) if named else word  # noqa: PTH111  (Path's raises without a home)


def entry() -> NoReturn:
    """`main` as a process of its own. A stopped one leaves at once: what its threads do is done again."""
    code = main()
    if code == STOPPED:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _way_out(module: str) -> str:
    """How to get a module that one of the package's extras brings; nothing for all others."""
    from importlib.metadata import PackageNotFoundError, requires

    package = {"skimage": "scikit-image", "sklearn": "scikit-learn"}.get(top := module.partition(".")[0], top)
    try:
        lines = [line.replace('"', "'") for line in requires("depth-distill") or []]
    except PackageNotFoundError:
        return ""
    wanted = [line for line in lines if re.match(rf"{re.escape(package)}\b", line) and "extra == '" in line]
    extra = wanted[0].rpartition("extra == '")[2].rstrip("'") if wanted else ""
    return f"; it comes with pip install 'depth-distill[{extra}]'" if extra else ""
