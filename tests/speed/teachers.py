"""Images per second and peak memory of every teacher, against plain official use: one image at a time, float32.

    python tests/speed/teachers.py [--only depth_anything_v2 marigold] [--images 4] [--rounds 3] [--device cuda]

Each variant runs in a separate process, so that its memory can be measured, and alternates there with plain use, so
that other load slows both. On a CPU one thread is used and processor time is counted. Networks have random weights:
Depth Anything V2 and 3 in the size of a ViT-S, the others small ones of the same shape (no claim about their published
sizes). Images are label crops that need no resizing. Prints images/s, their ratio to plain use, peak memory beyond that
after loading, and the mean change of the maps (in deviations of the plain map).
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

# Input sides: the authors' on an accelerator, about half of it on a CPU.
SIZES = {"depth_anything_v2": (518, 252), "depth_anything_3": (504, 252), "midas": (384, 192), "checkpoint": (448, 224)}
OTHERS = (512, 128)
VARIANTS = ["plain", "batch", "bfloat16", "float16", "channels_last", "compile", "batch+bfloat16", "batch+slicing"]
DIFFUSION = ["marigold", "genpercept", "fiffdepth"]
TEACHERS = ["depth_anything_v2", "depth_anything_3", "midas", *DIFFUSION, "checkpoint"]


def write(name: str, folder: Path) -> tuple[str, dict[str, object]]:
    """Write a random checkpoint, of ViT-S size where the network is a ViT; returns its path and load options."""
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
    """(owner, attribute, network) of every network in a teacher."""
    networks = []
    for owner in (teacher, getattr(teacher, "parts", None)):
        names = getattr(owner, "__dataclass_fields__", None) or getattr(owner, "__dict__", {})
        networks += [(owner, n, getattr(owner, n)) for n in names if isinstance(getattr(owner, n), torch.nn.Module)]
    return networks


def load(name: str, variant: str, folder: Path, device: str) -> Any:
    """The teacher of one variant."""
    features = variant.split("+")
    dtype = next((getattr(torch, a) for a in features if a in ("bfloat16", "float16")), torch.float32)
    weights, options = json.loads((folder / "written.json").read_text())
    teacher = find("distill.teachers", name).Teacher.load(weights, device=device, dtype=dtype, **options)
    for owner, attribute, network in modules(teacher):
        if "channels_last" in features:
            network.to(memory_format=torch.channels_last)
        if "compile" in features:
            object.__setattr__(owner, attribute, torch.compile(network))
        if "slicing" in features and hasattr(network, "enable_slicing"):
            network.enable_slicing()
    return teacher


def once(teacher: Any, batch: torch.Tensor, step: int) -> tuple[torch.Tensor, float]:
    """The maps of all images, and the seconds they took."""
    clock = time.perf_counter if batch.device.type == "cuda" else time.process_time
    begun, maps = clock(), []
    for start in range(0, len(batch), step):
        keys = {"keys": [f"k{i}" for i in range(start, min(start + step, len(batch)))]} if teacher.card.seeded else {}
        maps.append(teacher.predict(batch[start : start + step], **keys).to("cpu").values)
    return torch.cat(maps), clock() - begun


def run(name: str, variant: str, folder: Path, images: int, rounds: int, device: str) -> dict[str, float]:
    """Measures one variant and plain use, alternately, in this process."""
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
    change = float((out - expected).abs().mean() / expected.std())
    return {"rate": images / best, "ratio": base / best, "memory": memory, "moved": change}


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
                row = json.loads(done.stdout.splitlines()[-1])
                numbers = f"{row['rate']:9.3f} {row['ratio']:8.2f} {row['memory'] / 1e6:10.0f} {row['moved']:8.1e}"
                print(f"{name:18} {variant:16} {numbers}", flush=True)


if __name__ == "__main__":
    main()
