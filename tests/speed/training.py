"""Cost of a training step against the bare loop of the same student and loss.

    python -m tests.speed.training                       # a ViT-S student at 224, on the CPU or the first CUDA card
    python -m tests.speed.training --tiny --repeats 3    # a quick check

Both loops run forward, objective, backward and AdamW on the same images and labels. The bare one has them in memory;
ours reads them through its data workers, clips, reduces, checks, logs and reports. They alternate, block by block, so
that other load on the machine affects both; CPU time is compared too, since wall time is unreliable on a busy machine.
Saving is excluded. With --options, and on a CUDA card, the recipe's options follow: bf16, channels_last, fused,
gradient checkpointing, compile. With --shards the student learns from label shards in every codec instead, with two
teachers and two patches per region, and the result is the time that it waits for data.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from distill import students
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Batch, Labels
from distill.data import sources
from distill.labelling.run import CropSettings, LabelSettings, label
from distill.losses.objective import Objective
from distill.shards.codec import CODECS
from distill.shards.shards import LabelDataset
from distill.teachers import analytic
from distill.training.train import TrainSettings, train
from tests.speed.labelling import make_tar

BLOCK = 5  # steps of one loop before the other runs


class Regions:
    """Photograph-like noise with a smooth label and four overlapping patches, generated once."""

    def __init__(self, count: int, size: int) -> None:
        draw = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 3, 16, 16, generator=draw)
        self.images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
        self.image_keys = [f"region{i}" for i in range(count)]
        self.sources = [0] * count
        self.side = size * 5 // 8

    def __len__(self) -> int:
        return len(self.images)

    def teachers_of(self, index: int) -> list[str]:
        return ["teacher"]

    def get(self, index: int, teachers: list[str], *, visit: int | None = None) -> tuple[str, torch.Tensor]:
        return self.image_keys[index], self.images[index]

    def collate(self, samples: list[tuple[str, torch.Tensor]]) -> Batch:
        keys, images = zip(*samples, strict=True)
        batch = torch.stack(images)
        maps, size, side = batch.mean(1), batch.shape[-1], self.side
        corners = [(top, left) for top in (0, size - side) for left in (0, size - side)]
        patches = torch.stack([maps[:, t : t + side, le : le + side] for t, le in corners], 1).flatten(0, 1)
        boxes = torch.tensor([[t, le, t + side, le + side] for t, le in corners]) / size
        return Batch(keys, batch, {"teacher": Labels(known(maps), known(patches), boxes.expand(len(keys), -1, -1))})


def known(values: torch.Tensor) -> DepthMap:
    return DepthMap(values, torch.ones_like(values, dtype=torch.bool), Kind.AFFINE_DISPARITY)


def student(tiny: bool) -> students.Student:
    torch.manual_seed(0)
    small = {"timm_options": {"depth": 4, "embed_dim": 96, "num_heads": 3}} if tiny else {}
    # A light head: SDT's full-resolution convolutions take seconds on a CPU, which would hide any overhead.
    levels = [16, 16, 32, 32] if tiny else [48, 96, 192, 384]
    decoder = {"channels": 16 if tiny else 64, "post_process_channels": levels}
    return students.build(encoder="dinov3_vits16", decoder="dpt", encoder_options=small, decoder_options=decoder)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bare(data: Regions, settings: TrainSettings, tiny: bool, device: torch.device) -> Iterator[None]:
    """The loop of a typical paper's script: one step per `next`."""
    model, objective = student(tiny).to(device).train(), Objective()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    size = settings.batch_size
    samples = [data.get(i, ["teacher"]) for i in range(len(data))]
    batches = [data.collate(samples[i : i + size]) for i in range(0, len(data) - size + 1, size)]
    while True:
        for batch in batches:
            images, labels = batch.images.to(device), batch.labels["teacher"].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                pred = model(images)
            loss = objective(pred, labels)[0].mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss.item()
            yield


@dataclasses.dataclass
class Clock:
    """Wall and CPU seconds per step of both loops, block by block."""

    ours: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    theirs: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    waits: list[float] = dataclasses.field(default_factory=list)


def compare(data: Regions, settings: TrainSettings, tiny: bool, device: torch.device) -> Clock:
    clock, reference = Clock(), bare(data, settings, tiny, device)
    next(reference)
    last = [time.perf_counter(), time.process_time()]

    def report(done: int, total: int, **numbers: float) -> None:
        if done > BLOCK:
            clock.waits.append(numbers["data_wait"])
        if done % BLOCK:
            return
        wait(device)
        now = [time.perf_counter(), time.process_time()]
        if done > BLOCK:  # the first block is a warm-up
            clock.ours.append(((now[0] - last[0]) / BLOCK, (now[1] - last[1]) / BLOCK))
        for _ in range(BLOCK):
            next(reference)
        wait(device)
        last[:] = [time.perf_counter(), time.process_time()]
        if done > BLOCK:
            clock.theirs.append(((last[0] - now[0]) / BLOCK, (last[1] - now[1]) / BLOCK))

    with tempfile.TemporaryDirectory() as folder:
        train(
            student(tiny),
            data,
            Objective(),
            out=Path(folder) / "run",
            settings=settings,
            collate=data.collate,
            save=lambda model, place, card: place.mkdir(parents=True),
            report=report,
        )
    return clock


def show(name: str, clock: Clock, batch: int) -> None:
    (ours, ours_cpu), (theirs, theirs_cpu) = (
        [statistics.median(column) for column in zip(*rows, strict=True)] for rows in (clock.ours, clock.theirs)
    )
    ratios = [a[0] / b[0] for a, b in zip(clock.ours, clock.theirs, strict=True)]
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if torch.cuda.is_available() else ""
    print(
        f"{name:24} ours {ours * 1e3:8.1f} ms ({batch / ours:6.1f} images/s), bare {theirs * 1e3:8.1f} ms: "
        f"ratio {statistics.median(ratios):.3f} (of medians {ours / theirs:.3f}, of CPU time "
        f"{ours_cpu / theirs_cpu:.3f}), data wait {100 * statistics.mean(clock.waits):.1f} %{memory}"
    )


def from_shards(size: int, codec: str, settings: TrainSettings, tiny: bool) -> None:
    """Makes label shards and trains from them; prints the cost of reading a sample and a step's wait for data."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = sources.tars(make_tar(folder / "sa_0.tar", 8))
        crops = CropSettings(size=size, min_side=size, patches="random", num_patches=2, crops_per_image=4)
        label(
            shards,
            [("one", analytic.Teacher.load()), ("two", analytic.Teacher.load(rgb=(0.1, 0.3, 0.6)))],
            out=folder / "labels",
            crops=crops,
            labels=LabelSettings(codec=codec),
        )
        dataset = LabelDataset(folder / "labels")
        start = time.process_time()
        for i in range(16):
            dataset.get(i, ["one", "two"], coded=True)  # as in training: codes, which are decoded on the device
        read = (time.process_time() - start) / 16
        waits: list[float] = []

        def report(done: int, total: int, **numbers: float) -> None:
            if done > BLOCK:
                waits.append(numbers["data_wait"])

        result = train(
            student(tiny),
            dataset,
            Objective(),
            out=folder / "run",
            settings=dataclasses.replace(settings, teacher_shares={"one": 0.7, "two": 0.3}),
            save=lambda model, place, card: place.mkdir(parents=True),
            report=report,
        )
        size_ = sum(path.stat().st_size for path in (folder / "labels").glob("*.tar")) / len(dataset)
        print(
            f"{codec:24} {size_ / 1e3:7.0f} kB and {read * 1e3:6.1f} ms of processor to read a sample, "
            f"{result.images_per_s:6.2f} images/s, data wait {100 * statistics.median(waits):.2f} % of a step"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a student of 0.5M parameters at 64 pixels")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=8, help="blocks of 5 steps")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--trackers", nargs="*", default=["tensorboard"])
    parser.add_argument("--options", action="store_true", help="also each of the recipe's options")
    parser.add_argument("--shards", action="store_true", help="learn from label shards, in every codec")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = Regions(8 * args.batch_size, 64 if args.tiny else args.size)
    plain = TrainSettings(
        steps=BLOCK * (args.repeats + 1) + 1,  # the last step saves, and belongs to no block
        batch_size=args.batch_size,
        workers=args.workers,
        val_fraction=0.0,
        eval_every=0,
        save_every=0,
        trackers=tuple(args.trackers),
        hflip=False,
        warmup_steps=0,
        encoder_lr=5e-5,
        seed=0,
    )
    print(f"{device}, {torch.get_num_threads()} threads, batches of {args.batch_size}, {data.images.shape[-1]} pixels")
    if args.shards:
        settings = dataclasses.replace(plain, precision="bf16" if device.type == "cuda" else "fp32")
        for codec in CODECS:
            from_shards(data.images.shape[-1], codec, settings, args.tiny)
        return
    show("fp32", compare(data, plain, args.tiny, device), args.batch_size)
    if args.options or device.type == "cuda":
        options = ({"precision": "bf16"}, {"channels_last": True}, {"fused": True}, {"gradient_checkpointing": True})
        for option in (*options, {"compile": True}):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            settings = dataclasses.replace(plain, **option)
            show(next(iter(option)), compare(data, settings, args.tiny, device), args.batch_size)


if __name__ == "__main__":
    main()
