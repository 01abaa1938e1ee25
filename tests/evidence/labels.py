"""Makes the labels of a study's cells in parallel; `distill ablate` makes missing ones sequentially.

python -m tests.evidence.labels STUDY --out DIR --processes N
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from distill.app import build, commands
from distill.app.study import StudyCell, cells, read_study
from distill.labelling.lock import RunLockedError


def of_study(study: Path, out: Path) -> list[StudyCell]:
    """One cell for each set of labels, ordered by seed."""
    by_seed = sorted(cells(read_study(study), study, "bench", out, []), key=lambda cell: cell.seed)
    return list({build.labels_folder(cell.recipe): cell for cell in by_seed}.values())


def label(number: int, study: Path, out: Path) -> None:
    """Makes one set of labels, unless it exists or another process is making it."""
    torch.set_num_threads(1)
    recipe = of_study(study, out)[number].recipe
    if not (build.labels_folder(recipe) / "manifest.json").is_file():
        try:
            commands.run_label(recipe)
        except RunLockedError:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="of distill ablate")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    count = len(of_study(args.study, args.out))
    with ProcessPoolExecutor(args.processes) as pool:
        list(pool.map(partial(label, study=args.study, out=args.out), range(count)))
    print(f"{args.study}: {count} sets of labels", flush=True)


if __name__ == "__main__":
    main()
