"""The command line. Settings live in recipes; a verb takes a recipe and at most a few switches.

The verbs are the files of distill/app/verbs; their heavy imports happen when they run, so that help is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from distill import __version__
from distill.core.addresses import public
from distill.core.plugins import find, names
from distill.core.wording import did_you_mean

# The order of the verbs in the help; others come last.
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
  distill demo                                     the whole loop on the shipped demo recipe
  distill label demo --set crops.crops_per_image=2  a shipped recipe (`distill list recipes`), or your own file
  accelerate launch --num_processes 8 -m distill label sa1b_dav2_genpercept
  distill score --predictions preds/ --kind affine_disparity --benchmark nyu --root data/nyu.tar --out nyu.json
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors also suggest the nearest choice, or where the choices are listed."""

    def error(self, message: str) -> NoReturn:
        if choice := re.search(r"invalid choice: (\S+) \(choose from (.*)\)$", message):
            message += did_you_mean(choice[1].strip("'"), re.findall(r"[^\s,']+", choice[2]))
        if message.endswith(" required: COMMAND"):
            message += "; `distill --help` lists them"
        super().error(public(message))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but a command's unknown option is reported with that command's usage, and the nearest one."""
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = re.findall(r"--[\w-]+", given.command.format_help())
            hint = did_you_mean(unknown[0].partition("=")[0], known) if unknown[0].startswith("--") else ""
            given.command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return given


def parser() -> argparse.ArgumentParser:
    """The whole command line; each command's own help is in its file."""
    top_parser = _Parser(
        prog="distill",
        description="Distil heavy depth teachers into small students, and compare them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top_parser.add_argument("--version", action="version", version=__version__)
    _switches(top_parser, default=False)
    verbs = top_parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    verb_names = names("distill.app.verbs")
    for name in sorted(verb_names, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n)):
        verb = find("distill.app.verbs", name)
        summary, _, details = (verb.__doc__ or "").partition("\n")
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=textwrap.dedent(details).strip() or None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.arguments(sub)
        _switches(sub, default=argparse.SUPPRESS)  # accepted before the command or after it
        sub.set_defaults(verb=verb.run, command=sub)
    return top_parser


def _switches(parser: argparse.ArgumentParser, *, default: Any) -> None:
    """Adds the switches that every command takes."""
    group = parser.add_argument_group("every command")
    for name, help_ in (
        ("--quiet", "print only results and errors, no notes or progress"),
        (
            "--json",
            "print a JSON object per line: results on standard output; notes, progress and errors on standard error",
        ),
        ("--debug", "show the traceback of an error"),
    ):
        group.add_argument(name, action="store_true", default=default, help=help_)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. A user error prints one line per fault and returns 2; an interrupted run returns 130."""
    debug = False
    try:
        args = parser().parse_args([_expand_home(word) for word in (sys.argv[1:] if argv is None else argv)])
        debug = args.debug
        from distill.app import console

        console.quiet(args.quiet)
        console.as_json(args.json)
        _refuse_removed_folder()
        code: int = args.verb(args)
        return code
    except (ValueError, LookupError, OSError, ImportError, RecursionError, OverflowError, MemoryError) as error:
        if debug:
            raise
        from distill.app import console

        hint = _install_hint(error.name) if isinstance(error, ModuleNotFoundError) and error.name else ""
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            message = f"{os.fspath(error.filename)}: {error.strerror[:1].lower()}{error.strerror[1:]}"
        console.fail_and_end((message or type(error).__name__) + hint)
        return 2
    except KeyboardInterrupt:
        from distill.app import console

        console.note("stopped; rerun the same command to resume")
        return STOPPED


def _refuse_removed_folder() -> None:
    """Raises ValueError where the current folder was removed: PyTorch's MKL ends the process without a reason there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ValueError("the current folder was removed: change to one that exists, and rerun the command") from None


def _expand_home(word: str) -> str:
    """Expands the "~" of `--out=~/depth` and `hypersim=~/data`, which shells leave after a "=" and in quotes."""
    match = re.fullmatch(r"((?:--[\w-]+|[\w.]+)=|)(~(?:/.*)?)", word, re.DOTALL)
    return match[1] + os.path.expanduser(match[2]) if match else word  # noqa: PTH111  (Path's raises without a home)


def entry() -> NoReturn:
    """Runs `main` and exits. An interrupted run exits without waiting for its threads: a rerun redoes their work.

    SIGTERM, a scheduler's notice, interrupts like ctrl-c: a worker returns its part at once, not when its lease ends,
    and a study stops its workers. A second one kills.
    """

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        code = main()
    except KeyboardInterrupt:  # a second ctrl-c, while the first is being answered
        code = STOPPED
    if code == STOPPED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _install_hint(module: str) -> str:
    """How to install a module that one of the package's extras provides; "" for other modules."""
    from importlib.metadata import PackageNotFoundError, requires

    package = {"skimage": "scikit-image", "sklearn": "scikit-learn"}.get(top := module.partition(".")[0], top)
    try:
        lines = [line.replace('"', "'") for line in requires("depth-distill") or []]
    except PackageNotFoundError:
        return ""
    matches = [line for line in lines if re.match(rf"{re.escape(package)}\b", line) and "extra == '" in line]
    extra = matches[0].rpartition("extra == '")[2].rstrip("'") if matches else ""
    return f"; install it with pip install 'depth-distill[{extra}]'" if extra else ""
