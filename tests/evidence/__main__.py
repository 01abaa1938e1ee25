"""Two studies from nothing to their tables, in parallel processes and within a time: the evidence of this project.

    python -m tests.evidence [fiffdepth] [filter] [--processes 16] [--seconds 150] [--seeds 0,1,2,3,4]
    python -m tests.evidence --collect

    fiffdepth    tests/evidence/small_diffusion.py, then distill ablate recipes/ablations/fiffdepth.toml
    filter       tests/evidence/planted.py, then distill ablate recipes/anydepth/evidence.toml

Both at once, each with half of the processes, one thread each, on the CPU. What is done is not done again; after
--seconds everything is stopped, and what was finished by then is collected. OUT/NAME.tar.gz then holds a study's tables
and JSON, the logs and scores of its cells: what to carry away. --collect alone tables what is there.
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
"""What prepares a study, the study, and the folder of its tables."""
PREPARED = {"fiffdepth": Path("runs/fiffdepth-bench"), "filter": Path("runs/anydepth-evidence")}
KEPT = ("cell.json", "train/log.jsonl", "train/run.json", "scores/*.json")
"""Of a cell, what a table is made from."""


def commands(name: str, args: argparse.Namespace, processes: int) -> list[list[str]]:
    """What to run for a study, one after the other."""
    made_by, study, _ = STUDIES[name]
    prepare = [sys.executable, "-m", f"tests.evidence.{made_by}", "--seeds", args.seeds, "--processes", str(processes)]
    prepare += ["--labels", str(args.out / name)] if name == "fiffdepth" else []
    labels = [sys.executable, "-m", "tests.evidence.labels", study, "--out", str(args.out / name)]
    ablate = [sys.executable, "-m", "distill", "ablate", study, "--out", str(args.out / name)]
    ablate += [part for assignment in args.set for part in ("--set", assignment)]
    return [prepare, [*labels, "--processes", str(processes)], [*ablate, "--processes", str(processes)]]


def environment() -> dict[str, str]:
    """One thread per process, no card, no network."""
    more = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **more, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def run(names: list[str], args: argparse.Namespace) -> None:
    """Runs the chains of commands side by side until they end or the time is over."""
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
                left = {one: rest for one, rest in left.items() if rest}
            time.sleep(0.5)
            for name in [name for name, one in running.items() if one.poll() is not None]:
                code = running.pop(name).returncode
                print(f"{time.monotonic() - ends + args.seconds:4.0f} s  {name}: a step ended in {code}", flush=True)
                if code:
                    print("\n".join((args.out / f"{name}.log").read_text(errors="replace").splitlines()[-5:]))
                    left.pop(name, None)
    finally:
        for one in running.values():
            os.killpg(one.pid, signal.SIGKILL)  # its workers with it: it has a session of its own
            one.wait()
    for name in {*left, *running}:
        print(f"{name}: stopped after {args.seconds:g} s; the same command goes on", flush=True)


def collect(names: list[str], args: argparse.Namespace) -> None:
    """Tables of what is done, side by side, and what to carry away."""
    started = []
    for name in names:
        prepare, _, ablate = commands(name, args, 1)
        every = [[*ablate, "--collect"]] + ([[*prepare, "--collect"]] if name == "filter" else [])
        with (args.out / f"{name}.log").open("ab") as log:
            for command in every:
                started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment()))
    for one in started:
        one.wait()
    for name in names:
        print(pack(name, args.out), flush=True)


def pack(name: str, out: Path) -> str:
    """Writes OUT/NAME.tar.gz and says what is in it."""
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
