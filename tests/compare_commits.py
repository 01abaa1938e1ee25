"""Checks that a refactoring changed no results: two checkouts do the same work and are compared byte by byte.

    python tests/compare_commits.py BASELINE THIS                  e.g. ../base .
    python tests/compare_commits.py BASELINE THIS --sa1b DIR       also damaged tars as SA-1B packs them
    python tests/compare_commits.py BASELINE . --only losses hdn   sections whose name has one of these words

Each checkout labels, trains, scores, predicts and exports in a separate process and folder; then both read BASELINE's
outputs (labels, students, predictions). Compared are: every map and image of every label shard, json records without
renamed keys and hashes of recipes; losses and their gradients; weights after 20 steps, optimizer states and held-out
losses; scores in both protocols; predictions and exports; draws of crops, teachers and order; golden cases.
The names that a checkout uses are in tests/commits/probe_names.py: extend RENAMED there. About four minutes on two
cores.

Prints a line per item. Exit code 1 if any item differs or could not be recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COMMITS = Path(__file__).parent / "commits"
SUFFIXES = (".npz", ".json", ".bin", ".error")


@dataclass(frozen=True)
class Side:
    """One checkout and its working folder."""

    name: str
    checkout: Path
    folder: Path

    def item(self, phase: str, name: str) -> Path | None:
        """The file of an item; None if it was not recorded."""
        paths = (self.folder / phase / (name.replace("/", "~") + suffix) for suffix in SUFFIXES)
        return next((path for path in paths if path.is_file()), None)

    def items(self, phase: str) -> list[str]:
        """The recorded items, in order."""
        order = self.folder / phase / "order.json"
        return json.loads(order.read_text()) if order.is_file() else []


def start(side: Side, phase: str, only: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the probe of one checkout."""
    # -P: keeps the probe's folder and the current one out of sys.path, before the checkout.
    command = [sys.executable, "-P", str(COMMITS / "probe.py"), phase, str(side.checkout)]
    command += ["--only", *only] if only else []
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (side.checkout, COMMITS))), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with (side.folder / f"{phase}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=side.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run(sides: Sequence[Side], phase: str, only: Sequence[str] = ()) -> list[str]:
    """Run both checkouts in parallel; returns the failures of whole processes."""
    processes = [start(side, phase, only) for side in sides]
    faults = []
    try:
        for side, process in zip(sides, processes, strict=True):
            if process.wait():
                last = (side.folder / f"{phase}.log").read_text(errors="replace").strip().splitlines()[-1:]
                faults.append(f"{side.name}, {phase}: ended with {process.returncode}: {' '.join(last)}")
    finally:
        for process in processes:
            process.terminate()
    return faults


# --- comparing --------------------------------------------------------------------------------------------------------


def first_difference(one: Any, other: Any, at: str = "") -> str:
    """The first difference of two json values: where, and both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{at or '.'}: keys only there {sorted(one.keys() - other.keys())}, only here {sorted(other.keys() - one.keys())}"  # noqa: E501
        return next((d for key in one if (d := first_difference(one[key], other[key], f"{at}.{key}"))), "")
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return next((d for i, v in enumerate(one) if (d := first_difference(v, other[i], f"{at}[{i}]"))), "")
    return "" if one == other else f"{at}: {str(one)[:150]!r}, now {str(other)[:150]!r}"


def _arrays_differ(one: Path, other: Path) -> str:
    with np.load(one) as before, np.load(other) as now:
        if before.files != now.files:
            lost, new = set(before.files) - set(now.files), set(now.files) - set(before.files)
            return f"arrays only there {sorted(lost)[:4]}, only here {sorted(new)[:4]}, or in another order"
        differ = [key for key in before.files if before[key].tobytes() != now[key].tobytes()]
        key = differ[0] if differ else before.files[0]
        a, b = before[key], now[key]
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{len(differ)} of {len(before.files)} arrays; {key}: {a.dtype} {a.shape}, now {b.dtype} {b.shape}"
        if a.dtype.kind in "fiub":
            off = np.nanmax(np.abs(a.astype(np.float64) - b.astype(np.float64)), initial=0.0)
            return f"{len(differ)} of {len(before.files)} arrays; {key}: off by at most {off:.3g}"
        return f"{len(differ)} of {len(before.files)} arrays; {key}"


def difference(one: Path | None, other: Path | None) -> str:
    """A description of the difference between two items' files; "" if they are equal."""
    for path, where in ((one, "BASELINE"), (other, "THIS")):
        if path is None:
            return f"not taken in {where}"
        if path.suffix == ".error":
            return f"{where}: {path.read_text()}"
    assert one is not None and other is not None
    if one.read_bytes() == other.read_bytes():
        return ""
    if one.suffix == ".npz":
        return _arrays_differ(one, other)
    if one.suffix == ".json":
        return first_difference(json.loads(one.read_text()), json.loads(other.read_text())) or "order of keys"
    return f"{one.stat().st_size} bytes, now {other.stat().st_size}"


def short(path: Path | None) -> str:
    """The first digits of an item's hash."""
    if path is None or path.suffix == ".error":
        return "-" * 12
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def rows(old: Side, new: Side) -> Iterator[tuple[str, str, str, str]]:
    """(item, old hash, new hash, difference) of every item that either side recorded."""
    for phase in ("write", "read"):
        names = old.items(phase)
        names += [name for name in new.items(phase) if name not in set(names)]
        for name in names:
            old_file, new_file = old.item(phase, name), new.item(phase, name)
            yield name, short(old_file), short(new_file), difference(old_file, new_file)


def commit(checkout: Path) -> str:
    """The folder of a checkout and its commit, with "dirty" where files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    description = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"{checkout} {description or '(no commit)'}"


def report(old: Side, new: Side, faults: Sequence[str]) -> bool:
    """Prints the table; True if everything is equal."""
    items = list(rows(old, new))
    for name, side in (("BASELINE", old), ("THIS", new)):
        print(f"{name:8} {commit(side.checkout)}")
    width = max((len(name) for name, *_ in items), default=4)
    print(f"{'item':{width}}  {'BASELINE':12}  {'THIS':12}")
    for name, old_hash, new_hash, differs in items:
        print(f"{name:{width}}  {old_hash}  {new_hash}  {'DIFFERENT' if differs else 'equal'}")
    bad = [(name, differs) for name, _, _, differs in items if differs]
    for name, differs in bad:
        print(f"\n{name}\n    {differs}")
    for fault in faults:
        print(f"\n{fault}")
    print(f"\n{len(items) - len(bad)} of {len(items)} items are equal")
    return bool(items) and not bad and not faults


def main() -> int:
    """Runs both and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", metavar="BASELINE", type=Path, help="a checkout of the commit that is right")
    parser.add_argument("this", metavar="THIS", type=Path, help="a checkout of the commit that must compute the same")
    parser.add_argument("--sa1b", metavar="DIR", type=Path, help="a folder with sa_000000.tar and damaged ones")
    parser.add_argument("--golden", metavar="DIR", type=Path, help="golden cases (BASELINE's tests/golden)")
    parser.add_argument(
        "--only", metavar="WORDS", nargs="+", default=[], help="sections that have one of these in their name"
    )
    parser.add_argument("--keep", metavar="DIR", type=Path, help="work there, and leave everything for a look")
    args = parser.parse_args()
    started = time.monotonic()
    work = Path(args.keep or tempfile.mkdtemp(prefix="commits-")).resolve()
    golden = (args.golden or args.baseline / "tests" / "golden").resolve()
    sides = [Side(name, path.resolve(), work / name) for name, path in (("old", args.baseline), ("new", args.this))]
    sys.path.insert(0, str(COMMITS))
    from probe_inputs import make

    try:
        make(work / "inputs", golden)
        for side in sides:
            side.folder.mkdir()
            (side.folder / "inputs").symlink_to(work / "inputs")
            (side.folder / "golden").symlink_to(golden)
            (side.folder / "old").symlink_to(work / "old")
            if args.sa1b:
                (side.folder / "sa1b").symlink_to(args.sa1b.resolve())
        faults = [fault for phase in ("write", "read") for fault in run(sides, phase, args.only)]
        equal = report(sides[0], sides[1], faults)
        print(f"{time.monotonic() - started:.0f} s" + (f"; everything is in {work}" if args.keep else ""))
        return 0 if equal else 1
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
