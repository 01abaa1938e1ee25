"""`make chaos`: runs kill loops and fuzzers for some minutes and prints their outcomes; exits with 1 if any failed.

python -m tests.chaos --minutes 10 --seed 3 --only photos kill-train
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

os.environ["HF_HUB_OFFLINE"] = "1"


def parts(folder: Path, rng: Random) -> dict[str, tuple[object, Iterator[int]]]:
    """Every part by name: its counts and its step generator. A part sets up its files at its first step."""
    from tests.chaos import fuzz, kills, recipes
    from tests.chaos.lab import Lab
    from tests.chaos.sweep import Counts

    found: dict[str, tuple[object, Iterator[int]]] = {}

    def add(name: str, part, *world) -> None:
        counts = Counts(name)
        found[name] = (counts, part(counts, Random(rng.random()), *world))

    add("photos", fuzz.photos)
    add("tars", fuzz.tars, folder / "tars")
    add("predictions", fuzz.predictions, folder / "predictions")
    add("students", fuzz.students, folder / "students")
    add("labels", fuzz.labels, Lab(folder / "labels", photos=2, per_tar=2))
    add("recipes", recipes.recipes, Lab(folder / "recipes", photos=2, per_tar=2))
    add("run", fuzz.run, Lab(folder / "run", photos=3, per_tar=4))
    for name in ("label", "train", "repair", "predict", "interrupt", "stop"):
        add(f"kill-{name}", getattr(kills, name), Lab(folder / name))
    add("kill-fetch", kills.fetch, folder / "fetch")
    return found


def main() -> int:
    """Runs the parts, one step of each at a time."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", nargs="+", default=[], metavar="PART")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        os.environ["XDG_STATE_HOME"] = f"{place}/state"
        import torch

        torch.set_num_threads(1)
        all_parts = parts(Path(place), Random(args.seed))
        chosen = {name: part for name, part in all_parts.items() if not args.only or name in args.only}
        if unknown := set(args.only) - set(all_parts):
            parser.error(f"no part {', '.join(unknown)}; there are {', '.join(all_parts)}")
        end = time.monotonic() + 60 * args.minutes
        while time.monotonic() < end:
            for _, steps in chosen.values():
                next(steps)
                if time.monotonic() >= end:
                    break
        lines, faults = [f"seed {args.seed}, {args.minutes:g} minutes"], []
        for name, (counts, _) in chosen.items():
            outcomes = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.kinds.items())) or "not reached"
            lines.append(f"{name:>16}: {outcomes}")
            faults += counts.faults
        sys.stdout.write("\n".join([*lines, *faults] if faults else [*lines, "no fault"]) + "\n")
        return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
