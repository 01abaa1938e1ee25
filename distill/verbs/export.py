"""write a student to a folder of its own, smaller or with another card, and check it"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", metavar="STUDENT", help="a student's folder, such as RUN/train/student")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--bits", type=int, choices=[32, 16, 4], default=32, help="precision of the stored matrices")
    parser.add_argument("--card", metavar="FILE.toml", help="plain values to put on the card instead of its own")
    parser.add_argument("--encoder-weights", metavar="FILE", help="of a frozen encoder that stays outside the folder")


def run(args: argparse.Namespace) -> int:
    from distill.journey import run_export

    card = Path(args.card) if args.card else None
    run_export(Path(args.student), Path(args.out), bits=args.bits, card=card, encoder_weights=args.encoder_weights)
    return 0
