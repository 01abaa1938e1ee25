"""Runs two studies from scratch to their tables, in parallel processes and a time limit: this project's evidence.

    python -m tests.evidence [fiffdepth] [filter] [--processes 16] [--seconds 150] [--seeds 0,1,2,3,4]
    python -m tests.evidence --collect

    fiffdepth    tests/evidence/small_diffusion.py, then distill ablate recipes/ablations/fiffdepth.toml
    filter       tests/evidence/planted.py, then distill ablate recipes/anydepth/evidence.toml

Both run at once on the CPU, each with half of the processes, one thread each. Finished work is not repeated; after
--seconds everything is stopped, and the finished part is collected. OUT/NAME.tar.gz then holds a study's tables and
JSON and the logs and scores of its cells, to be copied elsewhere. --collect only makes the tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = "torch accelerate timm diffusers transformers safetensors cv2 PIL numpy rich webdataset".split()
STUDIES = {
    "fiffdepth": ("small_diffusion", "recipes/ablations/fiffdepth.toml", "fiffdepth-bench"),
    "filter": ("planted", "recipes/anydepth/evidence.toml", "anydepth-evidence-bench"),
}
"""A study's preparing module, the study, and the folder of its tables."""
PREPARED = {"fiffdepth": Path("runs/fiffdepth-bench"), "filter": Path("runs/anydepth-evidence")}
KEPT = ("cell.json", "train/log.jsonl", "train/run.json", "scores/*.json")
"""The files of a cell from which tables are made."""


def commands(name: str, args: argparse.Namespace, processes: int) -> list[list[str]]:
    """The commands of a study, to be run in order."""
    module, study, _ = STUDIES[name]
    prepare = [sys.executable, "-m", f"tests.evidence.{module}", "--seeds", args.seeds, "--processes", str(processes)]
    prepare += ["--labels", str(args.out / name)] if name == "fiffdepth" else []
    labels = [sys.executable, "-m", "tests.evidence.labels", study, "--out", str(args.out / name)]
    ablate = [sys.executable, "-m", "distill", "ablate", study, "--out", str(args.out / name)]
    ablate += [part for assignment in args.set for part in ("--set", assignment)]
    return [prepare, [*labels, "--processes", str(processes)], [*ablate, "--processes", str(processes)]]


def environment() -> dict[str, str]:
    """One thread per process, no card, no network."""
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **settings, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def run(names: list[str], args: argparse.Namespace) -> None:
    """Runs the studies' commands in parallel until they end or the time is over."""
    ends, processes = time.monotonic() + args.seconds, max(1, args.processes // len(names))
    left = {name: commands(name, args, processes) for name in names}
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while (left or running) and time.monotonic() < ends:
            for name in [name for name in left if name not in running]:
                command = left[name].pop(0)
                with (args.out / f"{name}.log").open("ab") as log:
                    running[name] = subprocess.Popen(
                        command, stdout=log, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
                    )
                left = {study: remaining for study, remaining in left.items() if remaining}
            time.sleep(0.5)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                code = running.pop(name).returncode
                print(f"{time.monotonic() - ends + args.seconds:4.0f} s  {name}: a step ended in {code}", flush=True)
                if code:
                    print("\n".join((args.out / f"{name}.log").read_text(errors="replace").splitlines()[-5:]))
                    left.pop(name, None)
    finally:
        for process in running.values():
            os.killpg(process.pid, signal.SIGKILL)  # with its workers: it is in a separate session
            process.wait()
    for name in {*left, *running}:
        print(f"{name}: stopped after {args.seconds:g} s; the same command goes on", flush=True)


def collect(names: list[str], args: argparse.Namespace) -> None:
    """Makes the tables of the finished cells, in parallel, and the archives."""
    processes = []
    for name in names:
        prepare, _, ablate = commands(name, args, 1)
        collecting = [[*ablate, "--collect"]] + ([[*prepare, "--collect"]] if name == "filter" else [])
        with (args.out / f"{name}.log").open("ab") as log:
            for command in collecting:
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment()))
    for process in processes:
        process.wait()
    for name in names:
        print(pack(name, args.out), flush=True)


def pack(name: str, out: Path) -> str:
    """Writes OUT/NAME.tar.gz and returns a line about its contents."""
    folder, prepared = out / name, PREPARED[name]
    chosen = [folder / STUDIES[name][2] / file for file in ("table.md", "study.json")]
    chosen += [path for pattern in KEPT for path in folder.glob(f"cells/*/{pattern}")]
    chosen += [path for pattern in ("planted.*", "*/made.json", "*/found.json") for path in prepared.glob(pattern)]
    chosen = [path for path in chosen if path.is_file()]
    with tarfile.open(out / f"{name}.tar.gz", "w:gz") as tar:
        for path in chosen:
            tar.add(path)
    done = sum(path.name == "cell.json" for path in chosen)
    size = (out / f"{name}.tar.gz").stat().st_size / 1e6
    for text in (folder / STUDIES[name][2] / "table.md", prepared / "planted.md"):
        if text.is_file():
            print(text.read_text())
    return f"{out / name}.tar.gz: {done} cells, {len(chosen)} files, {size:.2f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"{', '.join(STUDIES)}; by default both")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of all studies together")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which everything is stopped and collected")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="to prepare; the studies say their own seeds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of every cell")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--collect", action="store_true", help="the tables of what is done; runs nothing")
    args = parser.parse_args()
    names = args.studies or [*STUDIES]
    if unknown := [name for name in names if name not in STUDIES]:
        parser.error(f"no study {', '.join(unknown)}; there are {', '.join(STUDIES)}")
    if lacking := [module for module in NEEDED if importlib.util.find_spec(module) is None]:
        parser.error(f"this Python lacks {', '.join(lacking)}: pip install -e '.[teachers]'")
    os.chdir(ROOT)
    args.out.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(args.out).free < 2e9:
        parser.error(f"{args.out}: less than 2 GB are free")
    if not args.collect:
        run(names, args)
    collect(names, args)


if __name__ == "__main__":
    main()
