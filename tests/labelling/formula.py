"""A teacher with known output, tars to label, and labelling runs with them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from distill.core.depth import DepthMap, Kind
from distill.data import sources
from distill.labelling import worker
from distill.labelling.meeting import Folder
from distill.labelling.run import CropSettings, LabelSettings, label
from distill.teachers import Card
from tests.data.pictures import encoded, pack, picture

CROPS = CropSettings(size=16, min_side=20, patch_size=12)


@dataclass
class Formula:
    """A teacher with known output: depth = 1 + red + green, invalid where blue is at least 0.9."""

    kind: Kind = Kind.SCALE_DEPTH
    wait: float = 0.0
    seeded: bool = False
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.card = Card(
            name="formula",
            weights="none",
            kind=self.kind,
            licence="MIT",
            code_licence="MIT",
            commercial=True,
            seeded=self.seeded,
        )

    def predict(self, images):
        self.sizes.append(len(images))
        time.sleep(self.wait)
        return DepthMap(1 + images[:, 0] + images[:, 1], images[:, 2] < 0.9, self.kind)


def make_tar(path: Path, count=7, first=0, *, bad=()) -> Path:
    members = [("./readme.txt", b"1")] if bad else []
    for i in range(first, first + count):
        data = b"<html>" if i in bad else encoded(picture(30 + i % 3, 40, seed=i), quality=95)
        members += [(f"./sa_{i}.jpg", data), (f"./sa_{i}.json", b"{}")]
    return pack(path, members)


def two_tars(folder: Path):
    """sa_0.tar with a text file and seven photos, one of them bad; sa_1.tar with three."""
    make_tar(folder / "sa_0.tar", bad=(2,))
    make_tar(folder / "sa_1.tar", count=3, first=7)
    return sources.tars(str(folder / "sa_{0..1}.tar"))


def run(sources_, out, teacher=None, **options):
    crops = replace(options.pop("crops", CROPS), crops_per_image=options.pop("crops_per_image", 2))
    label_options = {f.name: options.pop(f.name) for f in fields(LabelSettings) if f.name in options}
    labels = LabelSettings(**({"samples_per_part": 4} | label_options))
    return label(sources_, [("formula", teacher or Formula())], out=out, crops=crops, labels=labels, **options)


def one_of_several(root: Path, out: Path, rank: int, world: int, wait: float) -> None:
    """The work of one of several processes: labels the `two_tars` of `root`."""
    torch.set_num_threads(1)
    tars = sources.tars(str(root / "sa_{0..1}.tar"))
    run(tars, out, Formula(wait=wait), rank=rank, world=world, threads=2)


LEASE = 0.4


def work(sources_, out, teacher=None, *, lease_s=LEASE, meeting=None, **options):
    label_options = {f.name: options.pop(f.name) for f in fields(LabelSettings) if f.name in options}
    labels = LabelSettings(**({"samples_per_part": 4, "threads": 1} | label_options))
    crops = replace(CROPS, crops_per_image=options.pop("crops_per_image", 2))
    place = meeting or Folder(Path(out), lease_s=lease_s)
    arguments = {"out": out, "crops": crops, "labels": labels, "meeting": place, "poll_s": 0.03, **options}
    return worker.work(sources_, [("formula", teacher or Formula())], **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of the folder, by name; its only subfolder may be the one with the workers' spent.json."""
    assert all([*path.iterdir()] == [path / "spent.json"] for path in folder.iterdir() if path.is_dir())
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@dataclass
class Broken(Formula):
    error: BaseException = field(default_factory=lambda: RuntimeError("no kernel image"))

    def predict(self, images):
        raise self.error
