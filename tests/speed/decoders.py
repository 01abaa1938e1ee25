"""Costs and scores of decoders, at equal training.

    python -m tests.speed.decoders cost --size 512 --out runs/decoders
    python -m tests.speed.decoders train --out runs/decoders [--encoder-weights dinov2_vits14.pth] [--pairs INDEX.tsv
        --train-names recipes/pocket/train_pairs.txt --test-names recipes/pocket/heldout_pairs.txt]
    python -m tests.speed.decoders table --out runs/decoders --figure runs/decoders/decoders.png

`cost`: parameters, FLOPs (torch's counter), latency and peak memory of every decoder alone, on random features of a
ViT-S/16 (--channels 1024: ViT-L). `train`: every decoder on the same frozen encoder, images, order, windows, loss,
optimizer and number of steps, for several seeds; scored on scenes and pairs not seen in training. There is one result
file per decoder and seed, so that it can be stopped and run again, and several may run at once on different seeds.
Without --encoder-weights the encoder is the pocket's. `table`: both together, and every decoder against `sdt`.

Features are computed once. A step sees two random windows of 8 x 8 tokens (of 12 x 12) of images of 168 pixels: SDT's
256 channels take two seconds for that on one core, and the whole comparison should fit into an hour. --dev scores on
every sixth training image, which is then left out of training: for choosing a design without using the test images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distill.core.folders import pocket
from distill.core.plugins import find
from distill.eval.verdict import interval
from distill.students import checkpoint
from distill.students.encoder import Encoder
from tests.speed import decoder_ideas, memory
from tests.speed.equal_training import fit, gather, held_out, judge

CANDIDATES: dict[str, tuple[str | type[nn.Module], dict[str, Any]]] = {
    "sdt": ("sdt", {}),
    "sdt 128": ("sdt", {"fusion_channels": 128}),
    "sdt 64": ("sdt", {"fusion_channels": 64}),
    "sdt_fast": ("sdt_fast", {}),
    "sdt_fast, no detail": ("sdt_fast", {"detail": False}),
    "sdt_fast, wide": ("sdt_fast", {"widths": [256, 128, 64, 32]}),
    "tried: linear fusion": (decoder_ideas.Linear, {}),
    "tried: refined": (decoder_ideas.Refined, {}),
    "tried: bilinear": (decoder_ideas.Bilinear, {}),
    "tried: convex": (decoder_ideas.Convex, {}),
    "tried: shuffle": (decoder_ideas.Shuffle, {}),
    "dpt 512": ("dpt", {}),
    "dpt 256": ("dpt", {"channels": 256, "post_process_channels": [256, 512, 1024, 1024], "norm": "none"}),
    "dpt 128": ("dpt", {"channels": 128, "post_process_channels": [96, 192, 384, 768], "norm": "none"}),
    "dpt 64": ("dpt", {"channels": 64, "post_process_channels": [48, 96, 192, 384], "norm": "none"}),
}


def make(name: str, channels: int) -> nn.Module:
    plugin, options = CANDIDATES[name]
    factory = find("distill.students.decoders", plugin).Decoder if isinstance(plugin, str) else plugin
    decoder: nn.Module = factory([channels] * 4, **options)
    return decoder


def features(batch: int, channels: int, rows: int, columns: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(batch, channels, rows, columns, device=device), torch.randn(batch, channels, device=device))
        for _ in range(4)
    ]


def flops(decoder: nn.Module, channels: int, rows: int, columns: int) -> float:
    """GFLOPs for one image, counted on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder.to("meta").eval()(features(1, channels, rows, columns, "meta"))
    return counter.get_total_flops() / 1e9


# --- what it costs ----------------------------------------------------------------------------------------------------


def cost_of(name: str, size: int, channels: int, repeats: int) -> dict[str, float]:
    """Parameters, FLOPs, seconds and peak MiB above the memory in use before the forward pass."""
    grid = size // 16
    row = {"params": sum(p.numel() for p in make(name, channels).parameters()) / 1e6}
    row["gflops"] = flops(make(name, channels), channels, grid, grid)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder, inputs = make(name, channels).eval().to(device), features(1, channels, grid, grid, device)
    before, seconds = memory.used(), []
    memory.forget_peak()
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            decoder(inputs)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    row["seconds"] = min(seconds[1:])
    row["peak_mib"] = memory.peak() - before
    return row


def cost(args: argparse.Namespace) -> None:
    """Measure each decoder in a separate process, so that memory left by one does not affect the next."""
    path = args.out / f"cost_{args.size}_{args.channels}.json"
    rows = json.loads(path.read_text()) if path.is_file() else {}
    for name in args.decoders:
        command = [sys.executable, "-m", "tests.speed.decoders", "one", "--decoders", name]
        command += ["--size", str(args.size), "--channels", str(args.channels), "--repeats", str(args.repeats)]
        rows[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{name:22}" + "".join(f" {key} {value:10.2f}" for key, value in rows[name].items()), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: rows[name] for name in CANDIDATES if name in rows}, indent=1))


# --- what it gives ----------------------------------------------------------------------------------------------------


def kept(args: argparse.Namespace, name: str, seed: int | str) -> str:
    """The name of a result file."""
    plain = name.replace(", ", "_").replace(": ", "_").replace(" ", "_") if name != "*" else name
    return f"{plain}__{'dev_' if args.dev else ''}{args.steps}x{args.batch_size}__{seed}.json"


def runs(args: argparse.Namespace) -> Iterator[tuple[str, int, Path]]:
    for seed in args.seeds:
        for name in args.decoders:
            yield name, seed, args.out / kept(args, name, seed)


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    if args.encoder_weights:
        encoder = Encoder("dinov2_vits14", weights=args.encoder_weights, frozen=True).eval()
    else:
        encoder = checkpoint.load(pocket()).encoder.eval()
    learn = gather(args, encoder, True)
    learn, test = held_out(learn) if args.dev else (learn, gather(args, encoder, False))
    args.until = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    for name, seed, path in runs(args):
        if path.is_file():
            continue
        torch.manual_seed(seed)
        decoder = make(name, encoder.channels)
        row: dict[str, Any] = {"decoder": name, "seed": seed, "steps": args.steps, "batch_size": args.batch_size}
        losses = fit(decoder, learn, args, seed, path.with_suffix(".pt"))
        if len(losses) < args.steps:
            print(f"the time is up, at step {len(losses)} of {name}; call again to go on")
            return
        row["loss"] = statistics.mean(losses[-args.steps // 5 :])
        row |= judge(decoder, test)
        path.write_text(json.dumps(row))
        print(" ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


# --- the table --------------------------------------------------------------------------------------------------------

SCORES = {
    "scenes_abs_rel": "scenes AbsRel",
    "scenes_delta1": "scenes delta1",
    "boundary_f1": "scenes boundary F1",
    "real_abs_rel": "pairs AbsRel",
    "real_delta1": "pairs delta1",
}


Found = dict[str, dict[int, dict[str, Any]]]  # by decoder and seed


def table(args: argparse.Namespace) -> None:
    """Print mean +- standard deviation over seeds, and the results of `cost`, as Markdown."""
    results: Found = {}
    for path in sorted(args.out.glob(kept(args, "*", "*"))):
        row = json.loads(path.read_text())
        results.setdefault(row["decoder"], {})[row["seed"]] = row
    costs = json.loads((args.out / f"cost_{args.size}_{args.channels}.json").read_text())
    head = ["decoder", "params M", f"GFLOPs {args.size}", "CPU s", "peak MiB", "seeds", *SCORES.values()]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    if missing := results.keys() - costs.keys():
        raise SystemExit(f"{', '.join(missing)}: no cost yet; `cost --decoders` them into the same folder")
    for name, c in costs.items():
        rows = list(results.get(name, {}).values())
        cells = [name, f"{c['params']:.2f}", f"{c['gflops']:.1f}", f"{c['seconds']:.2f}", f"{c['peak_mib']:.0f}"]
        cells.append(str(len(rows)))
        for key in SCORES:
            values = [row[key] for row in rows if key in row]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "-")
        print("| " + " | ".join(cells) + " |")
    against(results, "sdt")
    if args.figure:
        draw(args, results, costs)


def against(found: Found, reference: str) -> None:
    """Relative differences to one decoder within each seed: mean and half width of its 90 % t interval."""
    print(f"\nAgainst {reference}, seed by seed (a seed's data and order are the same for all):\n")
    print("| decoder | seeds | " + " | ".join(SCORES.values()) + " |\n|" + "---|" * (len(SCORES) + 2))
    for name, rows in ((name, found[name]) for name in CANDIDATES if name in found):
        seeds = sorted(rows.keys() & found.get(reference, {}).keys())
        if name == reference or not seeds:
            continue
        cells = []
        for key in SCORES:
            both: list[tuple[Any, Any]] = [(found[reference][seed].get(key), rows[seed].get(key)) for seed in seeds]
            if any(not base or value is None for base, value in both):
                cells.append("-")
                continue
            mean, half = interval([value / base - 1 for base, value in both])
            word = "within noise" if abs(mean) <= half else "better" if (mean < 0) == ("rel" in key) else "worse"
            cells.append(f"{100 * mean:+.1f} % ± {100 * half:.1f} %, {word}")
        print("| " + " | ".join([name, str(len(seeds)), *cells]) + " |")


FAMILIES = {  # name: (colour, label of each decoder's dot)
    "sdt_fast": ("#c0392b", {"sdt_fast, no detail": "no detail", "sdt_fast": "", "sdt_fast, wide": "wide"}),
    "sdt": ("#2c3e50", {"sdt 64": "64", "sdt 128": "128", "sdt": "256"}),
    "dpt": ("#7f8c8d", {"dpt 64": "64", "dpt 128": "128", "dpt 256": "256", "dpt 512": "512"}),
}


def draw(args: argparse.Namespace, found: Found, costs: dict[str, dict[str, float]]) -> None:
    """Score against decoder FLOPs: a line for each family of decoders, bars of one standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [key for key in SCORES if not key.endswith("delta1")]
    shown = [key for key in shown if any(key in row for rows in found.values() for row in rows.values())]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.8 * len(shown), 4.0), squeeze=False)
    for axis, key in zip(axes[0], shown, strict=True):
        for family, (colour, labels) in FAMILIES.items():
            names = [name for name in labels if name in found]
            values = [[row[key] for row in found[name].values()] for name in names]
            means = [statistics.mean(scores) for scores in values]
            bars = [statistics.stdev(scores) if len(scores) > 1 else 0.0 for scores in values]
            flops = [costs[name]["gflops"] for name in names]
            axis.errorbar(flops, means, bars, fmt="o-", color=colour, capsize=3, alpha=0.85, label=family)
            for name, x, y in zip(names, flops, means, strict=True):
                place = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 8, "color": colour}
                axis.annotate(labels[name], (x, y), **place)
        axis.set_xscale("log")
        axis.margins(x=0.12)
        axis.set_xlabel(f"decoder GFLOPs at {args.size} x {args.size}, log")
        axis.set_title(f"{SCORES[key]} ({'higher' if key == 'boundary_f1' else 'lower'} is better)", fontsize=10)
        axis.grid(alpha=0.25)
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{args.steps} steps of {args.batch_size} windows, frozen encoder; bars: one deviation over seeds")
    figure.tight_layout()
    figure.savefig(args.figure, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "one", "train", "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/decoders"))
    parser.add_argument("--decoders", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--size", type=int, default=512, help="pixels, for the costs")
    parser.add_argument("--channels", type=int, default=384, help="of the encoder, for the costs: 384, 768, 1024")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--test-scenes", type=int, default=24)
    parser.add_argument("--encoder-weights", type=Path, help="DINOv2 ViT-S/14; the pocket's encoder without it")
    parser.add_argument(
        "--pairs", type=Path, help="real photographs with depth: a table as distill.data.pairs reads it"
    )
    parser.add_argument("--train-names", type=Path)
    parser.add_argument("--test-names", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="stop after this long, to be called again; 0: no end"
    )
    parser.add_argument("--dev", action="store_true", help="score on training images, left out of training")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if args.what == "one":
        print(json.dumps(cost_of(args.decoders[0], args.size, args.channels, args.repeats)))
        return
    {"cost": cost, "train": train, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
