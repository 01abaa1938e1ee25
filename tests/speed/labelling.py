"""How fast labels are made and read, without a network: `python -m tests.speed.labelling [TAR ...]`.

Without arguments it makes a tar of noisy photographs of SA-1B's size. Prints images/s, MB per image and where the time
goes; the teacher is a formula, so what is seen is the cost of everything but the teacher.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill import sources
from distill.annotate import prepare
from distill.codec import encode_sample
from distill.crops import generator, resize
from distill.depth import DepthMap, Kind
from distill.label import CropSettings, label, label_photo
from distill.shards import LabelDataset, collate, verify
from teachers import Card


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


def timed(name: str, work, items) -> list:
    start = time.perf_counter()
    results = [work(item) for item in items]
    print(f"{name:34s} {1e3 * (time.perf_counter() - start) / len(results):8.1f} ms each")
    return results


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        tars = sys.argv[1:] or [make_tar(Path(temporary) / "sa_0.tar")]
        shards = sources.tars(tars)
        start = time.perf_counter()
        entries = [entry for shard in shards for entry in shard.scan().entries][:12]
        print(f"scan of {len(shards)} tars               {1e3 * (time.perf_counter() - start):8.1f} ms")
        settings = CropSettings()
        photos = [p for p in timed("read and decode", lambda e: e.load(), entries) if min(p.rgb.shape[1:]) >= 644]
        jobs = timed("cut region and patches", lambda p: prepare(p, crops=settings), photos)
        print(f"patches per region                {np.mean([len(j.patches) for j in jobs]):8.1f}")
        teachers = [("formula", Formula())]
        samples = timed("cut, ask, convert", lambda p: label_photo(p, teachers, crops=settings), photos)
        members = timed("encode", encode_sample, samples)
        print(
            f"size                              {np.mean([sum(len(d) for _, d in m) for m in members]) / 1e6:8.2f} MB"
        )
        for threads in (1, 2, 4):
            out = Path(temporary) / f"out{threads}"
            start = time.perf_counter()
            outcome = label(shards, teachers, out=out, crops=settings, threads=threads)
            rate = outcome.images / (time.perf_counter() - start)
            print(f"label, {threads} threads                  {rate:8.2f} images/s")
        dataset = LabelDataset(out)
        read = timed("read a sample", dataset.__getitem__, range(min(len(dataset), 24)))
        timed("collate 8", collate, [read[:8]])
        start = time.perf_counter()
        problems = verify(out)
        rate = len(dataset) / (time.perf_counter() - start)
        print(f"verify                            {rate:8.2f} samples/s, {len(problems)} problems")


if __name__ == "__main__":
    main()
