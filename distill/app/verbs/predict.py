"""depth maps of photos and videos: 16-bit PNG, npy, colours, side by side

distill predict photo.jpg                              beside each other: photo and depth, into depth/
distill predict photos/ 'more/**/*.png' film.mp4 --out maps --formats png npy colour side
distill predict photos/ --student runs/demo/train/student

Stopped, or called again: what is there stays, and the rest is done, with what has changed since; the folder notes which
photo made which map (predict_sources.jsonl). A photo that cannot be used is one line. Of a GIF, the first picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="photos, videos, folders or globs")
    parser.add_argument(
        "--student", default="pocket", metavar="NAME", help="a student's folder, pocket, or OWNER/NAME on the hub"
    )
    parser.add_argument("--out", type=Path, default=Path("depth"), metavar="DIR", help="where to write (depth)")
    parser.add_argument(
        "--formats", "--write", nargs="+", choices=["png", "npy", "colour", "side"], default=["png", "side"]
    )
    parser.add_argument("--size", type=int, metavar="N", help="short side to work at, in place of the student's own")
    parser.add_argument("--device", default="auto", help="auto (CUDA, then Apple's GPU, then CPU), cpu, cuda:1, mps")
    parser.add_argument("--encoder-weights", metavar="FILE", help="of a frozen encoder that stays outside the folder")
    parser.add_argument("--decoder", metavar="FILE.py", help="the student's decoder, where it is a file of your own")


def run(args: argparse.Namespace) -> int:
    from distill.app.console import fail, note, progress, say
    from distill.core.plugins import allow
    from distill.data import filetypes
    from distill.inference import predict

    if args.decoder:
        allow(args.decoder)
    found = predict.survey(args.images, out=args.out)
    jobs = found.jobs
    estimator = predict.load(args.student, device=args.device, size=args.size, encoder_weights=args.encoder_weights)
    note(f"{args.student}: {estimator.card.kind}, larger is nearer; {estimator.card.licence}")
    with progress("predict") as report:
        outcome = predict.run(estimator, jobs, out=args.out, formats=args.formats, report=report)
    outcome.problems[:0] = found.refused
    if outcome.problems:
        fail("\n".join(outcome.problems))
    if found.passed:
        note(f"not ours: {filetypes.counted(found.passed)}")
    before = f", {outcome.present} were there" if outcome.present else ""
    failed = f", {len(outcome.problems)} could not be used" if outcome.problems else ""
    say(f"{args.out}: {outcome.written} of {len(jobs) + len(found.refused)} predicted{before}{failed}")
    return 1 if outcome.problems else 0
