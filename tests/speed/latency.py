"""Milliseconds of each decoder on one image's features, eager and compiled into a CUDA graph, relative to SDT.

    python -m tests.speed.latency --size 512 --encoder dinov3_vitl16      # on a card
    python -m tests.speed.latency --size 256 --encoder dinov3_vits16      # on a CPU: eager only

Features are random; the median of 30 runs after a warm-up, synchronised, one image.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from distill.core.plugins import find

DECODERS = ("sdt", "sdt_fast", "dpt", "dav2")
CHANNELS = {"dinov3_vits16": 384, "dinov3_vitb16": 768, "dinov3_vitl16": 1024}


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    for _ in range(5):
        run()
    times = []
    for _ in range(30):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--encoder", default="dinov3_vitl16", choices=CHANNELS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    channels, side = CHANNELS[args.encoder], args.size // 16
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", args.encoder, args.size)
    rows: dict[str, dict[str, float]] = {}
    for name in DECODERS:
        torch.manual_seed(0)
        decoder = find("distill.students.decoders", name).Decoder([channels] * 4).to(device).eval()
        features = [(torch.randn(1, channels, side, side, device=device), torch.randn(1, channels, device=device))] * 4
        row = rows[name] = {}
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            row["eager"] = milliseconds(lambda d=decoder, f=features: d(f), device)
            if device.type == "cuda":
                fast = torch.compile(decoder, mode="reduce-overhead", dynamic=False)
                row["compiled, CUDA graph"] = milliseconds(lambda d=fast, f=features: d(f), device)
    for mode in rows["sdt"]:
        print(
            mode
            + ": "
            + ", ".join(f"{n} {r[mode]:.3f} ms ({r[mode] / rows['sdt'][mode]:.2f} of SDT)" for n, r in rows.items())
        )


if __name__ == "__main__":
    main()
