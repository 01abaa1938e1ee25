"""download a benchmark's archive; resumes

distill fetch nyu --root data                     to data/nyuv2/..., then: distill score ... --root data
distill fetch nyu --root data --url MIRROR/       from another host with the same files
"""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmarks", metavar="BENCHMARK", nargs="+", help="names from `distill list benchmarks`")
    parser.add_argument("--root", metavar="DIR", required=True, help="the folder of all benchmarks")
    parser.add_argument("--url", metavar="URL", default="", help="a mirror: the file's address, or a folder's with /")
    parser.add_argument("--sha256", metavar="HEX", default="", help="the archive's SHA-256, checked after the download")


def run(args: argparse.Namespace) -> int:
    from distill.app.console import note, progress, say, table
    from distill.eval.completeness import check_benchmark
    from distill.eval.fetch import fetch_benchmark

    if len(args.benchmarks) > 1 and (args.sha256 or (args.url and not args.url.endswith("/"))):
        raise ValueError("--sha256 and the address of a single file need a single benchmark")
    bad = False
    for name in args.benchmarks:
        with progress(f"fetch {name} (MB)") as report:
            got = fetch_benchmark(name, args.root, url=args.url, sha256=args.sha256, report=report)
        say(f"{got.path}: {got.num_bytes / 1e6:,.1f} MB, {got.resumed / 1e6:,.1f} of them from an earlier call")
        checksum_state = (
            "matches the published one"
            if got.published
            else f"no published one is known; recorded in {got.path.name}.sha256"
        )
        note(f"sha256 {got.sha256}: {checksum_state}")
        findings = check_benchmark(name, got.path)
        table(f"doctor: {name}", ["", "what", "remedy"], [[f.level, f.what, f.remedy] for f in findings])
        bad |= any(f.level == "bad" for f in findings)
    return 1 if bad else 0
