"""Cost of training from label shards on a card against the bare step, and whether two runs are bit-equal.

    python -m tests.speed.on_card [TAR ...]             # ViT-S students at 560, batches of 8, bf16
    python -m tests.speed.on_card --tiny                # a quick check, on a CPU too

The bare step has the same batches, decoded and already on the device, the same objective and the same fused AdamW, and
never waits; the objective's share is what it adds to a step whose loss is the prediction's mean. Ours is `train`: it
reads shards in workers, sends, decodes, augments, clips, logs every 20 steps.
--cached: the same on stored features of the frozen encoder (train.cache_features), and the cost of storing them.
Then 20 steps are run twice from one seed, without and with train.deterministic, and their weights compared; the rate
is that of the last 15.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import students
from distill.core.crop_settings import CropSettings
from distill.data import sources
from distill.labelling.run import label
from distill.labelling.settings import LabelSettings
from distill.losses.objective import Objective
from distill.shards.codec import CODECS
from distill.shards.features import FeatureStore, write_features
from distill.shards.shards import LabelDataset
from distill.teachers.checkpoint import Teacher
from distill.training import step
from distill.training.batches import MicroBatch
from distill.training.handover import SLOTS, Handover
from distill.training.sampling import MicroBatchPositions, make_order
from distill.training.settings import TrainSettings
from distill.training.stored import StoredBatch, stored_batches
from distill.training.train import train
from tests.speed.labelling import make_tar, repeated

LARGE = 32
"""Batches of at least this size are measured in 61 steps, only with the first decoder and number of patches."""


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def labels_of(tars: list[str], folder: Path, size: int, device: torch.device, crops_per_image: int, codec: str) -> None:
    entries = [entry for shard in sources.tars(tars) for entry in shard.scan().entries]
    entries = [entry for entry in entries if min(entry.load().rgb.shape[1:]) >= 644][:12]
    shards = repeated(entries, len(entries), "photo")
    crops = CropSettings(size=size, crops_per_image=crops_per_image)
    if size < 224:
        crops = dataclasses.replace(crops, patches="random", num_patches=2)
    settings = LabelSettings(batch_size=16, threads=os.cpu_count() or 1, codec=codec)
    teacher = Teacher.load("pocket", device=device, native_size=min(size, 224))
    label(shards, [("pocket", teacher)], out=folder, crops=crops, labels=settings, device=device)


def student_of(decoder: str, given: argparse.Namespace, frozen: bool) -> students.Student:
    torch.manual_seed(0)
    small = {"timm_options": {"depth": 4, "embed_dim": 96, "num_heads": 3}} if given.tiny else {}
    student = students.build(encoder=given.encoder, decoder=decoder, encoder_options=small)
    student.encoder.freeze(frozen)
    return student


def bare(
    data: LabelDataset, student: Any, settings: TrainSettings, device: torch.device, steps: int
) -> tuple[float, float]:
    """Seconds per step, with the objective and with the mean of the prediction in its place."""
    order = make_order(list(range(len(data))), data.sources, seed=0, weights=(), temperature=1.0)
    positions = MicroBatchPositions(
        order=order, batch_size=settings.batch_size, accumulate=1, process=0, processes=1, steps=4
    )
    no_workers = dataclasses.replace(settings, workers=0)
    batches = list(stored_batches(data, positions, settings=no_workers, device=device))
    student.to(device).train()
    if settings.freeze_encoder:
        student.encoder.eval()
    objective = Objective()
    trainable = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=device.type == "cuda")

    def seconds(loss_of: Callable[[Tensor, MicroBatch], Tensor], steps: int) -> float:
        start = 0.0
        for number, micro in zip(range(steps + 5), itertools.cycle(batches), strict=False):
            if number == 5:
                start = clock(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                pred = student(micro.images)
            loss = loss_of(pred.float(), micro)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return (clock(device) - start) / steps

    full = seconds(lambda pred, micro: objective(pred, micro.taught[0].labels)[0].mean(), steps)
    return full, seconds(lambda pred, micro: pred.mean(), max(8, steps // 3))


def stored(data: LabelDataset, encoder: Any, device: torch.device, folder: Path) -> FeatureStore:
    """Stores the encoder's features of every region as `distill train` does; prints the cost."""
    encoder.to(device).eval()

    @torch.no_grad()
    def encode(images: Tensor) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return list(encoder(images.to(device)))

    start = clock(device)
    write_features(folder, data.keys, lambda i: data.get(i, ()).image, encode, mirrored=True, facts={})
    seconds, size = clock(device) - start, sum(path.stat().st_size for path in folder.glob("*.tar"))
    print(f"features: {1e3 * seconds / len(data):.0f} ms and {size / len(data) / 1e6:.1f} MB a region, stored once")
    return FeatureStore(folder)


def ours(
    data: LabelDataset,
    student: Any,
    settings: TrainSettings,
    device: torch.device,
    features: FeatureStore | None = None,
) -> tuple[float, float]:
    """Seconds per step and the fraction spent waiting for data, between two lines of the log.

    The first is the first at which all slots of the workers are page-locked, if the run is long enough; the second is
    the last but one, as the last step also writes a checkpoint.
    """
    log_lines: list[tuple[int, float, float]] = []

    def report(done: int, total: int, **numbers: float) -> None:
        log_lines.append((done, clock(device), numbers["data_wait"]))

    with tempfile.TemporaryDirectory() as folder:
        options = {"save": _nothing, "report": report, "features": features}
        train(student, data, Objective(), out=Path(folder), settings=settings, **options)
    measured = log_lines[:-1]
    settled = [line for line in measured[:-1] if line[0] > SLOTS * settings.workers] or measured[:-1]
    (first, start, _), (last, end, _) = settled[0], measured[-1]
    pairs = itertools.pairwise(log_lines)
    each = [f"{1e3 * (after - before) / (done - seen):.1f}" for (seen, before, _), (done, after, _) in pairs]
    print(f"ms a step between log lines from step {log_lines[0][0]}: {', '.join(each)}")
    return (end - start) / (last - first), statistics.mean(wait for done, _, wait in measured if done > first)


@contextlib.contextmanager
def hosted(steps: int) -> Iterator[None]:
    """Prints the host's time in the parts of a training step, in ms, and how many slots are page-locked."""
    spent: Counter[str] = Counter()
    slots: dict[int, bool] = {}

    def timed(owner: Any, name: str) -> tuple[Any, str, Any]:
        real = getattr(owner, name)

        @functools.wraps(real)
        def call(*args: Any, **more: Any) -> Any:
            start = time.perf_counter()
            try:
                return real(*args, **more)
            finally:
                spent[name] += time.perf_counter() - start
                if name == "take":
                    slots.update(args[0]._locked)

        setattr(owner, name, call)
        return owner, name, real

    watched = [(Handover, "take"), (Handover, "release"), (StoredBatch, "ready"), (step, "measure"), (step, "_learn")]
    originals = [timed(owner, name) for owner, name in [*watched, (torch.optim.AdamW, "step")]]
    try:
        yield
    finally:
        for owner, name, real in originals:
            setattr(owner, name, real)
    parts = ", ".join(f"{name} {1e3 * seconds / steps:.1f}" for name, seconds in spent.items())
    print(f"the host, ms a step: {parts}; {sum(slots.values())} of {len(slots)} slots page-locked", flush=True)


def fed(data: LabelDataset, settings: TrainSettings, device: torch.device, batches: int = 40) -> float:
    """Seconds per batch without training: the speed of the workers and of the transfer to the card."""
    order = make_order(list(range(len(data))), data.sources, seed=0, weights=(), temperature=1.0)
    total = batches + 2 * max(1, settings.workers)
    positions = MicroBatchPositions(
        order=order, batch_size=settings.batch_size, accumulate=1, process=0, processes=1, steps=total
    )
    start = 0.0
    for number, _ in enumerate(stored_batches(data, positions, settings=settings, device=device)):
        if number == total - batches:
            start = clock(device)
    return (clock(device) - start) / (batches - 1)


def profiled(data: LabelDataset, student: Any, settings: TrainSettings) -> None:
    """Prints for 40 steps with one log line: the lines of code that wait for the card, and the card's kernels."""
    settings = dataclasses.replace(settings, steps=40, log_every=40)
    torch.cuda.set_sync_debug_mode("warn")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(student, data, Objective(), out=Path(folder), settings=settings, save=_nothing)
    torch.cuda.set_sync_debug_mode("default")
    waits = Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))
    print(f"waits for the card in {settings.steps} steps:")
    print("\n".join(f"{times:6d}  {place}" for place, times in waits.most_common(12)))
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with tempfile.TemporaryDirectory() as folder, torch.profiler.profile(activities=activities) as profile:
        train(student, data, Objective(), out=Path(folder), settings=settings, save=_nothing)
    events = profile.key_averages()
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    print(f"the card works {sum(e.self_device_time_total for e in on_device) / settings.steps / 1e3:.1f} ms a step:")
    for event in sorted(on_device, key=lambda e: -e.self_device_time_total)[:22]:
        each = event.self_device_time_total / settings.steps / 1e3
        print(f"{each:8.3f} ms a step, {event.count / settings.steps:6.1f} launches   {event.key[:100]}")
    print("the host:")
    for event in sorted(events, key=lambda e: -e.self_cpu_time_total)[:14]:
        each = event.self_cpu_time_total / settings.steps / 1e3
        print(f"{each:8.3f} ms a step, {event.count / settings.steps:6.1f} calls   {event.key[:60]}")


def _nothing(model: Any, place: Path, card: Any) -> None:
    place.mkdir(parents=True)


def twice(data: LabelDataset, settings: TrainSettings, given: argparse.Namespace, device: torch.device) -> float:
    """Prints the largest difference of weights between two runs of one seed; returns the faster one's s per step."""
    ends, seconds = [], []
    for _ in range(2):
        student, seen = student_of("sdt_fast", given, frozen=False), []

        def report(done: int, total: int, seen: list[tuple[int, float]] = seen, **numbers: float) -> None:
            seen.append((done, clock(device)))

        with tempfile.TemporaryDirectory() as folder:
            options = {"save": _nothing, "report": report}
            train(student, data, Objective(), out=Path(folder), settings=settings, **options)
        (first, start), (last, end) = seen[0], seen[-1]
        seconds.append((end - start) / (last - first))
        ends.append(torch.cat([p.detach().flatten().cpu() for p in student.parameters()]))
    difference = float((ends[0] - ends[1]).abs().max())
    result = f"two runs of {settings.steps} steps differ by {difference:.2g}"
    print(f"deterministic {settings.deterministic}: {result}; {1e3 * min(seconds):.1f} ms a step")
    return min(seconds)


def measure(
    data: LabelDataset, decoder: str, settings: TrainSettings, given: argparse.Namespace, device: torch.device
) -> None:
    """Prints one row: the bare step, ours, and data loading bare_s."""
    data_s = fed(data, settings, device, 40 if settings.batch_size < LARGE else 8)
    bare_s, without_s = bare(data, student_of(decoder, given, True), settings, device, settings.steps)
    with hosted(settings.steps):
        full, wait = ours(data, student_of(decoder, given, True), settings, device)
    print(
        f"{given.encoder}, frozen, + {decoder}, batches of {settings.batch_size}, {settings.patches_per_step or 'all'} "
        f"patches, {given.workers} workers: bare {1e3 * bare_s:.1f} ms (of it the objective "
        f"{100 * (1 - without_s / bare_s):.1f} %), train {1e3 * full:.1f} ms "
        f"({settings.batch_size / full:.1f} images/s), ratio {full / bare_s:.3f}, data wait {100 * wait:.1f} %; data "
        f"alone {1e3 * data_s:.1f} ms",
        flush=True,
    )
    if given.profile and device.type == "cuda":
        profiled(data, student_of(decoder, given, True), settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars", nargs="*")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--size", type=int, default=560)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--encoder", default="dinov3_vits16")
    parser.add_argument("--steps", type=int, default=101, help="of 20 between log lines; the last also saves")
    parser.add_argument("--crops-per-image", type=int, default=12)
    parser.add_argument("--labels", type=Path, help="a folder of such labels; made if it is not there")
    parser.add_argument("--codec", choices=list(CODECS), default="zst")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--patches-per-step", type=int, nargs="+", default=[0], help="0: all")
    parser.add_argument("--cached", action="store_true", help="also on stored features of the encoder")
    parser.add_argument("--no-twice", action="store_true")
    parser.add_argument("--decoders", nargs="+", default=["sdt_fast", "sdt"])
    parser.add_argument("--profile", action="store_true", help="where training waits for the card, and what runs there")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 64 if given.tiny else given.size
    print(
        torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        f"{os.cpu_count()} cores, torch {torch.__version__}",
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.labels or Path(temporary) / "labels"
        if not folder.exists():
            tars = given.tars or [str(make_tar(Path(temporary) / "sa_0.tar"))]
            labels_of(tars, folder, size, device, given.crops_per_image, given.codec)
        data = LabelDataset(folder)
        start = time.process_time()
        for i in range(8):
            data.get(i, ["pocket"], coded=True)
        print(f"a sample from its shard, left in codes: {1e3 * (time.process_time() - start) / 8:.1f} ms of processor")
        settings = TrainSettings(
            steps=given.steps,
            warmup_steps=0,
            precision="bf16" if device.type == "cuda" else "fp32",
            freeze_encoder=True,
            val_fraction=0.0,
            eval_every=0,
            save_every=0,
            log_every=20,
            trackers=(),
            workers=given.workers,
        )
        for size, patches, decoder in itertools.product(given.batch_sizes, given.patches_per_step, given.decoders):
            row_settings = dataclasses.replace(settings, batch_size=size, patches_per_step=patches)
            if size < LARGE:
                measure(data, decoder, row_settings, given, device)
            elif (patches, decoder) == (given.patches_per_step[0], given.decoders[0]):
                measure(data, decoder, dataclasses.replace(row_settings, steps=61), given, device)
        settings = dataclasses.replace(settings, batch_size=given.batch_sizes[0])
        if given.cached:
            features = stored(data, student_of("sdt_fast", given, True).encoder, device, Path(temporary) / "features")
            for decoder in given.decoders:
                cached = dataclasses.replace(settings, cache_features=True)
                took, wait = ours(data, student_of(decoder, given, True), cached, device, features)
                print(
                    f"{decoder} on stored features: train {1e3 * took:.1f} ms, data wait {100 * wait:.1f} %", flush=True
                )
        if not given.no_twice:
            short = dataclasses.replace(settings, steps=20, freeze_encoder=False, log_every=5)
            plain = twice(data, short, given, device)
            exact = twice(data, dataclasses.replace(short, deterministic=True), given, device)
            print(f"deterministic costs {100 * (exact / plain - 1):.0f} %")


if __name__ == "__main__":
    main()
