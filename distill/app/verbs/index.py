"""list the images of a published data set in a file, once; resumes

distill index hypersim data/hypersim     to data/hypersim/INDEX.hypersim.tsv, which recipes and `distill filter` read
distill list datasets                    names, depth types, licences, layouts
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill.core.home import home_expanded


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="NAME", help="a name from `distill list datasets`, or your own Python file")
    parser.add_argument("root", metavar="ROOT", type=Path, help="the data set's folder, laid out as published")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to write it (default: ROOT/INDEX.NAME.tsv)")


def run(args: argparse.Namespace) -> int:
    from distill.app.console import note, progress, say
    from distill.core.plugins import find
    from distill.core.wording import counted
    from distill.data.datasets import FOLDER, _index

    facts = find(FOLDER, args.dataset).FACTS
    with progress(f"index {args.dataset} (groups)") as report:
        index = _index.write(args.dataset, home_expanded(args.root), args.out, report=report)
    published = f"; {facts.images:,} are published" if facts.images else ""
    left_out = [f"{counted(index.alone, 'image')} without depth"] if index.alone else []
    left_out += [f"{counted(index.spare, 'depth file')} without an image"] if index.spare else []
    left_out += [f"{counted(index.unlisted, 'image')} not in the authors' table"] if index.unlisted else []
    left_out_note = f" (left out: {', '.join(left_out)})" if left_out else ""
    found = f"{counted(index.rows, 'image')} with depth in {counted(index.groups, 'group')}"
    say(f"{index.path}: {found}{left_out_note}{published}")
    if index.resumed:
        note(f"{index.resumed} groups were indexed by an earlier call")
    if index.alone:
        note(f"without a depth file, among others: {', '.join(index.examples)}")
    if index.spare:
        note(f"without an image, among others: {', '.join(index.spare_examples)}")
    note(f"{facts.title}: {facts.kind}; licence: {facts.licence}. {facts.note}")
    return 0
