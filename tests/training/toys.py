"""Shared by the tests of training: a student of 27 parameters, samples to train on, and a training run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distill.core.depth import DepthMap, Kind
from distill.core.labels import Batch, Labels
from distill.training import checkpoints
from distill.training.settings import TrainSettings
from distill.training.train import train
from distill.training.trainlog import WALL_CLOCK, read

SIZE = 8
KIND = Kind.AFFINE_DISPARITY


class Toy(nn.Module):
    """A student of 27 parameters."""

    def __init__(self, *, batchnorm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2) if batchnorm else nn.Identity(), nn.Tanh())
        self.decoder = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, images):
        return self.decoder(self.encoder(images))[:, 0]


class Forgetful(Toy):
    """A student with dropout."""

    def forward(self, images):
        return self.decoder(nn.functional.dropout(self.encoder(images), 0.5, self.training))[:, 0]


class Toys:
    """Samples of `per_image` draws of each image; labels by "primary" (a ramp of the image) and "assistant"."""

    def __init__(self, count: int = 24, *, per_image: int = 2, poisoned: int | None = None, teachers: int = 2) -> None:
        self.image_keys = [f"image{i // per_image}" for i in range(count)]
        self.sources = [0] * count
        self.poisoned, self.teachers = poisoned, ["primary", "assistant"][:teachers]

    def __len__(self) -> int:
        return len(self.image_keys)

    def teachers_of(self, index: int):
        return self.teachers

    def get(self, index: int, teachers, *, visit=None):
        key, image, maps = self[index]
        return key, image, {name: maps[name] for name in teachers}

    def __getitem__(self, index: int):
        image = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(index))
        primary = image[0] + 2 * image[1]
        if index == self.poisoned:
            primary = primary / 0
        maps = {"primary": primary, "assistant": image[2] - image[0]}
        return f"{self.image_keys[index]}-{index}", image, {name: maps[name] for name in self.teachers}


def collate(samples) -> Batch:
    keys, images, labels = zip(*samples, strict=True)
    boxes = torch.zeros(len(keys), 0, 4)

    def shared(name):
        values = torch.stack([maps[name] for maps in labels])
        return DepthMap(values, torch.ones_like(values, dtype=torch.bool), KIND)

    return Batch(keys, torch.stack(images), {name: Labels(shared(name), None, boxes) for name in labels[0]})


def l1(pred, labels, features=None, teacher_features=None):
    shared = labels.shared
    loss = (pred - shared.values).abs().mean((1, 2))
    return loss + 0.1 * pred.square().mean((1, 2)), {"shared": loss}


def save(student, folder, *, card):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone() for k, v in student.state_dict().items()}, folder / "model.safetensors")
    (folder / "student.json").write_text(json.dumps({"card": card}))


def settings(**given) -> TrainSettings:
    defaults = {
        "steps": 20,
        "batch_size": 8,
        "lr": 1e-2,
        "encoder_lr": 5e-3,
        "warmup_steps": 3,
        "workers": 0,
        "val_fraction": 0.2,
        "eval_every": 5,
        "save_every": 10,
        "trackers": (),
        "teacher_shares": {"primary": 0.7, "assistant": 0.3},
        "seed": 0,
        "hflip": False,
    }
    return TrainSettings(**(defaults | given))


def run(
    out: Path,
    *,
    student=None,
    dataset=None,
    objective=l1,
    report=None,
    heldout=None,
    keep=save,
    tell=None,
    device="cpu",
    **given,
):
    student = student or Toy()
    result = train(
        student,
        dataset or Toys(),
        objective,
        out=out,
        settings=settings(**given),
        collate=collate,
        heldout=heldout,
        save=keep,
        report=report,
        tell=tell,
        device=device,
    )
    return result, student


def steps_of(out: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in read(out / "log.jsonl")]


def losses_of(out: Path) -> list[float]:
    return [line["loss"] for line in steps_of(out) if "loss" in line]


def newest(out: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.find(out)[-1].folder / "training.safetensors")


def assert_same_run(out: Path, reference: Path) -> None:
    torch.testing.assert_close(losses_of(out), losses_of(reference), rtol=1e-5, atol=1e-6)
    for name, value in newest(reference).items():
        torch.testing.assert_close(newest(out)[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    heldout_losses = [[line["heldout"] for line in steps_of(o) if "heldout" in line] for o in (out, reference)]
    torch.testing.assert_close(*heldout_losses, rtol=1e-5, atol=1e-6)
