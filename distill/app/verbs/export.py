"""write a student to a folder of its own, smaller, with another card, or as ONNX, and check it

distill export runs/demo/train/student shipped --bits 16
distill export runs/demo/train/student shipped --onnx      also shipped/model.onnx: any batch, any size
distill export pocket shipped --program                    also shipped/model.pt2, for torch.export.load

It is written aside, read back and compared with the student before it takes its place: nothing that differs, or whose
outputs are not finite, stays, and what was there before does. model.onnx takes any batch and any size; model.pt2 any
batch, and images of at least two patches and one pixel on both sides (29 with patches of 14, 33 with 16).
"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", metavar="STUDENT", help="a student's folder, such as RUN/train/student, or pocket")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the student that OUT holds")
    parser.add_argument("--bits", type=int, choices=[32, 16, 4], default=32, help="precision of the stored matrices")
    parser.add_argument("--card", metavar="FILE.toml", help="plain values to put on the card instead of its own")
    parser.add_argument("--encoder-weights", metavar="FILE", help="of a frozen encoder that stays outside the folder")
    parser.add_argument("--decoder", metavar="FILE.py", help="the student's decoder, where it is a file of your own")
    parser.add_argument("--onnx", action="store_true", help="also as model.onnx, checked in onnxruntime")
    parser.add_argument("--program", action="store_true", help="also as model.pt2, a torch.export program")


def run(args: argparse.Namespace) -> int:
    from distill.app.export import run_export
    from distill.core.plugins import allow
    from distill.students import checkpoint

    if args.decoder:
        allow(args.decoder)
    run_export(
        checkpoint.fetch(args.student),
        Path(args.out),
        overwrite=args.overwrite,
        bits=args.bits,
        card=Path(args.card) if args.card else None,
        encoder_weights=args.encoder_weights,
        onnx=args.onnx,
        program=args.program,
    )
    return 0
