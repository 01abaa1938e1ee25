"""a labels folder as one page: pictures, histograms, quarantine, where teachers disagree"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="LABELS", help="a labels folder")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to write it (default: LABELS/contact.html)")
    parser.add_argument(
        "--shown", type=int, default=12, metavar="N", help="how many samples are shown as pictures (12)"
    )


def run(args: argparse.Namespace) -> int:
    from distill.app.console import progress, say
    from distill.app.label_preview import write_contact

    with progress("inspect") as report:
        path = write_contact(args.folder, args.out, shown=args.shown, report=report)
    say(f"contact sheet: {path.resolve()}")
    return 0
