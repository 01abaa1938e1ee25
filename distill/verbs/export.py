"""write a student to a folder of its own, smaller, with another card, or as ONNX, and check it

distill export runs/demo/train/student shipped --bits 16
distill export runs/demo/train/student shipped --onnx      also shipped/model.onnx: any batch, any size
distill export pocket shipped --program                    also shipped/model.pt2, for torch.export.load

What is written is read back and compared with the student; nothing that differs stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", metavar="STUDENT", help="a student's folder, such as RUN/train/student, or pocket")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--bits", type=int, choices=[32, 16, 4], default=32, help="precision of the stored matrices")
    parser.add_argument("--card", metavar="FILE.toml", help="plain values to put on the card instead of its own")
    parser.add_argument("--encoder-weights", metavar="FILE", help="of a frozen encoder that stays outside the folder")
    parser.add_argument("--onnx", action="store_true", help="also as model.onnx, checked in onnxruntime")
    parser.add_argument("--program", action="store_true", help="also as model.pt2, a torch.export program")


def run(args: argparse.Namespace) -> int:
    from distill import checkpoint, exports
    from distill.console import say
    from distill.journey import run_export

    card, weights = Path(args.card) if args.card else None, args.encoder_weights
    out = run_export(checkpoint.fetch(args.student), Path(args.out), bits=args.bits, card=card, encoder_weights=weights)
    if not args.onnx and not args.program:
        return 0
    student = checkpoint.load(out, encoder_weights=weights)
    program = exports.to_program(student)
    if args.onnx:
        metadata = exports.metadata(checkpoint.describe(out))
        off = exports.write_onnx(student, out / exports.ONNX, metadata=metadata, program=program)
        size = (out / exports.ONNX).stat().st_size
        say(f"{out / exports.ONNX}: {size / 1e6:.1f} MB, within {off:.1g} of torch's outputs (of their spread)")
    if args.program:
        off = exports.write_program(student, out / exports.PROGRAM, program=program)
        say(f"{out / exports.PROGRAM}: within {off:.1g} of torch's outputs (of their spread)")
    return 0
