"""What one checkout computes, written down item by item. Run by tests/compare_commits.py, which knows the arguments.

write    labels, trains, scores, predicts and exports; the maths; the golden cases
read     does with what the old checkout wrote (old/) what a user would do with it
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

# An editable install would lend its own files to a checkout that lacks some.
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f"{getattr(f, '__module__', '')}{f!r}"]

import probe_recipes as recipes  # noqa: E402
import probe_runs as runs  # noqa: E402
import torch  # noqa: E402
from probe_golden import golden  # noqa: E402
from probe_maths import maths  # noqa: E402
from probe_record import Record  # noqa: E402


def write(record: Record) -> None:
    """Everything that needs nothing of the other checkout."""
    names = [*recipes.LABELS, *(["sa1b"] if Path("sa1b").exists() else [])]
    for name in names:
        with record.section(f"label {name}"):
            runs.label(record, name)
    for name in recipes.TRAININGS:
        with record.section(f"train {name}"):
            runs.train(record, name)
    with record.section("resume"):
        runs.resume(record)
    with record.section("predict"):
        first = f"runs/{runs.FIRST}/train/student"
        runs.predict(record, "student", first, "inputs/photos", "inputs/clip.mp4", size=84)
        runs.predict(record, "pocket", "pocket", "inputs/photos/inside")
    with record.section("export"):
        runs.export(record, "first", f"runs/{runs.FIRST}/train/student")
    for name in recipes.SCORES:
        with record.section(f"score {name}"):
            runs.score(record, name)
    with record.section("score stored"):
        runs.score_stored(record)
    with record.section("compare"):
        runs.compare(record)
    maths(record)
    golden(record, Path("golden"))


def read(record: Record) -> None:
    """Everything that the old checkout's folder is good for."""
    for name in recipes.LABELS:
        with record.section(f"read labels {name}"):
            runs.read_labels(record, name)
    for take in (runs.train_on_old, runs.label_from_old, runs.use_old_students, runs.score_old):
        with record.section(take.__name__):
            take(record)


def foreign(checkout: Path) -> list[str]:
    """Modules of the project that were not loaded from this checkout."""

    def file(module: ModuleType) -> Path:
        return Path(getattr(module, "__file__", None) or checkout).resolve()

    ours = [m for n, m in sys.modules.items() if n.partition(".")[0] in ("distill", "teachers", "students", "eval")]
    return sorted(str(file(m)) for m in ours if not file(m).is_relative_to(checkout))


def main() -> None:
    """One phase, in the current folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("phase", choices=["write", "read"])
    parser.add_argument("checkout", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(Path(args.phase))
    if args.phase == "write":
        write(record)
    else:
        read(record)
    if files := foreign(args.checkout.resolve()):
        sys.exit(f"{args.checkout}: {len(files)} modules came from elsewhere, the first {files[0]}")


if __name__ == "__main__":
    main()
