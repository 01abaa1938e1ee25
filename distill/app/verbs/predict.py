"""depth maps of photos and videos: 16-bit PNG, npy, colours, side by side, points, surfaces

distill predict photo.jpg                              photo and depth side by side, and 16 bits, into depth/
distill predict photos/ 'more/**/*.png' video.mp4 --out maps --formats png npy colour side
distill predict photos/ --student runs/demo            the student of a run, or of a folder
distill predict photo.jpg --write ply glb view --fov 65  points, a surface, and a page that turns them offline
distill predict photos/ --teacher depth_anything_v2 --weights depth-anything/Depth-Anything-V2-Small
distill predict photos/ --teacher depth_anything_v2 --weights metric.pth --set max_depth=80      with its options

Safe to interrupt; rerun to resume: only missing maps, and those of photos that have changed, are made.
predict_sources.jsonl says which photo made which map. Unreadable images are skipped and listed with the reason. Of a
GIF, the first picture is used. For 3D files, and for the metres of a model that depends on the camera, the camera is
--fov or --intrinsics, else what the photo's EXIF says, else 60 degrees. For a map of unknown shift, --far says how deep
the scene is assumed to be.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from distill.app.verbs._recipe import take_teacher, teacher_options


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="photos, videos, folders, globs, frames/%%04d.png")
    parser.add_argument(
        "--student",
        metavar="NAME",
        help="a run, a student's folder, pocket (the built-in model, default), or OWNER/NAME on the hub",
    )
    take_teacher(parser)
    parser.add_argument("--out", type=Path, default=Path("depth"), metavar="DIR", help="where to write (depth)")
    parser.add_argument(
        "--formats",
        "--write",
        nargs="+",
        choices=["png", "npy", "colour", "side", "ply", "glb", "view"],
        default=["png", "side"],
        help="what to write (png side); ply: points, glb: a surface, view: a page that shows the points",
    )
    parser.add_argument("--fov", type=float, metavar="DEGREES", help="the camera's horizontal field of view")
    parser.add_argument("--intrinsics", type=float, nargs=4, metavar=("FX", "FY", "CX", "CY"), help="in pixels")
    parser.add_argument(
        "--far", type=float, metavar="TIMES", help="farthest over nearest distance, if the shift is unknown (10)"
    )
    parser.add_argument("--size", type=int, metavar="N", help="short side to predict at, instead of the student's own")
    parser.add_argument("--device", default="auto", help="auto (CUDA, then Apple's GPU, then CPU), cpu, cuda:1, mps")
    parser.add_argument("--encoder-weights", metavar="FILE", help="weights of a frozen encoder kept outside the folder")
    parser.add_argument("--decoder", metavar="FILE.py", help="the student's decoder, if it is your own file")


def run(args: argparse.Namespace) -> int:
    from distill.app.console import fail, note, progress, say
    from distill.core.plugins import allow
    from distill.data import filetypes
    from distill.inference import predict
    from distill.inference.outputs import SOLID
    from distill.inference.solid import FOV

    student_only = {"--student": args.student, "--size": args.size, "--encoder-weights": args.encoder_weights}
    student_only |= {"--decoder": args.decoder}
    if args.teacher and (flags := [name for name, value in student_only.items() if value is not None]):
        raise ValueError(f"{', '.join(flags)}: only for students; leave it out with --teacher")
    options, lens = teacher_options(args), _lens(args)
    if args.decoder:
        allow(args.decoder)
    survey = predict.survey(args.images, out=args.out)
    jobs = survey.jobs
    if args.teacher:
        name = args.teacher
        estimator = predict.load_teacher(name, args.weights, device=args.device, **options)
    else:
        name = args.student or "pocket"
        estimator = predict.load(name, device=args.device, size=args.size, encoder_weights=args.encoder_weights)
    note(f"{name}: {estimator.card.kind}, larger is {estimator.card.larger_is}; licence: {estimator.card.licence}")
    _check_used(args, takes_focal=estimator.takes_focal)
    for line in survey.notes:
        note(line)
    solid_formats = [name for name in args.formats if name in SOLID]
    if solid_formats and any(job.is_video for job in jobs) and len(solid_formats) < len(args.formats):
        note(f"videos have no {', '.join(solid_formats)}: only photos get them")
    if estimator.takes_focal and args.fov is None and not args.intrinsics:
        note(f"its metres depend on the camera: each photo's EXIF, else {FOV:g} degrees across; --fov sets it")
    with progress("predict") as report:
        outcome = predict.run(estimator, jobs, out=args.out, formats=args.formats, report=report, lens=lens)
    outcome.problems[:0] = survey.refused
    if outcome.problems:
        fail("\n".join(outcome.problems))
    if survey.skipped:
        note(f"ignored: {filetypes.summarize_counts(survey.skipped)}")
    present = f", {outcome.present} already there" if outcome.present else ""
    failed = f", {len(outcome.problems)} could not be used" if outcome.problems else ""
    say(
        f"{args.out}: {outcome.written} of {len(jobs) + len(survey.refused)} predicted{present}{failed}",
        out=str(args.out),
        predicted=outcome.written,
        present=outcome.present,
        failed=len(outcome.problems),
    )
    return 1 if outcome.problems else 0


def _check_used(args: argparse.Namespace, *, takes_focal: bool) -> None:
    """Raises ValueError for options of the camera or the depth that would have no effect."""
    from distill.inference.outputs import SOLID

    options = (
        {"--far": args.far} if takes_focal else {"--fov": args.fov, "--intrinsics": args.intrinsics, "--far": args.far}
    )
    flags = [name for name, value in options.items() if value is not None]
    if flags and not SOLID.keys() & set(args.formats):
        raise ValueError(f"{', '.join(flags)}: only for 3D files; give --write {' '.join(SOLID)}, or leave it out")


def _lens(args: argparse.Namespace) -> Any:
    """The camera that the command line describes. Raises ValueError for an impossible one."""
    from distill.inference.solid import FAR, MAX_FAR, Lens, camera

    if args.fov is not None and args.intrinsics:
        raise ValueError("--fov and --intrinsics both describe the camera: keep one")
    far = FAR if args.far is None else args.far
    if not 1 < far <= MAX_FAR:
        raise ValueError(f"--far must be above 1, and at most {MAX_FAR:g}, not {far:g}")
    if args.fov is not None:
        camera(args.fov, None, 1, 1)
    if args.intrinsics and not (all(map(math.isfinite, args.intrinsics)) and min(args.intrinsics[:2]) > 0):
        raise ValueError("--intrinsics FX FY CX CY: finite numbers of pixels, the focal lengths above 0")
    return Lens(args.fov, tuple(args.intrinsics) if args.intrinsics else None, far)
