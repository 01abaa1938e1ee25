"""Cost of a one-step UNet's training step against the bare loop, and the savings by the cache of VAE latents.

    python -m tests.speed.one_step                    # a fifth of Stable Diffusion's width, 256 pixels
    python -m tests.speed.one_step --tiny --steps 4   # a quick check

The bare loop has latents in memory and does only FiffDepth's passes, losses and AdamW. Ours reads images and labels,
encodes them or reads their latents from disk, draws, clips, logs and reports. Printed: seconds per step of each, and
the ratios; CPU time on a CPU, since wall time is unreliable on a busy machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.core.depth import DepthMap, Kind
from distill.core.labels import Batch, Labels, Supervision
from distill.losses import latent as maths
from distill.losses.latent_settings import LatentSettings
from distill.teachers import _latent_student
from distill.training.latent import LatentTask
from distill.training.latent_cache import LatentCache
from distill.training.settings import TrainSettings
from distill.training.train import train
from tests import tiny_teachers

ASKED = _latent_student.LatentStudentSpec(teacher="fiffdepth", kind=Kind.AFFINE_DEPTH)


class Regions:
    """Noise images with maps: ground truth for every second region, a network's disparity for the others."""

    def __init__(self, count: int, size: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.images = torch.rand(count, 3, size, size, generator=draw)
        self.maps = torch.rand(count, size, size, generator=draw) * 9 + 1
        self.image_keys, self.sources = [str(i) for i in range(count)], [i % 2 for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def teachers_of(self, index: int) -> tuple[str]:
        return (("truth", "dav2")[index % 2],)

    def get(self, index: int, teachers: Any, *, visit: int | None = None) -> int:
        return index

    def collate(self, rows: list[int]) -> Batch:
        name = self.teachers_of(rows[0])[0]
        kind = Kind.METRIC_DEPTH if name == "truth" else Kind.AFFINE_DISPARITY
        shared = DepthMap(self.maps[rows], torch.ones(len(rows), *self.maps.shape[1:], dtype=torch.bool), kind)
        labels = Labels(
            shared, None, torch.zeros(len(rows), 0, 4), supervision=Supervision(name, kind, name == "truth")
        )
        return Batch(tuple(self.image_keys[r] for r in rows), self.images[rows], {name: labels})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a network and images for a look")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 64 if args.tiny else 256
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "base").mkdir()
        make: Any = tiny_teachers.fiffdepth if args.tiny else lambda f: tiny_teachers.diffusion_small(f, "fiffdepth")
        make(root / "base")
        data = Regions(2 * args.batch, size)
        bare = bare_loop(str(root / "base"), data, args.batch, args.steps, device, clock)
        print(f"bare loop {bare:.3f} s a step ({args.batch} images of {size} pixels, {device.type})")
        task_cache = LatentCache(root / "latents", {"v": 1})
        for label, cache in (("encoding", None), ("filling the cache", task_cache), ("cached", task_cache)):
            seconds = ours(root, label, data, args.batch, args.steps, cache, clock)
            print(f"train, {label}: {seconds:.3f} s a step, {seconds / bare:.2f} of the bare loop", flush=True)


def bare_loop(
    base: str, data: Regions, batch: int, steps: int, device: torch.device, clock: Callable[[], float]
) -> float:
    """Seconds per step of FiffDepth's passes on latents in memory."""
    student = _latent_student.build_student(base, ASKED).to(device)
    half = batch // 2
    image = student.encode(data.images[:batch].to(device))
    maps = data.maps[:batch].to(device)
    unit, valid = maths.to_unit_range(maps, torch.ones_like(maps, dtype=torch.bool), 0.02)
    target, inside = student.encode_maps(unit), maths.pooled(valid, student.factor)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-5)
    took = 0.0
    for step in range(steps + 1):
        start = clock()
        levels = torch.randint(1, 1000, (half,), device=device)
        noise, alphas = torch.randn_like(image[:half]), student.alphas.to(device)[levels]
        mixed = 0.5 * image[:half] + 0.5 * target[:half]
        inputs = torch.cat([image, maths.add_noise(mixed, noise, alphas)])
        out = student(inputs, torch.cat([torch.zeros_like(levels).repeat(2), levels]))
        filtered = student(out[half:batch], torch.full((half,), -1, device=device))
        predicted = torch.cat([out[:half], filtered])
        loss = maths.latent_distance(predicted, target, inside, squared=False).mean()
        loss = loss + 0.5 * maths.latent_gradient(predicted, target, inside, scales=1).mean()
        true_velocity = maths.velocity(mixed, noise, alphas)
        loss = loss + 0.2 * maths.latent_distance(out[batch:], true_velocity, inside[:half], squared=True).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took += clock() - start if step else 0.0  # the first step is a warm-up
    return took / steps


def ours(
    root: Path, label: str, data: Regions, batch: int, steps: int, cache: LatentCache | None, clock: Callable[[], float]
) -> float:
    """Seconds per step of a run, without its first step and its last, which saves."""
    student = _latent_student.build_student(str(root / "base"), ASKED)
    settings = TrainSettings(
        steps=steps + 2, batch_size=batch, warmup_steps=1, workers=0, val_fraction=0.0, eval_every=0, save_every=0,
        kind="affine_depth", even_batches=True, keep_unmet=True, trackers=(), hflip=False, seed=0,
        teacher_shares={"truth": 0.5, "dav2": 0.5},
    )  # fmt: skip
    times: list[float] = []
    train(
        student, data, LatentTask(student, LatentSettings(), 0, cache), out=root / label.replace(" ", "_"),
        settings=settings, collate=data.collate, save=_latent_student.save,
        report=lambda done, total, **numbers: times.append(clock()),
    )  # fmt: skip
    return (times[-2] - times[0]) / steps


if __name__ == "__main__":
    main()
