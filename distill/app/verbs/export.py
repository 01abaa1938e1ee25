"""write a student to a folder of its own: smaller, as ONNX, for transformers, for a browser; and check it

distill export runs/demo/train/student shipped --bits 16
distill export runs/own shipped --bits 4 --calibrate labels/HASH   four bits that change its maps least on such crops
distill export runs/demo/train/student shipped --onnx      also shipped/model.onnx: any batch, any size
distill export pocket shipped --onnx --bits 16             float16; positions and large values stay float32
distill export pocket shipped --onnx --int8 labels/HASH    INT8, calibrated on the crops of a labels folder
distill export pocket shipped --onnx --with-resize         photo in, map out: the size rule is in the graph
distill export pocket shipped --browser                    model.onnx for onnxruntime-web, and a page that uses it
distill export pocket shipped --program                    also shipped/model.pt2, for torch.export.load
distill export pocket shipped --transformers               for pipeline("depth-estimation", model="shipped")

The export is written aside, read back and compared with the student before it replaces OUT: if it differs, or its
outputs are not finite, it is discarded and OUT stays as it was. --gate scores the export on a benchmark and refuses it
where delta1 falls by more than a tenth of a point below float32's; INT8 must always pass it. model.onnx takes
any batch and any size; model.pt2 any batch, and images of at least two patches and one pixel on both sides (29 with
patches of 14, 33 with 16).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill.app.verbs._recipe import refuse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", metavar="STUDENT", help="a run, a student's folder, or pocket")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a student in OUT, even STUDENT itself")
    parser.add_argument("--bits", type=int, choices=[32, 16, 4], default=32, help="precision of the stored matrices")
    parser.add_argument("--calibrate", metavar="LABELS", help="with --bits 4: round for the crops of a labels folder")
    parser.add_argument("--card", metavar="FILE.toml", help="plain values to put on the card instead of its own")
    parser.add_argument("--encoder-weights", metavar="FILE", help="weights of a frozen encoder kept outside the folder")
    parser.add_argument("--decoder", metavar="FILE.py", help="the student's decoder, if it is your own file")
    parser.add_argument("--onnx", action="store_true", help="also write model.onnx, checked in onnxruntime")
    parser.add_argument(
        "--int8", metavar="LABELS", help="the ONNX graph in INT8, calibrated on a labels folder's crops"
    )
    parser.add_argument("--with-resize", action="store_true", help="ONNX takes uint8 photos and resizes by itself")
    parser.add_argument("--browser", action="store_true", help="ONNX without what WebGPU lacks, and a page: index.html")
    parser.add_argument("--program", action="store_true", help="also write model.pt2, a torch.export program")
    parser.add_argument(
        "--transformers",
        nargs="?",
        const="auto",
        default="",
        choices=["auto", "native", "code"],
        help="for transformers: its own class where one matches, else code for trust_remote_code",
    )
    parser.add_argument("--gate", metavar="BENCHMARK", help="score on a benchmark or labels folder (INT8: scenes)")
    parser.add_argument("--root", metavar="DIR", help="where the gate's benchmark lies")
    parser.add_argument("--list", metavar="FILE", help="a list of the benchmark's images to use")
    parser.add_argument(
        "--allow-drop", action="store_true", help="report a loss at the gate, but write the file anyway"
    )


def run(args: argparse.Namespace) -> int:
    from distill.core.optional import require

    onnx = bool(args.onnx or args.int8 or args.with_resize or args.browser)
    if onnx:
        require(("onnx", "onnxscript", "onnxruntime"))
    if args.transformers:
        require(("transformers",), "teachers")
    if args.int8 and args.bits != 32:
        raise ValueError(f"--int8 is a precision of the ONNX graph, and --bits {args.bits} another: give one of them")
    if args.calibrate and args.bits != 4:
        raise ValueError("--calibrate says how the weights are rounded to four bits: give it with --bits 4")
    _check_gate(args, changed=onnx or args.bits != 32)
    from distill.app.export import ExportOptions, run_export
    from distill.app.gate import Gate
    from distill.core.plugins import allow
    from distill.students import checkpoint

    if args.decoder:
        allow(args.decoder)
    gate = None
    if args.gate or args.int8:
        gate = Gate(args.gate or "scenes", args.root, args.list, args.allow_drop)
    options = ExportOptions(
        bits=args.bits,
        calibrate=args.calibrate or "",
        onnx=onnx,
        program=args.program,
        int8=args.int8 or "",
        with_resize=args.with_resize,
        browser=args.browser,
        transformers=args.transformers,
        gate=gate,
    )
    run_export(
        checkpoint.fetch(args.student),
        Path(args.out),
        options=options,
        overwrite=args.overwrite,
        card=Path(args.card) if args.card else None,
        encoder_weights=args.encoder_weights,
    )
    return 0


def _check_gate(args: argparse.Namespace, *, changed: bool) -> None:
    """Raises ValueError for gate options without effect; changed: a new precision or graph is written to score."""
    gate_options = {"--root": args.root, "--list": args.list, "--allow-drop": args.allow_drop and not args.int8}
    if not args.gate:
        refuse(gate_options, "no effect without a gate; give --gate BENCHMARK")
    if args.gate and not changed:
        raise ValueError(
            "--gate compares another precision or an ONNX graph with the float32 student, and this export is neither: "
            "give --bits 16 or 4, --onnx or --int8, or leave it out"
        )
