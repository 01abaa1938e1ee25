"""Records what one checkout computes, item by item. Run by tests/compare_commits.py, which passes the arguments.

write    labels, trains, scores, predicts and exports; the maths; the golden cases
read     uses the old checkout's outputs (old/) as a user would
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

# An editable install would provide its own files for modules that a checkout lacks.
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f"{getattr(f, '__module__', '')}{f!r}"]

import probe_recipes as recipes  # noqa: E402
import probe_runs as runs  # noqa: E402
import torch  # noqa: E402
from probe_golden import golden  # noqa: E402
from probe_maths import maths  # noqa: E402
from probe_record import Record  # noqa: E402

Sections = Iterator[tuple[str, Callable[[], None]]]


def write(record: Record) -> Sections:
    """Everything that does not need the other checkout."""
    for name in [*recipes.LABELS, *(["sa1b"] if Path("sa1b").exists() else [])]:
        yield f"label {name}", partial(runs.label, record, name)
    for name in recipes.TRAININGS:
        yield f"train {name}", partial(runs.train, record, name)
    yield "resume", partial(runs.resume, record)
    yield "predict", partial(predict, record)
    yield "export", partial(runs.export, record, "first", f"runs/{runs.FIRST}/train/student")
    for name in recipes.SCORES:
        yield f"score {name}", partial(runs.score, record, name)
    yield "score stored", partial(runs.score_stored, record)
    yield "compare", partial(runs.compare, record)
    yield from maths(record)
    yield from golden(record, Path("golden"))


def predict(record: Record) -> None:
    """Predicts maps of photographs and of a video with the first student and the built-in one."""
    first = f"runs/{runs.FIRST}/train/student"
    runs.predict(record, "student", first, "inputs/photos", "inputs/clip.mp4", size=84)
    runs.predict(record, "pocket", "pocket", "inputs/photos/inside")


def read(record: Record) -> Sections:
    """Everything that uses the old checkout's folder."""
    for name in recipes.LABELS:
        yield f"read labels {name}", partial(runs.read_labels, record, name)
    for take in (runs.train_on_old, runs.label_from_old, runs.use_old_students, runs.score_old):
        yield take.__name__, partial(take, record)


def foreign(checkout: Path) -> list[str]:
    """Modules of the project that were not loaded from this checkout."""

    def file(module: ModuleType) -> Path:
        return Path(getattr(module, "__file__", None) or checkout).resolve()

    ours = [m for n, m in sys.modules.items() if n.partition(".")[0] in ("distill", "teachers", "students", "eval")]
    return sorted(str(file(m)) for m in ours if not file(m).is_relative_to(checkout))


def main() -> None:
    """Runs one phase, in the current folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("phase", choices=["write", "read"])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", nargs="+", default=[""])
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(Path(args.phase))
    for name, take in (write if args.phase == "write" else read)(record):
        if any(words in name for words in args.only):
            with record.section(name):
                take()
    if files := foreign(args.checkout.resolve()):
        sys.exit(f"{args.checkout}: {len(files)} modules came from elsewhere, the first {files[0]}")


if __name__ == "__main__":
    main()
