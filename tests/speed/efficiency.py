"""Parameters, FLOPs, latency and peak memory of every encoder with every decoder, next to the paper's numbers.

    python -m tests.speed.efficiency --out efficiency.html            # counts only, a minute
    python -m tests.speed.efficiency --measure 4000 --out efficiency.html

Parameters and FLOPs (torch's counter, 2 x multiply-add) are counted on the meta device, the decoder on a frozen
encoder's four maps. --measure N also times one float32 image through encoders and decoders of at most N GFLOPs each,
and takes the peak memory of a pass, weights and the four maps included. A whole student's time is the sum of its two
parts, its peak the higher of them. Measurements are kept in a file beside the page, a line for each encoder and size,
and are not repeated, so that a run may be stopped and called again.

AnyDepth's published FLOPs count a transposed convolution at every output element, 4 to 16 times too much, so that its
DPT column is not a true cost; its SDT parameters exclude the detail enhancer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distill.core.plugins import find
from distill.students.encoder import Encoder
from tests.speed import memory

ENCODERS = (
    *("dinov3_vits16", "dinov3_vits16plus", "dinov3_vitb16", "dinov3_vitl16", "dinov3_vith16plus"),
    *("dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "vit_tiny_patch16_224"),
)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdt": ("sdt", {}),
    "sdt_fast": ("sdt_fast", {}),
    "dpt 512": ("dpt", {}),
    "dav2 256": ("dav2", {"channels": 256, "post_process_channels": [256, 512, 1024, 1024]}),
    "dav2 128": ("dav2", {"channels": 128, "post_process_channels": [96, 192, 384, 768]}),
    "dav2 64": ("dav2", {}),
}
SIZES = (256, 512, 1024)
# AnyDepth's README: decoder GFLOPs and milliseconds on an H100 at SIZES; decoder and whole parameters in millions.
PAPER_FLOPS = {
    ("dinov3_vitl16", "sdt"): (234.17, 936.70, 3746.79),
    ("dinov3_vitl16", "dpt 512"): (444.14, 1776.56, 7106.22),
}
PAPER_MS = {
    ("dinov3_vitl16", "sdt"): (6.10, 23.17, 93.09),
    ("dinov3_vitl16", "dpt 512"): (6.66, 24.65, 99.79),
}
PAPER_PARAMS = {
    ("dinov3_vits16", "sdt"): (5.51, 26.5),
    ("dinov3_vitb16", "sdt"): (9.45, 95.5),
    ("dinov3_vitl16", "sdt"): (13.38, 313.4),
    ("dinov3_vits16", "dpt 512"): (50.83, 71.8),
    ("dinov3_vitb16", "dpt 512"): (76.05, 162.1),
    ("dinov3_vitl16", "dpt 512"): (99.58, 399.6),
}
HEAD = (
    *("encoder", "decoder", "M encoder", "M decoder", "M whole", "GFLOPs encoder", "GFLOPs decoder"),
    *("ms encoder", "ms decoder", "ms whole", "peak MiB", "AnyDepth's ms"),
)
SLOW = 5.0  # seconds: a pass that takes longer is not repeated


# --- counted ----------------------------------------------------------------------------------------------------------


def decoder_of(name: str, encoder: Encoder) -> Any:
    plugin, options = DECODERS[name]
    patch_size = {"patch_size": encoder.patch_size} if plugin == "dav2" else {}
    return find("distill.students.decoders", plugin).Decoder([encoder.channels] * 4, **options, **patch_size)


def padded(size: int, encoder: Encoder) -> int:
    return -(-size // encoder.patch_size) * encoder.patch_size


@cache
def encoder_counts(name: str) -> tuple[Encoder, float, tuple[float, ...]]:
    """The encoder on the meta device, its parameters in millions, its GFLOPs at SIZES."""
    with torch.device("meta"):
        encoder = Encoder(name).eval()
    gflops = []
    for size in SIZES:
        side = padded(size, encoder)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encoder.features(torch.empty(1, 3, side, side, device="meta"))
        gflops.append(counter.get_total_flops() / 1e9)
    return encoder, sum(p.numel() for p in encoder.parameters()) / 1e6, tuple(gflops)


@cache
def decoder_counts(name: str, encoder: Encoder) -> tuple[float, tuple[float, ...]]:
    """Parameters in millions and GFLOPs at SIZES."""
    with torch.device("meta"):
        decoder = decoder_of(name, encoder).eval()
    gflops = []
    for size in SIZES:
        grid = padded(size, encoder) // encoder.patch_size
        maps: list[tuple[Tensor, Tensor]] = [
            (
                torch.empty(1, encoder.channels, grid, grid, device="meta"),
                torch.empty(1, encoder.channels, device="meta"),
            )
            for _ in range(4)
        ]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            decoder(maps)
        gflops.append(counter.get_total_flops() / 1e9)
    return sum(p.numel() for p in decoder.parameters()) / 1e6, tuple(gflops)


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"


# --- measured ---------------------------------------------------------------------------------------------------------


def clock(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Milliseconds of the best of `repeats` passes after a warm-up (only that one if it is slow), and peak MiB."""
    memory.forget_peak()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if seconds[0] > SLOW:
            break
    return 1e3 * min(seconds[1:] or seconds), memory.peak()


@torch.no_grad()
def measure(name: str, size: int, decoders: list[str], repeats: int) -> dict[str, Any]:
    """{"encoder": [ms, MiB], decoder: [ms, MiB] ...} of one image; MiB above the program's own."""
    on = "cuda" if torch.cuda.is_available() else "cpu"
    base = memory.used()
    encoder = Encoder(name).eval().to(on)
    side = padded(size, encoder)
    image = torch.rand(1, 3, side, side, device=on)
    ms, mib = clock(lambda: encoder.features(image), repeats)
    results: dict[str, Any] = {"encoder": [ms, mib - base]}
    maps = encoder.features(image)
    for decoder_name in decoders:
        decoder = decoder_of(decoder_name, encoder).eval().to(on)
        ms, mib = clock(partial(_decode, decoder, maps, side), repeats)
        results[decoder_name] = [ms, mib - base]
        del decoder
    return results


def _decode(decoder: Any, maps: Any, side: int) -> Tensor:
    return F.interpolate(decoder(maps), (side, side), mode="bilinear")


def measured(name: str, size: int, decoders: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Measurements from this machine's file; missing ones are measured in a separate process and appended to it."""
    results_file, identity = (
        args.out.with_suffix(".jsonl"),
        {"name": name, "size": size, "on": device(), "torch": torch.__version__},
    )
    results: dict[str, Any] = {}
    for line in results_file.read_text().splitlines() if results_file.is_file() else []:
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        results = (row["found"] if identity.items() <= row.items() else {}) | results
    missing = [decoder for decoder in decoders if decoder not in results]
    if not missing and "encoder" in results:
        return results
    command = [sys.executable, "-m", "tests.speed.efficiency", "--one", name, str(size), *missing]
    done = subprocess.run([*command, "--repeats", str(args.repeats)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed, for want of memory?"])[-1]
        raise SystemExit(f"{name} at {size}: could not be measured: {reason}")
    results = json.loads(done.stdout) | results
    with results_file.open("a") as file:
        file.write(json.dumps(identity | {"found": results}) + "\n")
    return results


# --- the tables -------------------------------------------------------------------------------------------------------


def table(at: int, args: argparse.Namespace) -> list[list[str]]:
    """The rows of one size."""
    rows = []
    for name in args.encoders:
        encoder, params, flops = encoder_counts(name)
        counts = {decoder: decoder_counts(decoder, encoder) for decoder in DECODERS}
        cheap = [decoder for decoder, (_, cost) in counts.items() if cost[at] <= args.measure]
        costs = measured(name, SIZES[at], cheap, args) if flops[at] <= args.measure else {}
        for decoder, (own, cost) in counts.items():
            paper = PAPER_PARAMS.get((name, decoder), (None, None))
            row = [name, decoder, f"{params:.1f}", _beside(own, 2, paper[0]), _beside(params + own, 1, paper[1])]
            row += [f"{flops[at]:.0f}", _beside(cost[at], 1, PAPER_FLOPS.get((name, decoder), (None,) * 3)[at])]
            if decoder in costs and decoder in cheap:
                (ms, mib), (own_ms, own_mib) = costs["encoder"], costs[decoder]
                row += [f"{ms:.0f}", f"{own_ms:.0f}", f"{ms + own_ms:.0f}", f"{max(mib, own_mib):.0f}"]
            else:
                row += [""] * 4
            row.append(f"{PAPER_MS.get((name, decoder), ('',) * 3)[at]}")
            rows.append(row)
        print(f"{SIZES[at]} {name}", "; ".join(f"{r[1]} {r[9]} ms" for r in rows[-len(DECODERS) :] if r[9]), flush=True)
    return rows


def _beside(ours: float, digits: int, theirs: float | None) -> str:
    return f"{ours:.{digits}f}" + (f" ({theirs})" if theirs is not None else "")


def page(tables: dict[int, list[list[str]]]) -> str:
    """One offline file; the tables scroll sideways on a phone."""
    style = (
        "body{font:15px/1.5 system-ui;margin:2rem auto;max-width:1400px;padding:0 1rem}.wide{overflow-x:auto}"
        "table{border-collapse:collapse;white-space:nowrap;font-size:13px}"
        "td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #8884}"
        "td:first-child,td:nth-child(2),th:first-child,th:nth-child(2){text-align:left}"
        ".first td{border-top:2px solid #888}"
        "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}}"
    )
    parts = []
    for size, rows in tables.items():
        body = "".join(
            f"<tr{' class=first' if row[1] == next(iter(DECODERS)) else ''}>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in row)
            + "</tr>"
            for row in rows
        )
        head = "".join(f"<th>{escape(h)}</th>" for h in HEAD)
        parts.append(f"<h2>{size} x {size}</h2><div class=wide><table><tr>{head}</tr>{body}</table></div>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>What a student costs</title><style>{style}</style><h1>What a student costs</h1>"
        f"<p>{escape(about())}</p>{''.join(parts)}\n"
    )


def about() -> str:
    return (
        "Millions of parameters; GFLOPs of one image; milliseconds of one float32 image and the highest memory of a "
        f"pass, weights included, on {device()}. AnyDepth's published numbers stand in brackets, its milliseconds are "
        "of an H100: its DPT FLOPs count transposed convolutions 4 to 16 times, its SDT parameters are those without "
        "the detail enhancer. On a Jetson Orin Nano it says 213 ms (DPT: 306) at 256 and 831 ms (DPT: 1108) at 512, of "
        "an encoder it does not name. Images are padded to the patch size: 256 is 259 pixels for a patch of 14."
    )


def markdown(tables: dict[int, list[list[str]]]) -> str:
    lines = [about()]
    for size, rows in tables.items():
        lines += ["", f"{size} x {size}", "", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("efficiency.html"), help=".html or .md")
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS))
    parser.add_argument("--measure", type=float, default=0.0, metavar="GFLOPS", help="time what costs at most this")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", nargs="+", metavar=("ENCODER", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, size, *decoders = args.one
        print(json.dumps(measure(name, int(size), decoders, args.repeats)))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tables = {size: table(at, args) for at, size in enumerate(SIZES)}
    text = (markdown if args.out.suffix == ".md" else page)(tables)
    args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
