"""Images per second and peak memory of every teacher, against the plain official way: one image at a time, float32.

    python tests/speed/teachers.py [--only depth_anything_v2 marigold] [--images 4] [--rounds 3] [--device cuda]

Each variant runs in a process of its own, so that its memory is its own, and takes turns there with the plain way, so
that a busy machine slows both. On a CPU one thread works and processor time is counted. Networks have random weights:
Depth Anything V2 and 3 in the size of a ViT-S, the others small ones of the same shape (no claim about their published
sizes). Images are label crops that need no resizing. Prints images/s, how many times the plain way that is, peak memory
beyond what loading took, and how far the maps move (in deviations of the plain map).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from distill.core.plugins import find  # noqa: E402
from tests import tiny_teachers as tiny  # noqa: E402

# Sides: what the authors feed on an accelerator, about half of it on a CPU.
SIZES = {"depth_anything_v2": (518, 252), "depth_anything_3": (504, 252), "midas": (384, 192), "checkpoint": (448, 224)}
OTHERS = (512, 128)
VARIANTS = ["plain", "batch", "bfloat16", "float16", "channels_last", "compile", "batch+bfloat16", "batch+slicing"]
DIFFUSION = ["marigold", "genpercept", "fiffdepth"]
TEACHERS = ["depth_anything_v2", "depth_anything_3", "midas", *DIFFUSION, "checkpoint"]


def write(name: str, folder: Path) -> tuple[str, dict[str, object]]:
    """A random checkpoint; ViT-S size where the network is a ViT."""
    if name == "depth_anything_v2":
        return tiny.depth_anything_v2_small(folder), {"resize": "none"}
    if name == "depth_anything_3":
        return tiny.depth_anything_3_small(folder), {"resize": "none"}
    if name == "checkpoint":
        return "pocket", {}
    if name in DIFFUSION:
        return tiny.diffusion_small(folder, name), {"resize": "none"}
    weights, _ = getattr(tiny, name)(folder)
    return weights, {"resize": "none"}


def modules(teacher: object) -> list[tuple[object, str, torch.nn.Module]]:
    """(owner, attribute, network) of everything in a teacher that runs."""
    found = []
    for owner in (teacher, getattr(teacher, "parts", None)):
        names = getattr(owner, "__dataclass_fields__", None) or getattr(owner, "__dict__", {})
        found += [(owner, n, getattr(owner, n)) for n in names if isinstance(getattr(owner, n), torch.nn.Module)]
    return found


def load(name: str, variant: str, folder: Path, device: str) -> Any:
    """The teacher of one variant."""
    asked = variant.split("+")
    dtype = next((getattr(torch, a) for a in asked if a in ("bfloat16", "float16")), torch.float32)
    weights, options = json.loads((folder / "written.json").read_text())
    teacher = find("distill.teachers", name).Teacher.load(weights, device=device, dtype=dtype, **options)
    for owner, attribute, network in modules(teacher):
        if "channels_last" in asked:
            network.to(memory_format=torch.channels_last)
        if "compile" in asked:
            object.__setattr__(owner, attribute, torch.compile(network))
        if "slicing" in asked and hasattr(network, "enable_slicing"):
            network.enable_slicing()
    return teacher


def once(teacher: Any, batch: torch.Tensor, step: int) -> tuple[torch.Tensor, float]:
    """The maps of all images, and the seconds they took."""
    clock = time.perf_counter if batch.device.type == "cuda" else time.process_time
    begun, maps = clock(), []
    for start in range(0, len(batch), step):
        more = {"keys": [f"k{i}" for i in range(start, min(start + step, len(batch)))]} if teacher.card.seeded else {}
        maps.append(teacher.predict(batch[start : start + step], **more).to("cpu").values)
    return torch.cat(maps), clock() - begun


def run(name: str, variant: str, folder: Path, images: int, rounds: int, device: str) -> dict[str, float]:
    """One variant and the plain way in turns, measured here."""
    cuda = device.startswith("cuda")
    if not cuda:
        torch.set_num_threads(1)
    side = SIZES.get(name, OTHERS)[0 if cuda else 1]
    batch = torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    step = images if "batch" in variant else 1
    teacher = load(name, variant, folder, device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out, _ = once(teacher, batch, step)  # warm up, compile
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = torch.cuda.max_memory_allocated() if cuda else (peak - before) * 1024
    plain = load(name, "plain", folder, device)
    expected, _ = once(plain, batch, 1)
    times = [(once(teacher, batch, step)[1], once(plain, batch, 1)[1]) for _ in range(rounds)]
    best, base = (min(column) for column in zip(*times, strict=True))
    moved = float((out - expected).abs().mean() / expected.std())
    return {"rate": images / best, "ratio": base / best, "memory": memory, "moved": moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=TEACHERS, choices=TEACHERS)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, variant, folder = args.one
        print(json.dumps(run(name, variant, Path(folder), args.images, args.rounds, args.device)))
        return
    sizes = {name: SIZES.get(name, OTHERS)[0 if args.device.startswith("cuda") else 1] for name in args.only}
    threads = "" if args.device.startswith("cuda") else ", 1 thread, processor time"
    print(f"{args.device}{threads}, {args.images} images of sides {sizes}")
    print(f"{'teacher':18} {'variant':16} {'images/s':>9} {'x plain':>8} {'memory MB':>10} {'moved':>8}")
    for name in args.only:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "written.json").write_text(json.dumps(write(name, folder)))
            for variant in args.variants:
                command = [sys.executable, __file__, "--one", name, variant, str(folder)]
                command += ["--images", str(args.images), "--rounds", str(args.rounds), "--device", args.device]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{name:18} {variant:16} failed: {done.stderr.strip().splitlines()[-1][:90]}", flush=True)
                    continue
                told = json.loads(done.stdout.splitlines()[-1])
                numbers = f"{told['rate']:9.3f} {told['ratio']:8.2f} {told['memory'] / 1e6:10.0f} {told['moved']:8.1e}"
                print(f"{name:18} {variant:16} {numbers}", flush=True)


if __name__ == "__main__":
    main()
