"""depth maps of photos and videos: 16-bit PNG, npy, colours, side by side

distill predict photo.jpg                              photo and depth side by side, and 16 bits, into depth/
distill predict photos/ 'more/**/*.png' video.mp4 --out maps --formats png npy colour side
distill predict photos/ --student runs/demo            the student of a run, or of a folder
distill predict photos/ --teacher depth_anything_v2 --weights depth-anything/Depth-Anything-V2-Small

Safe to interrupt; rerun to resume: only missing maps, and those of photos that have changed, are made.
predict_sources.jsonl says which photo made which map. Unreadable images are skipped and listed with the reason. Of a
GIF, the first picture is used.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="photos, videos, folders or globs")
    parser.add_argument(
        "--student",
        metavar="NAME",
        help="a run, a student's folder, pocket (the built-in model, default), or OWNER/NAME on the hub",
    )
    parser.add_argument("--teacher", metavar="NAME", help="a teacher instead (distill list teachers)")
    parser.add_argument("--weights", metavar="W", help="the teacher's: a hub id or a file (default: its first card's)")
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

    student_only = {"--student": args.student, "--size": args.size, "--encoder-weights": args.encoder_weights}
    student_only |= {"--decoder": args.decoder}
    if args.teacher and (given := [name for name, value in student_only.items() if value is not None]):
        raise ValueError(f"{', '.join(given)}: of students; leave it out beside --teacher")
    if args.weights and not args.teacher:
        raise ValueError("--weights are a teacher's: give --teacher NAME too, or --student FOLDER for a student")
    if args.decoder:
        allow(args.decoder)
    survey = predict.survey(args.images, out=args.out)
    jobs = survey.jobs
    if args.teacher:
        name, estimator = args.teacher, predict.load_teacher(args.teacher, args.weights, device=args.device)
    else:
        name = args.student or "pocket"
        estimator = predict.load(name, device=args.device, size=args.size, encoder_weights=args.encoder_weights)
    note(f"{name}: {estimator.card.kind}, larger is {estimator.card.larger_is}; licence: {estimator.card.licence}")
    with progress("predict") as report:
        outcome = predict.run(estimator, jobs, out=args.out, formats=args.formats, report=report)
    outcome.problems[:0] = survey.refused
    if outcome.problems:
        fail("\n".join(outcome.problems))
    if survey.passed:
        note(f"ignored: {filetypes.counted(survey.passed)}")
    before = f", {outcome.present} were there" if outcome.present else ""
    failed = f", {len(outcome.problems)} could not be used" if outcome.problems else ""
    say(f"{args.out}: {outcome.written} of {len(jobs) + len(survey.refused)} predicted{before}{failed}")
    return 1 if outcome.problems else 0
