"""score labelled data, drop what teaches badly, write lists of names for recipes; resumes

distill filter hypersim=data/hypersim virtual_kitti2=data/vkitti2 --out runs/filter
distill filter data/rgbd/INDEX.tsv runs/demo/labels/HASH --out runs/filter --cut 'disagreement>0.3'
distill filter hypersim=data/hypersim --out runs/filter --worst s_dist=0.3     other thresholds, without another pass

The default is AnyDepth's rule: drop samples with fewer than 20 % valid pixels, then the lowest 20 % of s_dist and of
s_grad of each source.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="NAME=ROOT of an indexed data set, pairs, a labels folder, a recipe",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="where to write scores, lists, filter.html; resumes"
    )
    parser.add_argument("--valid", metavar="SHARE", type=float, default=0.2, help="minimum share of valid pixels (0.2)")
    parser.add_argument(
        "--worst",
        metavar="SCORE=SHARE",
        action="append",
        default=[],
        help="drop the worst of a score (s_dist, s_grad: 0.2)",
    )
    parser.add_argument("--cut", metavar="SCORE>BOUND", action="append", default=[], help="drop samples beyond a bound")
    parser.add_argument(
        "--far", metavar="METRES", type=float, default=0.0, help="truth beyond it is invalid; 0: no bound"
    )
    parser.add_argument("--teacher", metavar="NAME", default="", help="of a labels folder: score this teacher's labels")
    parser.add_argument("--limit", metavar="N", type=int, default=0, help="only the first N samples of each source")
    parser.add_argument("--workers", metavar="N", type=int, default=2, help="processes that read and score (2)")
    parser.add_argument("--depth-only", action="store_true", help="leave out edges, sky and sharpness")
    parser.add_argument("--no-page", action="store_true", help="write no filter.html")


def run(args: argparse.Namespace) -> int:
    from distill.app import filtering
    from distill.app.console import note, progress, say, table
    from distill.app.filter_page import write_page
    from distill.app.filter_sources import open_sources
    from distill.core.wording import counted

    shares = {"s_dist": 0.2, "s_grad": 0.2} | dict(map(filtering.worst, args.worst))
    rules = filtering.Rules(
        valid=args.valid,
        worst={name: share for name, share in shares.items() if share},
        cuts=tuple(map(filtering.cut, args.cut)),
    )
    sources = open_sources(args.sources, far=args.far, limit=args.limit, teacher=args.teacher)
    for source in sources:
        with progress(f"filter {source.name}") as report:
            done = filtering.score_source(
                source, args.out, workers=args.workers, with_image=not args.depth_only, report=report
            )
        if done:
            note(f"{source.name}: {done} of {len(source.names)} samples were scored before")
    verdicts = [filtering.judge(source, args.out, rules) for source in sources]
    results = filtering.write_results(verdicts, args.out, rules)
    rows = [
        [
            summary["name"],
            str(summary["samples"]),
            str(summary["kept"]),
            "; ".join(f"{n} {why}" for why, n in summary["dropped"].items()),
        ]
        for summary in results["sources"]
    ]
    table("filter", ["source", "samples", "kept", "dropped"], rows, text=True)
    for verdict in verdicts:
        for number, error in list(verdict.errors.items())[:3]:
            note(f"{verdict.source.names[number]}: {error}")
        if verdict.errors and len(verdict.errors) == len(verdict.reasons):
            raise ValueError(f"{verdict.source.what}: none of its {len(verdict.errors)} samples can be read (above)")
        if not verdict.kept:
            raise ValueError(f"{verdict.source.what}: nothing is left; relax --valid, --worst or --cut")
    if not args.no_page:
        say(f"page: {write_page(verdicts, args.out, rules).resolve()}")
    for verdict in verdicts:
        path = f'"{args.out / verdict.source.name}.txt"'
        entry = f"{verdict.source.key} = {path}" if verdict.source.key else f"{path} (no recipe key takes these names)"
        say(f"{entry}   {counted(len(verdict.kept), 'name')}")
    return 0
