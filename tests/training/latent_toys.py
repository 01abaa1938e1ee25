"""A latent network with few parameters, images labelled by ground truth or by a network, and a training run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from distill.core.depth import DepthMap, Kind
from distill.core.labels import Batch, Labels, Supervision
from distill.losses.latent_settings import LatentSettings
from distill.training.batches import MicroBatch, TaughtRows
from distill.training.latent import LatentTask
from distill.training.latent_cache import LatentCache
from distill.training.train import train
from tests.training import toys

SIZE, FACTOR = 16, 4


class Network(nn.Module):
    """A student like LatentStudent: `unet` is trained; encoder and decoder are not trained nor part of the state."""

    head = None
    factor = FACTOR

    def __init__(self, *, kind: Kind = Kind.AFFINE_DEPTH, channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.unet = nn.Sequential(nn.Conv2d(channels + 1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1))
        self.kind = kind
        self.alphas = torch.linspace(0.999, 0.005, 1000)
        self.encoded, self.asked = 0, []

    def encode(self, images):
        self.encoded += len(images)
        small = F.avg_pool2d(images, FACTOR)
        return torch.cat([small, small.mean(1, keepdim=True)], 1) * 2 - 1

    def encode_maps(self, maps):
        return self.encode(((maps + 1) / 2)[:, None].expand(-1, 3, -1, -1))

    def decode(self, latents):
        return F.interpolate(latents.mean(1, keepdim=True), scale_factor=FACTOR)[:, 0]

    def forward(self, inputs, timesteps=None):
        if timesteps is None:  # called with images, to check that the output depends on every parameter
            return self.unet(torch.cat([self.encode(inputs), self.encode(inputs)[:, :1]], 1)).mean(1)
        self.asked.append(timesteps.tolist())
        time = (timesteps.float() / 100).reshape(-1, 1, 1, 1).expand(-1, 1, *inputs.shape[-2:])
        return self.unet(torch.cat([inputs, time], 1))


def labels_of(values: torch.Tensor, teacher: str) -> Labels:
    """Ground truth in metres, invalid in a corner, or a network's disparity."""
    truth = teacher == "truth"
    kind = Kind.METRIC_DEPTH if truth else Kind.AFFINE_DISPARITY
    valid = torch.ones_like(values, dtype=torch.bool)
    if truth:
        valid[:, :3, :3] = False
    return Labels(
        DepthMap(values, valid, kind),
        None,
        torch.zeros(len(values), 0, 4),
        supervision=Supervision(teacher, kind, truth),
    )


class Photos:
    """Every second image has ground truth, the others a network's labels."""

    def __init__(self, count: int = 16) -> None:
        self.image_keys = [f"image{i}" for i in range(count)]
        self.sources = [i % 2 for i in range(count)]

    def __len__(self) -> int:
        return len(self.image_keys)

    def teachers_of(self, index: int):
        return (("truth", "dav2")[index % 2],)

    def get(self, index: int, teachers, *, visit=None):
        image = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(index))
        return self.image_keys[index], image, teachers[0]


def collate(samples) -> Batch:
    keys, images, teachers = zip(*samples, strict=True)
    batch = torch.stack(images)
    return Batch(keys, batch, {teachers[0]: labels_of(batch[:, 0] * 5 + 1, teachers[0])})


def run(out: Path, *, cache: Path | None = None, latent: dict | None = None, report=None, kept=None, **given):
    """The result of a run of FiffDepth's task, and its network."""
    network = Network(channels=8 if (latent or {}).get("method") == "denoise" else 4)
    settings = toys.settings(
        **{
            "steps": 6, "batch_size": 4, "warmup_steps": 1, "eval_every": 3, "save_every": 2, "val_fraction": 0.1,
            "kind": "affine_depth", "keep_unmet": True, "even_batches": True, "hflip": True,
            "teacher_shares": {"truth": 0.5, "dav2": 0.5}, **given,
        }
    )  # fmt: skip
    store = None if cache is None else LatentCache(cache, {"vae": "toy"})
    task = LatentTask(network, LatentSettings(**(latent or {})), 0, store)
    result = train(
        network, kept or Photos(), task, out=out, settings=settings, collate=collate, save=toys.save,
        report=report, device="cpu",
    )  # fmt: skip
    return result, network


def micro(count: int = 4, *, first: int = 0) -> MicroBatch:
    """A micro-batch: even rows have ground truth, odd ones a network's labels."""
    images = torch.stack(
        [torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(first + i)) for i in range(count)]
    )
    rows = {"truth": torch.arange(0, count, 2), "dav2": torch.arange(1, count, 2)}
    taught = tuple(TaughtRows(r, labels_of(images[r, 0] * 5 + 1, name), name) for name, r in rows.items() if len(r))
    places = tuple(range(first, first + count))
    return MicroBatch(tuple(f"image{p}" for p in places), images, taught, places, (False,) * count)
