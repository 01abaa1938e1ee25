"""Trains decoders alike on features computed once, and scores them; the training half of tests/speed/decoders.py.

Not a script. Every decoder of a seed sees the same windows of the same images in the same order, with the same loss,
optimizer and schedule.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.core.align import apply_affine, fit_affine
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Labels
from distill.data import scenes
from distill.data.pairs import Pair, read_pairs
from distill.eval.boundary import boundary_f1
from distill.eval.metrics import all_metrics
from distill.losses.objective import Objective
from distill.losses.settings import LossSettings
from distill.students.encoder import Encoder

SIDE, GRID, PATCH, WINDOW = 168, 12, 14, 8
FAR = 80.0  # metres: the sky of a scene


@dataclass
class Data:
    """patches (4,N,C,GRID,GRID), cls (4,N,C), disparity and valid (N,SIDE,SIDE), real (N,): whether a photograph."""

    patches: Tensor
    cls: Tensor
    disparity: Tensor
    valid: Tensor
    real: Tensor

    def rows(self, chosen: Tensor) -> Data:
        return Data(
            self.patches[:, chosen], self.cls[:, chosen], self.disparity[chosen], self.valid[chosen], self.real[chosen]
        )

    def window(self, rows: Tensor, corners: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Labels]:
        windows, maps, masks = [], [], []
        for n, (top, left) in zip(rows.tolist(), corners.tolist(), strict=True):
            windows.append(self.patches[:, n, :, top : top + WINDOW, left : left + WINDOW].float())
            place = (
                slice(top * PATCH, (top + WINDOW) * PATCH),
                slice(left * PATCH, (left + WINDOW) * PATCH),
            )
            maps.append(self.disparity[n][place])
            masks.append(self.valid[n][place])
        stacked = torch.stack(windows, 1)
        shared = DepthMap(torch.stack(maps), torch.stack(masks), Kind.AFFINE_DISPARITY)
        return [(stacked[i], self.cls[i, rows].float()) for i in range(4)], Labels(shared, None, torch.zeros(0, 0, 4))


def square(pair: Pair) -> tuple[Tensor, Tensor, Tensor] | None:
    """The centre square of a pair at SIDE pixels: image, disparity, valid; None for a truth of unknown shift."""
    truth = pair.truth()
    if truth.kind.unknown == "affine":
        return None
    depth = truth.convert(Kind(f"{truth.kind.unknown}_depth"))
    image = pair.rgb().float() / 255
    side = min(image.shape[-2:])
    top, left = (image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2
    place = (slice(top, top + side), slice(left, left + side))
    image = F.interpolate(image[:, *place][None], (SIDE, SIDE), mode="bilinear", antialias=True)[0]
    stacked = torch.stack([depth.values[0][place], depth.valid[0][place].float()])[None]
    values, valid = F.interpolate(stacked, (SIDE, SIDE), mode="nearest-exact")[0]
    keep = (valid > 0.5) & (values > 0)
    return image, torch.where(keep, 1 / values.clamp(min=1e-6), 0.0), keep


def scene(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    view = scenes.render(seed, size=(SIDE, SIDE))
    return view.image, torch.where(view.valid, 1 / view.depth.clamp(min=1e-6), 0.0), torch.ones_like(view.valid)


def names(path: Path | None) -> list[str] | None:
    return path.read_text().split() if path else None


def gather(args: argparse.Namespace, encoder: Encoder, train: bool) -> Data:
    """Images and their features; the training images also mirrored."""
    inputs = [args.encoder_weights, args.pairs, args.train_names, args.test_names, args.scenes, args.test_scenes]
    digest = hashlib.sha256(repr([str(value) for value in inputs]).encode()).hexdigest()[:8]
    path = args.out / f"features_{'train' if train else 'test'}_{digest}.pt"
    if path.is_file():
        return Data(**torch.load(path, weights_only=True))
    seeds = scenes.TRAIN_SEEDS[: args.scenes] if train else scenes.BENCHMARK_SEEDS[: args.test_scenes]
    samples = [scene(seed) for seed in seeds]
    real = [False] * len(samples)
    if args.pairs:
        chosen = read_pairs(args.pairs, names=names(args.train_names if train else args.test_names))
        samples += [item for item in map(square, chosen) if item is not None]
        real += [True] * (len(samples) - len(real))
    images, disparity, valid = (torch.stack(column) for column in zip(*samples, strict=True))
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
    """Train and return the losses. Every decoder of a seed sees the same windows in the same order.

    If the time is up before the last step, the state is saved in the file `half`, and the next call resumes from it.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    objective = Objective(LossSettings(local_global=0.0, feature=0.0, anchor=0.05))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=args.lr, weight_decay=0.01)
    losses: list[float] = []
    if half.is_file():
        state = torch.load(half, weights_only=True)
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["draw"])
        losses = state["losses"]
    decoder.train()
    for step in range(len(losses), args.steps):
        if time.monotonic() > args.until:
            state = {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            torch.save(state | {"draw": generator.get_state()}, half)
            return losses
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps)
        rows = torch.randint(len(data.disparity), (args.batch_size,), generator=generator)
        corners = torch.randint(GRID - WINDOW + 1, (args.batch_size, 2), generator=generator)
        inputs, labels = data.window(rows, corners)
        pred = predict(decoder, inputs, WINDOW * PATCH)
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
    scores: dict[str, list[float]] = {}
    with torch.no_grad():
        for n in range(len(data.disparity)):
            inputs = [(data.patches[i, n : n + 1].float(), data.cls[i, n : n + 1].float()) for i in range(4)]
            pred, truth = predict(decoder, inputs, SIDE), data.disparity[n : n + 1]
            valid = data.valid[n : n + 1] & (truth > 1 / FAR)
            if not valid.any():  # a sparse truth without pixels in the centre square
                continue
            aligned = apply_affine(pred, *fit_affine(pred, truth, valid))
            depth = 1 / aligned.clamp(1 / FAR, 1e3)
            real = bool(data.real[n])
            lowest, highest = (1 / truth[valid].max()).item(), (1 / truth[valid].min()).item()
            metrics = all_metrics(depth.clamp(lowest, highest), 1 / truth.clamp(min=1 / FAR), valid)
            for key in ("abs_rel", "delta1"):
                scores.setdefault(f"{'real' if real else 'scenes'}_{key}", []).append(metrics[key].item())
            if not real:
                scores.setdefault("boundary_f1", []).append(boundary_f1(depth, 1 / truth.clamp(min=1 / FAR)).item())
    return {key: statistics.mean(values) for key, values in scores.items()}


def held_out(learn: Data) -> tuple[Data, Data]:
    """Every sixth training image, and the others with their mirror images."""
    half = len(learn.disparity) // 2  # the second half is the first, mirrored
    chosen = torch.arange(half) % 6 == 3
    return learn.rows(~torch.cat([chosen, chosen])), learn.rows(torch.cat([chosen, torch.zeros(half) > 0]))
