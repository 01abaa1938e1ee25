"""What a decoder costs and what it gives, at equal training.

    python -m tests.speed.decoders cost --size 512 --out runs/decoders
    python -m tests.speed.decoders train --out runs/decoders [--encoder-weights dinov2_vits14.pth] [--pairs INDEX.tsv
        --train-names recipes/pocket/train_pairs.txt --test-names recipes/pocket/heldout_pairs.txt]
    python -m tests.speed.decoders table --out runs/decoders --figure runs/decoders/decoders.png

`cost`: parameters, FLOPs (torch's counter), latency and peak memory of every decoder alone, on random features of a
ViT-S/16 (--channels 1024: ViT-L). `train`: every decoder on the same frozen encoder, images, order, windows, loss,
optimizer and number of steps, for several seeds; scored on scenes and pairs that training never saw. One result file
per decoder and seed, so that it can be stopped and called again. Without --encoder-weights the encoder is the pocket's.

Features are computed once. A step sees four random windows of 6 x 6 tokens (of 12 x 12): the SDT of 256 channels takes
over two seconds for it on one core, and the whole comparison is to fit into a coffee break.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distill import checkpoint, scenes
from distill.align import apply_affine, fit_affine
from distill.depth import DepthMap, Kind
from distill.labels import Labels
from distill.objective import Objective, Weights
from distill.pairs import Pair, read_pairs
from distill.plugins import find
from eval.boundary import boundary_f1
from eval.metrics import all_metrics
from students.encoder import Encoder
from teachers.checkpoint import pocket

CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "sdt": ("sdt", {}),
    "sdt 128": ("sdt", {"fusion_channels": 128}),
    "sdt 64": ("sdt", {"fusion_channels": 64}),
    "sdt_fast": ("sdt_fast", {}),
    "sdt_fast, no detail": ("sdt_fast", {"detail": False}),
    "sdt_fast, wide": ("sdt_fast", {"widths": [256, 128, 64, 32]}),
    "dpt 512": ("dpt", {}),
    "dpt 256": ("dpt", {"channels": 256, "post_process_channels": [256, 512, 1024, 1024], "norm": "none"}),
    "dpt 128": ("dpt", {"channels": 128, "post_process_channels": [96, 192, 384, 768], "norm": "none"}),
    "dpt 64": ("dpt", {"channels": 64, "post_process_channels": [48, 96, 192, 384], "norm": "none"}),
}
SIDE, GRID, PATCH, WINDOW = 168, 12, 14, 6
FAR = 80.0  # metres: the sky of a scene


def make(name: str, channels: int) -> nn.Module:
    plugin, options = CANDIDATES[name]
    decoder: nn.Module = find("students.decoders", plugin).Decoder([channels] * 4, **options)
    return decoder


def features(batch: int, channels: int, rows: int, columns: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(batch, channels, rows, columns, device=device), torch.randn(batch, channels, device=device))
        for _ in range(4)
    ]


def flops(decoder: nn.Module, channels: int, rows: int, columns: int) -> float:
    """GFLOPs of one image, on the meta device: nothing is computed."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder.to("meta").eval()(features(1, channels, rows, columns, "meta"))
    return counter.get_total_flops() / 1e9


# --- what it costs ----------------------------------------------------------------------------------------------------


def cost_of(name: str, size: int, channels: int, repeats: int) -> dict[str, float]:
    """Parameters, FLOPs, seconds and peak MiB above what was there before the forward pass."""
    grid = size // 16
    row = {"params": sum(p.numel() for p in make(name, channels).parameters()) / 1e6}
    row["gflops"] = flops(make(name, channels), channels, grid, grid)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder, given = make(name, channels).eval().to(device), features(1, channels, grid, grid, device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            decoder(given)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    row["seconds"] = min(seconds[1:])
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    if device == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def cost(args: argparse.Namespace) -> None:
    """Each decoder in a process of its own: the peak of a process never falls."""
    rows = {}
    for name in args.decoders:
        command = [sys.executable, "-m", "tests.speed.decoders", "one", "--decoders", name]
        command += ["--size", str(args.size), "--channels", str(args.channels), "--repeats", str(args.repeats)]
        rows[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{name:22}" + "".join(f" {key} {value:10.2f}" for key, value in rows[name].items()), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"cost_{args.size}_{args.channels}.json").write_text(json.dumps(rows, indent=1))


# --- what it gives ----------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """patches (4,N,C,GRID,GRID), cls (4,N,C), disparity and valid (N,SIDE,SIDE); real: which are photographs."""

    patches: Tensor
    cls: Tensor
    disparity: Tensor
    valid: Tensor
    real: Tensor

    def window(self, rows: Tensor, corners: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Labels]:
        cut, maps, masks = [], [], []
        for n, (top, left) in zip(rows.tolist(), corners.tolist(), strict=True):
            cut.append(self.patches[:, n, :, top : top + WINDOW, left : left + WINDOW].float())
            place = (
                slice(top * PATCH, (top + WINDOW) * PATCH),
                slice(left * PATCH, (left + WINDOW) * PATCH),
            )
            maps.append(self.disparity[n][place])
            masks.append(self.valid[n][place])
        stacked = torch.stack(cut, 1)
        shared = DepthMap(torch.stack(maps), torch.stack(masks), Kind.AFFINE_DISPARITY)
        return [(stacked[i], self.cls[i, rows].float()) for i in range(4)], Labels(shared, None, torch.zeros(0, 0, 4))


def square(pair: Pair) -> tuple[Tensor, Tensor, Tensor] | None:
    """The middle square of a pair at SIDE pixels: image, disparity, valid; None for a truth of unknown shift."""
    truth = pair.truth()
    if truth.kind.unknown == "affine":
        return None
    depth = truth.convert(Kind(f"{truth.kind.unknown}_depth"))
    image = pair.rgb().float() / 255
    side = min(image.shape[-2:])
    top, left = (image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2
    place = (slice(top, top + side), slice(left, left + side))
    image = F.interpolate(image[:, *place][None], (SIDE, SIDE), mode="bilinear", antialias=True)[0]
    both = torch.stack([depth.values[0][place], depth.valid[0][place].float()])[None]
    values, valid = F.interpolate(both, (SIDE, SIDE), mode="nearest-exact")[0]
    keep = (valid > 0.5) & (values > 0)
    return image, torch.where(keep, 1 / values.clamp(min=1e-6), 0.0), keep


def scene(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    view = scenes.render(seed, size=(SIDE, SIDE))
    return view.image, torch.where(view.valid, 1 / view.depth.clamp(min=1e-6), 0.0), torch.ones_like(view.valid)


def names(path: Path | None) -> list[str] | None:
    return path.read_text().split() if path else None


def gather(args: argparse.Namespace, encoder: Encoder, train: bool) -> Data:
    """Images and their features; the training images also mirrored."""
    path = args.out / f"features_{'train' if train else 'test'}.pt"
    if path.is_file():
        return Data(**torch.load(path, weights_only=True))
    seeds = scenes.TRAIN_SEEDS[: args.scenes] if train else scenes.BENCHMARK_SEEDS[: args.test_scenes]
    found = [scene(seed) for seed in seeds]
    real = [False] * len(found)
    if args.pairs:
        chosen = read_pairs(args.pairs, names=names(args.train_names if train else args.test_names))
        found += [item for item in map(square, chosen) if item is not None]
        real += [True] * (len(found) - len(real))
    images, disparity, valid = (torch.stack(column) for column in zip(*found, strict=True))
    if train:
        images, disparity, valid = (torch.cat([x, x.flip(-1)]) for x in (images, disparity, valid))
        real += real
    patches, cls = [], []
    with torch.no_grad():
        for chunk in images.split(8):
            read = encoder(chunk)
            patches.append(torch.stack([pair[0] for pair in read]).half())
            cls.append(torch.stack([pair[1] for pair in read]).half())
    data = Data(torch.cat(patches, 1), torch.cat(cls, 1), disparity, valid, torch.tensor(real))
    torch.save(vars(data), path)
    print(f"{'train' if train else 'test'}: {len(images)} images, {sum(real)} of them photographs", flush=True)
    return data


def schedule(step: int, steps: int) -> float:
    """AnyDepth's: linear warm-up, then polynomial decay of power 0.9."""
    warm = max(steps // 10, 1)
    return (step + 1) / warm if step < warm else (1 - (step - warm) / (steps - warm)) ** 0.9


def fit(decoder: nn.Module, data: Data, args: argparse.Namespace, seed: int, half: Path) -> list[float]:
    """Train; the losses. Every decoder of a seed sees the same windows in the same order.

    Where the time is up before the last step, what is there goes to the file `half`, and the next call goes on.
    """
    draw = torch.Generator().manual_seed(1000 + seed)
    objective = Objective(weights=Weights(local_global=0.0, feature=0.0, anchor=0.05))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=args.lr, weight_decay=0.01)
    losses: list[float] = []
    if half.is_file():
        state = torch.load(half, weights_only=True)
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        draw.set_state(state["draw"])
        losses = state["losses"]
    decoder.train()
    for step in range(len(losses), args.steps):
        if time.monotonic() > args.until:
            state = {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            torch.save(state | {"draw": draw.get_state()}, half)
            return losses
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps)
        rows = torch.randint(len(data.disparity), (args.batch_size,), generator=draw)
        corners = torch.randint(GRID - WINDOW + 1, (args.batch_size, 2), generator=draw)
        given, labels = data.window(rows, corners)
        pred = predict(decoder, given, WINDOW * PATCH)
        loss = objective(pred, labels)[0].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    half.unlink(missing_ok=True)
    return losses


def predict(decoder: nn.Module, given: list[tuple[Tensor, Tensor]], side: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        raw = decoder(given)
    return F.interpolate(raw.float(), (side, side), mode="bilinear", align_corners=False)[:, 0]


def judge(decoder: nn.Module, data: Data) -> dict[str, float]:
    """AbsRel and delta1 on scenes and pairs, boundary F1 on scenes (dense truth), after a fit in disparity."""
    decoder.eval()
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        for n in range(len(data.disparity)):
            given = [(data.patches[i, n : n + 1].float(), data.cls[i, n : n + 1].float()) for i in range(4)]
            pred, truth = predict(decoder, given, SIDE), data.disparity[n : n + 1]
            valid = data.valid[n : n + 1] & (truth > 1 / FAR)
            aligned = apply_affine(pred, *fit_affine(pred, truth, valid))
            depth = 1 / aligned.clamp(1 / FAR, 1e3)
            real = bool(data.real[n])
            lowest, highest = (1 / truth[valid].max()).item(), (1 / truth[valid].min()).item()
            metrics = all_metrics(depth.clamp(lowest, highest), 1 / truth.clamp(min=1 / FAR), valid)
            for key in ("abs_rel", "delta1"):
                found.setdefault(f"{'real' if real else 'scenes'}_{key}", []).append(metrics[key].item())
            if not real:
                found.setdefault("boundary_f1", []).append(boundary_f1(depth, 1 / truth.clamp(min=1 / FAR)).item())
    return {key: statistics.mean(values) for key, values in found.items()}


def runs(args: argparse.Namespace) -> Iterator[tuple[str, int, Path]]:
    for seed in args.seeds:
        for name in args.decoders:
            path = (
                args.out / f"{name.replace(', ', '_').replace(' ', '_')}__{args.steps}x{args.batch_size}__{seed}.json"
            )
            yield name, seed, path


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    if args.encoder_weights:
        encoder = Encoder("dinov2_vits14", weights=args.encoder_weights, frozen=True).eval()
    else:
        encoder = checkpoint.load(pocket()).encoder.eval()
    learn, test = gather(args, encoder, True), gather(args, encoder, False)
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


def table(args: argparse.Namespace) -> None:
    """Mean +- standard deviation over seeds, beside what was measured by `cost`; Markdown."""
    files = sorted(args.out.glob(f"*__{args.steps}x{args.batch_size}__*.json"))
    found: dict[str, list[dict[str, Any]]] = {}
    for path in files:
        row = json.loads(path.read_text())
        found.setdefault(row["decoder"], []).append(row)
    costs = json.loads((args.out / f"cost_{args.size}_{args.channels}.json").read_text())
    head = ["decoder", "params M", f"GFLOPs {args.size}", "CPU s", "peak MiB", "seeds", *SCORES.values()]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, c in costs.items():
        rows = found.get(name, [])
        cells = [name, f"{c['params']:.2f}", f"{c['gflops']:.1f}", f"{c['seconds']:.2f}", f"{c['peak_mib']:.0f}"]
        cells.append(str(len(rows)))
        for key in SCORES:
            values = [row[key] for row in rows if key in row]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}" if values else "-")
        print("| " + " | ".join(cells) + " |")
    if args.figure:
        draw(args, found, costs)


def draw(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]], costs: dict[str, dict[str, float]]) -> None:
    """Score against decoder FLOPs, one dot per decoder with a bar of one standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [key for key in SCORES if any(key in row for rows in found.values() for row in rows)]
    shown = [key for key in shown if not key.endswith("delta1")]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 3.8), squeeze=False)
    for axis, key in zip(axes[0], shown, strict=True):
        for name, rows in found.items():
            values = [row[key] for row in rows]
            bar = statistics.stdev(values) if len(values) > 1 else 0.0
            colour = "#c0392b" if name.startswith("sdt_fast") else "#2c3e50" if name.startswith("sdt") else "#7f8c8d"
            axis.errorbar(costs[name]["gflops"], statistics.mean(values), bar, fmt="o", color=colour, capsize=3)
            axis.annotate(name, (costs[name]["gflops"], statistics.mean(values)), (6, 4), textcoords="offset points")
        axis.set_xscale("log")
        axis.margins(x=0.25)
        axis.set_xlabel(f"decoder GFLOPs at {args.size} x {args.size}, log")
        axis.set_title(f"{SCORES[key]} ({'higher' if key == 'boundary_f1' else 'lower'} is better)", fontsize=10)
        axis.grid(alpha=0.25)
    figure.suptitle(f"{args.steps} steps of {args.batch_size} windows, frozen encoder; bars: one deviation over seeds")
    figure.tight_layout()
    figure.savefig(args.figure, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "one", "train", "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/decoders"))
    parser.add_argument("--decoders", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--size", type=int, default=512, help="pixels, for the costs")
    parser.add_argument("--channels", type=int, default=384, help="of the encoder, for the costs: 384, 768, 1024")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--test-scenes", type=int, default=24)
    parser.add_argument("--encoder-weights", type=Path, help="DINOv2 ViT-S/14; the pocket's encoder without it")
    parser.add_argument("--pairs", type=Path, help="real photographs with depth: a table as distill.pairs reads it")
    parser.add_argument("--train-names", type=Path)
    parser.add_argument("--test-names", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="stop after this long, to be called again; 0: no end"
    )
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if args.what == "one":
        print(json.dumps(cost_of(args.decoders[0], args.size, args.channels, args.repeats)))
        return
    {"cost": cost, "train": train, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
