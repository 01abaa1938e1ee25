"""write label shards: images -> crops -> teachers; resumes"""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
from collections.abc import Iterator

from distill.app.verbs._recipe import refuse, take_recipe


def arguments(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser)
    parser.add_argument(
        "--worker",
        action="store_true",
        help="label together with other workers, on any machine; they join and leave freely",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="",
        help="start the workers on a Ray cluster, one per GPU; without an address, this machine's",
    )


def run(args: argparse.Namespace) -> int:
    from distill.app.commands import run_label
    from distill.app.recipe import load

    if args.ray is not None:
        refuse({"--worker": args.worker}, "no effect with --ray, which starts the workers itself; give one of the two")
    recipe = load(args.recipe, args.set, command="label")
    if args.ray is not None:
        from distill.app.cluster import label_on

        label_on(recipe, args.ray)
        return 0
    with _stopped_by_sigterm():
        outcome = run_label(recipe, worker=args.worker)
    return 0 if outcome.complete or not outcome.last else 1


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Handles SIGTERM, a scheduler's notice, as ctrl-c: a worker returns its part at once, not when its lease ends."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
