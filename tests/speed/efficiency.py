"""Parameters, FLOPs, latency and peak memory of every encoder with every decoder, the paper's numbers beside ours.

    python -m tests.speed.efficiency --out efficiency.html            # counts only: nothing is computed, a minute
    python -m tests.speed.efficiency --measure 1000 --out efficiency.html

Parameters and FLOPs (torch's counter, 2 x multiply-add) are counted on the meta device, the decoder on a frozen
encoder's four maps. --measure N also times whole students of at most N GFLOPs (encoder and decoder, one image) and
takes the peak memory of a process of its own; the rest of those cells stays empty. What is measured goes to a file
beside the page, a line each, and is not measured again: such a run may be stopped and called again.

AnyDepth's published FLOPs count a transposed convolution at every output element, 4 to 16 times too much, so that its
DPT column is not a true cost; its parameters of whole models leave SDT's detail enhancer out.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distill.plugins import find
from students import Student
from students.encoder import Encoder

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
# AnyDepth's README (ViT-L decoder GFLOPs; decoder parameters in millions), see the module on the DPT column.
PAPER_FLOPS = {
    ("dinov3_vitl16", "sdt"): (234.17, 936.70, 3746.79),
    ("dinov3_vitl16", "dpt 512"): (444.14, 1776.56, 7106.22),
}
PAPER_PARAMS = {
    ("dinov3_vits16", "sdt"): 5.51,
    ("dinov3_vitb16", "sdt"): 9.45,
    ("dinov3_vitl16", "sdt"): 13.38,
    ("dinov3_vits16", "dpt 512"): 50.83,
    ("dinov3_vitb16", "dpt 512"): 76.05,
    ("dinov3_vitl16", "dpt 512"): 99.58,
}
PAPER_LATENCY = {  # decoder alone? the README does not say; milliseconds on an H100
    ("dinov3_vitl16", "sdt"): (6.10, 23.17, 93.09),
    ("dinov3_vitl16", "dpt 512"): (6.66, 24.65, 99.79),
}
SLOW = 5.0  # seconds: a pass that takes longer is not repeated


def decoder_of(name: str, encoder: Encoder) -> Any:
    plugin, options = DECODERS[name]
    more = {"patch_size": encoder.patch_size} if plugin == "dav2" else {}
    return find("students.decoders", plugin).Decoder([encoder.channels] * 4, **options, **more)


@cache
def encoder_counts(name: str) -> tuple[Encoder, float, tuple[float, ...]]:
    """The encoder on the meta device, its parameters in millions, its GFLOPs at SIZES."""
    with torch.device("meta"):
        encoder = Encoder(name).eval()
    found = []
    for size in SIZES:
        side = -(-size // encoder.patch_size) * encoder.patch_size
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encoder.features(torch.empty(1, 3, side, side, device="meta"))
        found.append(counter.get_total_flops() / 1e9)
    return encoder, sum(p.numel() for p in encoder.parameters()) / 1e6, tuple(found)


def decoder_counts(name: str, encoder: Encoder) -> tuple[float, list[float]]:
    """Parameters in millions and GFLOPs at SIZES."""
    with torch.device("meta"):
        decoder = decoder_of(name, encoder).eval()
    found = []
    for size in SIZES:
        grid = -(-size // encoder.patch_size)
        maps: list[tuple[Tensor, Tensor]] = [
            (
                torch.empty(1, encoder.channels, grid, grid, device="meta"),
                torch.empty(1, encoder.channels, device="meta"),
            )
            for _ in range(4)
        ]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            decoder(maps)
        found.append(counter.get_total_flops() / 1e9)
    return sum(p.numel() for p in decoder.parameters()) / 1e6, found


def one(encoder: str, decoder: str, size: int, repeats: int) -> dict[str, float]:
    """Seconds of one image through a whole student, and MiB above what was there before its first image.

    The best of `repeats` after a first pass; a first pass that takes longer than SLOW stands alone.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    part = Encoder(encoder)
    student = Student(part, decoder_of(decoder, part)).eval().to(device)
    images = torch.rand(1, 3, size, size, device=device)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            student(images).sum().item()
            seconds.append(time.perf_counter() - start)
            if seconds[0] > SLOW:
                break
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "seconds": min(seconds[1:] or seconds),
        "mib": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak,
    }


def measured(encoder: str, decoder: str, size: int, args: argparse.Namespace) -> dict[str, float]:
    """One cell: from the file of what was measured before, else from a process of its own, and into that file."""
    known = args.out.with_suffix(".jsonl")
    key = f"{encoder}, {decoder}, {size}"
    for line in known.read_text().splitlines() if known.is_file() else []:
        row: dict[str, Any] = json.loads(line)
        if row["student"] == key:
            return row
    command = [sys.executable, "-m", "tests.speed.efficiency", "--one", encoder, decoder, str(size)]
    done = subprocess.run([*command, "--repeats", str(args.repeats)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{key}: could not be measured: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    row = {"student": key} | json.loads(done.stdout)
    with known.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def rows(args: argparse.Namespace) -> list[list[str]]:
    table = []
    for encoder in args.encoders:
        part, own_params, own_flops = encoder_counts(encoder)
        for decoder in DECODERS:
            params, flops = decoder_counts(decoder, part)
            paper = PAPER_PARAMS.get((encoder, decoder))
            row = [encoder, decoder, f"{own_params:.1f}", f"{params:.2f}" + (f" ({paper})" if paper else "")]
            published = PAPER_FLOPS.get((encoder, decoder), (None,) * 3)
            for found, said in zip(flops, published, strict=True):
                row.append(f"{found:.1f}" + (f" ({said})" if said else ""))
            row += [f"{found:.0f}" for found in own_flops]
            for i, size in enumerate(SIZES):
                cheap = flops[i] + own_flops[i] <= args.measure
                cost = measured(encoder, decoder, size, args) if cheap else None
                row.append(f"{cost['seconds'] * 1e3:.0f} ms, {cost['mib']:.0f} MiB" if cost else "")
            row.append(" / ".join(f"{ms}" for ms in PAPER_LATENCY.get((encoder, decoder), ())))
            table.append(row)
            print("  ".join(row), flush=True)
    return table


def page(head: list[str], table: list[list[str]], device: str) -> str:
    """One offline file; the table scrolls sideways on a phone."""
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table)
    style = (
        "body{font:15px/1.5 system-ui;margin:2rem auto;max-width:1240px;padding:0 1rem}.wide{overflow-x:auto}"
        "table{border-collapse:collapse;white-space:nowrap;font-size:13px}"
        "td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #8884}"
        "td:first-child,td:nth-child(2),th:first-child,th:nth-child(2){text-align:left}"
        "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}}"
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>What a student costs</title><style>{style}</style><h1>What a student costs</h1>"
        "<p>Millions of parameters and GFLOPs of the decoder alone and of the encoder; then one image through the "
        f"whole student on {escape(device)}. AnyDepth's published numbers stand in brackets: its DPT FLOPs count "
        "transposed convolutions 4 to 16 times, its SDT parameters leave the detail enhancer out.</p>"
        f"<div class=wide><table><tr>{''.join(f'<th>{escape(h)}</th>' for h in head)}</tr>{cells}</table></div>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("efficiency.html"), help=".html or .md")
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS))
    parser.add_argument("--measure", type=float, default=0.0, metavar="GFLOPS", help="time students up to this cost")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("ENCODER", "DECODER", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], args.one[1], int(args.one[2]), args.repeats)))
        return
    head = ["encoder", "decoder", "encoder M", "decoder M"]
    head += [f"decoder GFLOPs {size}" for size in SIZES] + [f"encoder GFLOPs {size}" for size in SIZES]
    head += [f"measured {size}" for size in SIZES] + ["published ms, H100"]
    table = rows(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    if args.out.suffix == ".md":
        lines = [
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *("| " + " | ".join(r) + " |" for r in table),
        ]
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        args.out.write_text(page(head, table, device), encoding="utf-8")


if __name__ == "__main__":
    main()
