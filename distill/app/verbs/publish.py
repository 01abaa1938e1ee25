"""write labels or a student as a folder that a model hub takes: card, checksums, licences; checked, not uploaded

distill publish labels runs/own/labels/HASH out            images where their licence allows it, else a list with hashes
distill publish student runs/own out                       with scores and cost of student and teachers on the card
hf upload OWNER/NAME out                                   sends it (`--repo-type dataset` for labels)
"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["labels", "student"], help="what the folder holds")
    parser.add_argument("folder", metavar="FOLDER", help="a labels folder; or a run, a student's folder or pocket")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="the folder to write; replaced if this command wrote it before"
    )
    parser.add_argument(
        "--images",
        choices=["auto", "include", "hashes"],
        default="auto",
        help="for labels: include what their licence allows (auto), the photographs, or a list with hashes instead",
    )
    parser.add_argument("--recipe", metavar="RECIPE", help="for labels: also list the sha256 of its photographs' files")


def run(args: argparse.Namespace) -> int:
    from distill.app import publish
    from distill.app.console import note, progress, say
    from distill.core.wording import counted
    from distill.students import checkpoint

    if args.what == "student":
        if args.recipe or args.images != "auto":
            raise ValueError("--images and --recipe are only for labels: leave them out")
        done = publish.publish_student(checkpoint.fetch(args.folder), args.out)
        if done["commercial"] is not True:
            note("its teachers, images or starting weights do not allow commercial use, or do not say: see the card")
        say(f"{args.out}: the student, its card and checksums; hf upload OWNER/NAME {args.out}", **done)
        return 0
    from distill.app.recipe import load

    sources = load(args.recipe, command="label") if args.recipe else None
    with progress("verify") as report:
        done = publish.publish_labels(Path(args.folder), args.out, images=args.images, sources=sources, report=report)
    listed = f"{counted(done['listed'], 'region')} listed, no images"
    images = "images included" if done["images"] == "included" else listed
    content = f"{counted(done['samples'], 'sample')}, {images}"
    say(f"{args.out}: {content}; hf upload OWNER/NAME {args.out} --repo-type dataset", **done)
    return 0
