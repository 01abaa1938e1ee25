"""read a labels folder again: checksums, counts, ranges, keys"""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="LABELS", help="a labels folder")


def run(args: argparse.Namespace) -> int:
    from distill.console import fail, progress, say
    from distill.shards import verify as verify_labels

    with progress("verify") as tell:
        problems = verify_labels(args.folder, report=tell)
    if problems:
        fail("\n".join(problems))
        return 1
    say(f"{args.folder}: whole")
    return 0
