"""How fast labels are made: end to end against the bare teacher, against the plain way, and stage by stage.

    python -m tests.speed.labelling [TAR ...]                    # the embedded teacher at 560, on the CPU or CUDA
    python -m tests.speed.labelling --weights FOLDER --encoder-weights FILE
    python -m tests.speed.labelling --no-teacher [TAR ...]       # everything but the teacher: what feeds a fast one

Without tars it makes one of noisy photographs of SA-1B's size. The bare teacher predicts the same crops in the same
batches, ready in memory; the plain way loads a photo, predicts crop by crop and saves every map before it takes the
next. The three take turns, photo block by photo block, so that whatever else the machine does falls on all; the first
block warms up. Processor time is compared too: where the teacher runs on the CPU, it is what a busy machine cannot
spoil, and its excess over the bare teacher's is all that is not the teacher.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.core.crops import generator, resize
from distill.core.depth import DepthMap, Kind
from distill.data import sources
from distill.data.sources import Entry, InputShard, Scan
from distill.labelling.annotate import CropJob, prepare
from distill.labelling.run import CropSettings, LabelSettings, label, label_photo
from distill.shards.codec import DEFAULT_CODEC, encode_sample
from distill.shards.shards import LabelDataset, collate, verify
from distill.teachers import Card
from distill.teachers import Teacher as TeacherLike
from distill.teachers.checkpoint import Teacher

BATCH = 8


@dataclass
class Formula:
    """Depth by a formula of the pixels."""

    card: Card = field(
        default_factory=lambda: Card(
            name="formula",
            weights="",
            kind=Kind.SCALE_DEPTH,
            licence="",
            code_licence="",
            commercial=True,
        )
    )

    def predict(self, images: Tensor) -> DepthMap:
        values = 1 + images.mean(1)
        return DepthMap(values, torch.ones_like(values, dtype=torch.bool), self.card.kind)


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


# --- end to end, bare, plain ------------------------------------------------------------------------------------------


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock() -> tuple[float, float]:
    wait()
    return time.perf_counter(), time.process_time()


def bare(teacher: TeacherLike, crops: list[Tensor]) -> None:
    for start in range(0, len(crops), BATCH):
        teacher.predict(torch.stack(crops[start : start + BATCH]))


def plain(teacher: TeacherLike, entries: list[Entry], crops: CropSettings, folder: Path) -> None:
    """What a script would do: every step waits for the one before it."""
    for entry in entries:
        job = prepare(entry.load(), crops=crops)
        Image.fromarray(job.region.permute(1, 2, 0).numpy()).save(folder / f"{job.key}.jpg", quality=95)
        for i, crop in enumerate([job.region, *job.patches]):
            values = teacher.predict(crop[None].float() / 255).values[0].cpu().numpy()
            codes = (values - values.min()) / max(float(values.max() - values.min()), 1e-9) * 65535
            cv2.imwrite(str(folder / f"{job.key}.{i}.png"), codes.astype(np.uint16))


def block_of(entries: list[Entry], number: int) -> list[InputShard]:
    return [InputShard(f"block_{number}", "memory", partial(Scan, tuple(entries)))]


def compare(teacher: TeacherLike, entries: list[Entry], crops: CropSettings, threads: int, per_block: int) -> None:
    """Prints the three rates and their ratios, medians over blocks of `per_block` photos."""
    ways: dict[str, list[tuple[float, float]]] = {"bare": [], "end to end": [], "plain": []}
    blocks = [entries[i : i + per_block] for i in range(0, len(entries) - per_block + 1, per_block)]
    maps = 0
    with tempfile.TemporaryDirectory() as temporary:
        for number, block in enumerate(blocks):
            jobs: list[CropJob] = [prepare(entry.load(), crops=crops) for entry in block]
            ready = [crop.float() / 255 for job in jobs for crop in (job.region, *job.patches)]
            maps += len(ready) if number else 0
            folder = Path(temporary) / str(number)
            folder.mkdir()
            work = {
                "bare": partial(bare, teacher, ready),
                "end to end": partial(
                    label,
                    block_of(block, number),
                    [("teacher", teacher)],
                    out=folder / "labels",
                    crops=crops,
                    threads=threads,
                    batch_size=BATCH,
                ),
                "plain": partial(plain, teacher, block, crops, folder),
            }
            for name, run in work.items():
                before = clock()
                run()
                after = clock()
                if number:  # the first block warms up
                    ways[name].append((after[0] - before[0], after[1] - before[1]))
    print(f"{maps} maps of {len(blocks) - 1} blocks of {per_block} photos, {DEFAULT_CODEC}, {threads} threads")
    for name, times in ways.items():
        wall, cpu = (sum(column) / len(times) / per_block for column in zip(*times, strict=True))
        ratio = statistics.median(theirs[0] / ours[0] for theirs, ours in zip(ways["bare"], times, strict=True))
        ratio_cpu = statistics.median(theirs[1] / ours[1] for theirs, ours in zip(ways["bare"], times, strict=True))
        print(
            f"{name:12}{1 / wall:8.3f} images/s  {100 * ratio:6.1f} % of the bare teacher's; "
            f"{cpu:6.2f} s of processor per image, of which the teacher's is {100 * ratio_cpu:5.1f} %"
        )


# --- by stage ---------------------------------------------------------------------------------------------------------


def timed(name: str, work, items) -> list:
    start, cpu = time.perf_counter(), time.process_time()
    results = [work(item) for item in items]
    spent, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{name:34}{1e3 * spent / len(results):9.1f} ms each, {1e3 * cpu / len(results):8.1f} of processor")
    return results


def stages(teacher: TeacherLike, entries: list[Entry], settings: CropSettings) -> None:
    """Every stage alone, on one thread, per photo."""
    photos = [p for p in timed("read and decode", lambda e: e.load(), entries) if min(p.rgb.shape[1:]) >= 644]
    jobs = timed("cut region and patches", lambda p: prepare(p, crops=settings), photos)
    print(f"{'patches per region':34}{np.mean([len(j.patches) for j in jobs]):9.1f}")
    crops = [[crop.float() / 255 for crop in (job.region, *job.patches)] for job in jobs]
    timed("the teacher", lambda several: bare(teacher, several), crops)
    samples = [label_photo(p, [("teacher", teacher)], crops=settings) for p in photos]
    members = timed(f"encode ({DEFAULT_CODEC})", encode_sample, samples)
    timed("encode (png16)", partial(encode_sample, codec="png16"), samples)
    size = np.mean([sum(len(d) for n, d in m if not n.endswith(("jpg", "json"))) for m in members])
    whole = np.mean([sum(len(d) for _, d in m) for m in members])
    pixels = np.mean([settings.size**2 * (1 + len(j.patches)) for j in jobs])
    print(f"{'size':34}{whole / 1e6:9.2f} MB per image, maps {8 * size / pixels:.2f} bits per pixel")


def feeding(shards: list[InputShard], settings: CropSettings) -> None:
    """Labelling with a teacher that costs nothing: what the rest can feed; then reading the labels back."""
    with tempfile.TemporaryDirectory() as temporary:
        for threads in (1, 2, 4):
            out = Path(temporary) / f"out{threads}"
            start = time.perf_counter()
            outcome = label(
                shards, [("formula", Formula())], out=out, crops=settings, labels=LabelSettings(threads=threads)
            )
            rate = outcome.images / (time.perf_counter() - start)
            print(f"label, no teacher, {threads} threads {rate:13.2f} images/s")
        dataset = LabelDataset(out)
        read = timed("read a sample", dataset.__getitem__, range(min(len(dataset), 24)))
        timed("collate 8", collate, [read[:8]])
        start = time.perf_counter()
        problems = verify(out)
        rate = len(dataset) / (time.perf_counter() - start)
        print(f"verify {rate:35.2f} samples/s, {len(problems)} problems")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars", nargs="*")
    parser.add_argument("--weights", default="pocket")
    parser.add_argument("--encoder-weights")
    parser.add_argument("--no-teacher", action="store_true")
    parser.add_argument("--photos", type=int, default=12)
    parser.add_argument("--per-block", type=int, default=3)
    parser.add_argument("--patches", type=int, default=2, help="random patches per region; 0: the grid of the recipe")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    settings = CropSettings(num_patches=given.patches, patches="random") if given.patches else CropSettings()
    with tempfile.TemporaryDirectory() as temporary:
        tars = given.tars or [make_tar(Path(temporary) / "sa_0.tar", given.photos)]
        shards = sources.tars(tars)
        entries = [entry for shard in shards for entry in shard.scan().entries][: given.photos]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(f"{device}, {torch.get_num_threads()} torch threads, batches of {BATCH}")
        if given.no_teacher:
            feeding(block_of(entries, 0), settings)
            return
        teacher = Teacher.load(given.weights, device=device, native_size=560, encoder_weights=given.encoder_weights)
        compare(teacher, entries, settings, given.threads, given.per_block)
        stages(teacher, entries[: given.per_block], settings)


if __name__ == "__main__":
    main()
