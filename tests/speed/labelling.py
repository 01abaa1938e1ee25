"""Labelling speed: end to end against the bare teacher, and everything but the teacher by stage and by threads.

    python -m tests.speed.labelling [TAR ...]                               # the embedded teacher at 560
    python -m tests.speed.labelling --teacher dav2-large --compile [TAR ...] # on a card: ViT-L, random weights, bf16
    python -m tests.speed.labelling --no-teacher [TAR ...]                  # how fast a teacher could be fed

Without tars it makes one of noisy photographs of SA-1B's size. The bare teacher predicts the same crops in the same
batches, already in the device's memory, and discards the maps. End to end is `label`, from tars to shards on disk; its
start and end cost about a second, so with many photos its rate in between is printed too.
Photos are repeated until there are enough; the first run of each warms up and compiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.core.codes import CodedMaps
from distill.core.crop_settings import CropSettings
from distill.core.crops import generator, resize
from distill.core.depth import DepthMap, Kind
from distill.data import sources
from distill.data.sources import Entry, InputShard, Scan
from distill.labelling import annotate
from distill.labelling.asking import Answer
from distill.labelling.jobs import prepare
from distill.labelling.run import label
from distill.labelling.settings import LabelSettings
from distill.shards.codec import CODECS, encode_map, encode_sample
from distill.shards.shards import read_manifest
from distill.teachers import Card
from distill.teachers import Teacher as TeacherLike
from distill.teachers._compile import compile_networks
from distill.teachers.checkpoint import Teacher

CPU = torch.device("cpu")


def make_tar(path: Path, count: int = 12) -> Path:
    """Photographs of 1500 x 2250: clouds of noise at several scales."""
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            rng = generator("speed", i)
            layers = [
                resize(torch.from_numpy(rng.random((3, 6 * k, 9 * k)).astype(np.float32)), 1500, 2250) / k
                for k in (1, 3, 12, 50)
            ]
            total = torch.stack(layers).sum(0)
            pixels = (total / total.max() * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "JPEG", quality=92)
            info = tarfile.TarInfo(f"./sa_{i}.jpg")
            info.size = len(out.getvalue())
            tar.addfile(info, io.BytesIO(out.getvalue()))
    return path


def repeated(entries: Sequence[Entry], count: int, name: str) -> list[InputShard]:
    """One shard of `count` entries: these entries repeated, with new keys."""
    copies = [dataclasses.replace(entries[i % len(entries)], key=f"{name}-{i}") for i in range(count)]
    return [InputShard(name, "memory", partial(Scan, tuple(copies)))]


# --- teachers ---------------------------------------------------------------------------------------------------------


def random_dav2_large(size: int) -> Any:
    """Depth Anything V2 Large at full size with random weights, run at this input size."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    from distill.teachers import depth_anything_v2 as dav2

    backbone = Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=518,
        patch_size=14,
        out_indices=[5, 12, 18, 24],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=1024,
        patch_size=14,
        neck_hidden_sizes=[256, 512, 1024, 1024],
        fusion_hidden_size=256,
        head_hidden_size=32,
    )
    model = DepthAnythingForDepthEstimation(config).eval().requires_grad_(False)
    dav2._use_official_positions(model)
    card = dataclasses.replace(dav2.CARDS[0], weights="random", native_size=size)
    return dav2.Teacher(model, card, resize="none")


def load(given: argparse.Namespace, device: torch.device) -> Any:
    if given.teacher == "dav2-large":
        teacher = random_dav2_large(given.size)
        teacher.model.to(device=device, dtype=getattr(torch, given.dtype))
    else:
        teacher = Teacher.load(given.teacher, device=device, native_size=given.size)
    if given.compile:
        compile_networks(teacher)
    return teacher


# --- end to end, bare -------------------------------------------------------------------------------------------------


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def bare(teacher: TeacherLike, crops: Tensor, batch: int, maps: int) -> float:
    """Maps per second from crops (N,3,S,S) that are on the device already; the maps are not copied back."""
    with torch.no_grad():
        for _ in range(3):
            teacher.predict(crops[:batch])
        start = clock()
        for i in range(0, maps, batch):
            teacher.predict(crops[i % (len(crops) - batch + 1) :][:batch])
        return maps / (clock() - start)


def compare(teacher: Any, entries: list[Entry], given: argparse.Namespace, device: torch.device) -> None:
    """Prints the bare and the end-to-end rate, measured alternately, and their ratio."""
    crops = CropSettings(size=given.size)
    jobs = [prepare(e.load(), crops=crops, seed=0, draw=0) for e in entries[:8]]
    ready = torch.cat([torch.cat([job.region[None], job.patches]) for job in jobs])
    ready = ready[: max(given.batch, 32)].to(device).float() / 255
    ready = ready.contiguous(memory_format=torch.channels_last)  # as in labelling, so that both compile once
    per_photo = np.mean([1 + len(job.patches) for job in jobs])
    labels = LabelSettings(batch_size=given.batch, threads=given.threads, samples_per_part=10_000, codec=given.codec)
    ratios = []
    with tempfile.TemporaryDirectory() as temporary:
        for turn in range(given.turns + 1):
            count = given.photos if turn else max(8, given.photos // 8)
            shards = repeated(entries, count, f"turn{turn}")
            rate = bare(teacher, ready, given.batch, given.batch * max(2, int(per_photo * count) // given.batch))
            start, processor = clock(), time.process_time()
            done_at: list[float] = []
            outcome = label(
                shards,
                [("teacher", teacher)],
                out=Path(temporary) / str(turn),
                crops=crops,
                labels=labels,
                device=device,
                report=lambda done, total, **numbers: done_at.append(time.perf_counter()),  # noqa: B023
            )
            seconds, processor = clock() - start, time.process_time() - processor
            maps = per_photo * outcome.images
            print(
                f"{'warm-up' if not turn else f'turn {turn}'}: bare {rate:8.1f} maps/s; end to end "
                f"{maps / seconds:8.1f} maps/s, {outcome.images / seconds:6.2f} photos/s: "
                f"{100 * maps / seconds / rate:5.1f} %; {1e3 * processor / outcome.images:.0f} ms of processor a photo"
            )
            # Photos are reported in order, several queues behind the teacher, and the queues are emptied at the end.
            first, last = len(done_at) // 10, len(done_at) - 1 - 6 * given.threads
            if last - first >= len(done_at) // 2:
                middle = per_photo * (last - first) / (done_at[last] - done_at[first])
                print(f"    without its start and end: {middle:8.1f} maps/s: {100 * middle / rate:5.1f} %")
            if turn:
                ratios.append(maps / seconds / rate)
        first, second = (
            verify_hash(Path(temporary) / "same", n, entries, teacher, crops, labels, device) for n in "ab"
        )
        print(f"labels of one part made twice: {'equal bytes' if first == second else 'other bytes'}")
    print(f"median of {len(ratios)}: {100 * float(np.median(ratios)):.1f} % of the bare teacher")


def verify_hash(
    folder: Path, name: str, entries: list[Entry], teacher: Any, crops: CropSettings, labels: LabelSettings, device: Any
) -> str:
    """The sha256 of the single tar with a few photos' labels, written to a separate folder."""
    shards = repeated(entries, 4, "same")
    label(shards, [("teacher", teacher)], out=folder / name, crops=crops, labels=labels, device=device)
    return str(read_manifest(folder / name)["shards"][0]["sha256"])


# --- by stage ---------------------------------------------------------------------------------------------------------


def timed(name: str, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    start, cpu = time.perf_counter(), time.process_time()
    results = [work(item) for item in items]
    spent, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{name:40}{1e3 * spent / len(results):9.1f} ms each, {1e3 * cpu / len(results):8.1f} of processor")
    return results


class FreeAsking:
    """Returns precomputed codes for every crop, of one map by the pocket model."""

    in_flight = 0

    def __init__(self, codes: Tensor, codec: str) -> None:
        self.codes, self.codec = codes, codec

    def __call__(
        self, name: str, teacher: TeacherLike, crops: Sequence[Tensor], keys: Sequence[str], *, filled: bool = True
    ) -> Any:
        ones, low = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        count = torch.tensor([self.codes.numel()])
        maps = [CodedMaps(self.codes[None], low, ones, count, self.codec, Kind.AFFINE_DISPARITY) for _ in crops]
        return lambda: Answer(maps, Kind.AFFINE_DISPARITY, [0] * len(maps))


@dataclasses.dataclass
class Nobody:
    """A teacher whose `predict` must not be called."""

    card: Card = dataclasses.field(
        default_factory=lambda: Card(
            name="nobody", weights="", kind=Kind.AFFINE_DISPARITY, licence="", code_licence="", commercial=True
        )
    )

    def predict(self, images: Tensor) -> DepthMap:
        raise AssertionError


def a_map(entry: Entry, crops: CropSettings) -> DepthMap:
    teacher = Teacher.load("pocket", native_size=168)
    region = prepare(entry.load(), crops=crops, seed=0, draw=0).region
    return teacher.predict(region[None].float() / 255)


def feeding(entries: list[Entry], given: argparse.Namespace) -> None:
    """Processor time by stage, then photos per second by threads, with codes that cost nothing."""
    crops = CropSettings(size=given.size)
    torch.set_num_threads(1)
    depth = a_map(entries[0], crops)
    data, _ = encode_map(depth.values[0], depth.valid[0], codec=given.codec)
    free = FreeAsking(torch.from_numpy(CODECS[given.codec].read(data).copy()), given.codec)
    photos = timed("read and decode, a photo", lambda e: e.load(), entries)
    jobs = timed("cut region and patches, a photo", lambda p: prepare(p, crops=crops, seed=0, draw=0), photos)
    print(f"{'maps a photo':40}{np.mean([1 + len(job.patches) for job in jobs]):9.1f}")
    annotate.make_asker = lambda *_: free  # type: ignore[assignment,misc]
    samples = list(annotate.annotate(jobs, [("free", Nobody())], labels=LabelSettings(codec=given.codec)))
    timed("encode codes and jpg, a photo", partial(encode_sample, codec=given.codec), samples)
    from_values = partial(encode_map, depth.values[0], depth.valid[0], codec=given.codec)
    timed("encode one map from values", lambda _: from_values(), range(4))
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        for threads in [n for n in (1, 2, 4, 8, 12, 16, 32) if n <= max(2, cores)]:
            shards = repeated(entries, max(16, given.photos // 16 * threads), f"threads{threads}")
            start, cpu = time.perf_counter(), time.process_time()
            labels = LabelSettings(threads=threads, samples_per_part=10_000, codec=given.codec)
            outcome = label(
                shards, [("free", Nobody())], out=Path(temporary) / str(threads), crops=crops, labels=labels
            )
            spent, cpu = time.perf_counter() - start, time.process_time() - cpu
            print(
                f"label, no teacher, {threads:2} threads: {outcome.images / spent:8.1f} photos/s, "
                f"{1e3 * cpu / outcome.images:6.1f} ms of processor a photo"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars", nargs="*")
    parser.add_argument("--teacher", default="pocket", help='"dav2-large" (random weights), or a student\'s folder')
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-teacher", action="store_true")
    parser.add_argument("--size", type=int, default=560)
    parser.add_argument("--codec", choices=list(CODECS), default="zst")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--photos", type=int, default=12)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        tars = given.tars or [make_tar(Path(temporary) / "sa_0.tar")]
        entries = [entry for shard in sources.tars(tars) for entry in shard.scan().entries]
        entries = [entry for entry in entries if min(entry.load().rgb.shape[1:]) >= 644][:24]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{name}, {os.cpu_count()} cores, {len(entries)} photos repeated, crops of {given.size}, {given.codec}")
        if given.no_teacher:
            feeding(entries, given)
            return
        description = f"{given.teacher}, {given.dtype}, compile {given.compile}"
        print(f"{description}, batches of {given.batch}, {given.threads} threads")
        compare(load(given, device), entries, given, device)


if __name__ == "__main__":
    main()
