"""Damaged files, a part for each kind: each must be read correctly or refused in a line; all else counts as a fault.

A part is a generator; each step tries some dozens of inputs and counts the outcomes. "wrong" is the fault that no log
shows: an input that was accepted although data was lost, or with different content.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from distill.data import sources
from distill.data.maps import decode_map
from distill.data.photos import BadImageError, decode
from distill.eval.stored import read_prediction
from distill.shards import shards
from distill.students import checkpoint
from tests.chaos.lab import Lab
from tests.chaos.mutations import hostile_json, mutate
from tests.chaos.sweep import Counts, WrongError, sweep
from tests.data.pictures import encoded, pack, picture
from tests.students.tiny import tiny

STEP = 40

# --- photographs ------------------------------------------------------------------------------------------------------

FORMS = {
    "jpg": ("JPEG", {"quality": 90}),
    "progressive.jpg": ("JPEG", {"quality": 90, "progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "lossy.webp": ("WEBP", {"quality": 90}),
    "tif": ("TIFF", {}),
    "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}),
    "bmp": ("BMP", {}),
    "gif": ("GIF", {}),
    "ppm": ("PPM", {}),
}
_BLOCK = 8
LOST = 48.0
"""A difference of more grey levels over a block is not a codec's loss: pixels are missing."""


def photos(counts: Counts, rng: Random) -> Iterator[int]:
    """Pictures of every format; one that lost bytes must not decode to different pixels."""
    whole = {name: encoded(_busy(), form, **options) for name, (form, options) in FORMS.items()}
    right = {name: decode(data).float() for name, data in whole.items()}
    while True:
        items = []
        for _ in range(STEP):
            name = rng.choice(list(whole))
            damage, data = mutate(whole[name], rng)
            items.append((f"{name} {damage}", (name, damage.split()[0], data)))
        sweep(counts, items, partial(_photo, right))
        yield len(items)


def _busy() -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(60, 255, (12, 16, 3), dtype=np.uint8))
    return coarse.resize((128, 96), Image.Resampling.BICUBIC)


def _photo(right: dict[str, torch.Tensor], item: tuple[str, str, bytes]) -> None:
    name, kind, data = item
    got = decode(data).float()
    if kind not in ("cut", "nul") and not (name == "png" and kind in ("flip", "byte", "zeroed", "swap")):
        return  # most formats have no checksum: a flipped bit or a hole gives another valid picture
    if got.shape != right[name].shape:
        raise WrongError(f"{tuple(got.shape)}, not {tuple(right[name].shape)}")
    off = torch.nn.functional.avg_pool2d((got - right[name]).abs().mean(0, keepdim=True)[None], _BLOCK).max()
    if off > LOST:
        raise WrongError(f"a block of pixels is off by {float(off):.0f}")


# --- tars -------------------------------------------------------------------------------------------------------------


def tars(counts: Counts, rng: Random, folder: Path) -> Iterator[int]:
    """Tars of photographs: keys must be safe names, and a photograph must have the pixels of the one with its name."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {f"p{i}": encoded(picture(24 + i, 30, seed=i), "PNG") for i in range(5)}
    members: list[tuple[str, bytes]] = []
    for name, data in pictures.items():
        members += [(f"./{name}.png", data), (f"./{name}.json", b"{}")]
    whole = pack(folder / "whole.tar", members).read_bytes()
    right = {name: decode(data) for name, data in pictures.items()}
    while True:
        items: list[tuple[str, bytes]] = []
        for _ in range(STEP):
            items.append(_named_badly(rng, pictures) if rng.random() < 0.2 else mutate(whole, rng))
        sweep(counts, items, partial(_tar, folder / "tried.tar", right))
        yield len(items)


def _named_badly(rng: Random, pictures: dict[str, bytes]) -> tuple[str, bytes]:
    names = ("../p0.png", "/etc/p0.png", "a/../../p1.png", "\x1b[2Jp2.png", "p\n.png", "x" * 300 + ".png", "p0.png/")
    out, name = io.BytesIO(), rng.choice(names)
    with tarfile.open(fileobj=out, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as tar:
        for member, data in (*((f"{key}.png", data) for key, data in pictures.items()), (name, pictures["p0"])):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            info.type = rng.choice((tarfile.REGTYPE,) * 6 + (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE))
            info.linkname = "p1.png" if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return f"named {name!r}", out.getvalue()


def _tar(path: Path, right: dict[str, torch.Tensor], data: bytes) -> None:
    path.write_bytes(data)
    (shard,) = sources.tars(str(path))
    refused = 0
    for entry in shard.scan().entries:
        if "/" in entry.key or ".." in entry.key or not entry.key.isprintable():
            raise WrongError(f"the key {entry.key!r}")
        try:
            photo = entry.load()
        except BadImageError as error:
            refused += bool(str(error))
            continue
        known = next((name for name in right if entry.key == name), None)
        if known and not torch.equal(photo.rgb, right[known]):
            raise WrongError(f"{entry.key} has other pixels")
    if refused + len(shard.scan().rejected):
        raise ValueError("some are refused")


# --- stored maps ------------------------------------------------------------------------------------------------------


def predictions(counts: Counts, rng: Random, folder: Path) -> Iterator[int]:
    """Stored maps of every format that a library here writes; one that lost bytes must not give other values."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(1).uniform(1, 9, (24, 32)).astype(np.float32)
    whole = {"npy": _npy(values), "npz": _npz(values), "pfm": _pfm(values)}
    codes = (values * 1000).astype(np.uint16)
    whole |= {"png": encoded(Image.fromarray(codes), "PNG"), "tif": encoded(Image.fromarray(values), "TIFF")}
    right = {name: decode_map(data, name) for name, data in whole.items()}
    while True:
        items = []
        for _ in range(STEP):
            name = rng.choice(list(whole))
            damage, data = mutate(whole[name], rng)
            items.append((f"{name} {damage}", (name, damage.split()[0], data)))
        sweep(counts, items, partial(_map, folder, right))
        yield len(items)


def _npy(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def _npz(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, depth=values)
    return out.getvalue()


def _pfm(values: np.ndarray) -> bytes:
    height, width = values.shape
    return f"Pf\n{width} {height}\n-1.0\n".encode() + values[::-1].astype("<f4").tobytes()


def _map(folder: Path, right: dict[str, np.ndarray], item: tuple[str, str, bytes]) -> None:
    name, kind, data = item
    path = folder / f"m.{name}"
    path.write_bytes(data)
    got, _ = read_prediction(path, (24, 32))
    expected = right[name].astype(np.float32)
    exact = name in ("npz", "png")  # these carry checksums
    if (kind == "cut" or (exact and kind != "more")) and not np.array_equal(got, expected, equal_nan=True):
        raise WrongError("other numbers")


# --- what we write ----------------------------------------------------------------------------------------------------


def _tables_and_bytes(path: Path, rng: Random) -> tuple[str, bytes]:
    if path.suffix == ".json" and rng.random() < 0.4:
        return hostile_json(path.read_bytes(), rng)
    return mutate(path.read_bytes(), rng)


def _content(folder: Path) -> dict[str, bytes]:
    """The training data of a labels folder, as bytes by sample key."""
    dataset = shards.LabelDataset(folder)
    contents = {}
    for i in range(len(dataset)):
        sample = dataset[i]
        parts = [
            sample.image,
            *(x for labels in sample.labels.values() for x in (labels.shared.values, labels.shared.valid)),
        ]
        parts += [labels.boxes for labels in sample.labels.values()]
        contents[sample.key] = b"".join(part.numpy().tobytes() for part in parts)
    return contents


def labels(counts: Counts, rng: Random, lab: Lab) -> Iterator[int]:
    """A labels folder with one damaged file: only the written labels are read, and verify detects any change."""
    if not (lab.folder / "run").is_dir():
        done = lab.call("label", "r.toml")
        assert done.rc == 0, done.said
    right = _content(lab.labels)
    files = [path for path in sorted(lab.labels.iterdir()) if path.suffix in (".tar", ".json")]
    while True:
        items = []
        for _ in range(STEP // 2):
            path = rng.choice(files)
            damage, data = _tables_and_bytes(path, rng)
            items.append((f"{path.name} {damage}", (path.name, data)))
        sweep(counts, items, partial(_labels, lab.labels, lab.folder / "tried", right))
        yield len(items)


def _labels(good: Path, tried: Path, right: dict[str, bytes], item: tuple[str, bytes]) -> None:
    shutil.rmtree(tried, ignore_errors=True)
    shutil.copytree(good, tried)
    same = (tried / item[0]).read_bytes() == item[1]
    (tried / item[0]).write_bytes(item[1])
    refusal: Exception | None = None
    try:
        got = _content(tried)
        # A table that was edited together with its checksum may leave samples out.
        if any(right.get(key) != value for key, value in got.items()):
            raise WrongError("other labels are learnt from")
    except (ValueError, LookupError, OSError) as error:
        refusal = error
    try:
        problems = shards.verify(tried)
    except (ValueError, LookupError, OSError) as error:
        problems = [str(error)]
    if not problems and not same and (refusal or not item[0].endswith(".json")):
        raise WrongError(f"verify finds nothing; reading said {refusal}")
    if refusal or problems:
        raise ValueError(str(refusal or problems[0]))


def students(counts: Counts, rng: Random, folder: Path) -> Iterator[int]:
    """A student with one damaged file: its output is unchanged, or it is refused."""
    good = folder / "student"
    student = tiny("dpt")
    with torch.no_grad():
        right = student.eval()(torch.full((1, 3, 32, 32), 0.3))
    checkpoint.save(student, good, card={"name": "s", "licence": "MIT"})
    files = [good / checkpoint.DESCRIPTION, good / checkpoint.WEIGHTS]
    while True:
        items = []
        for _ in range(STEP):
            path = rng.choice(files)
            damage, data = _tables_and_bytes(path, rng)
            items.append((f"{path.name} {damage}", (path.name, damage, data)))
        sweep(counts, items, partial(_student, good, folder / "tried", right))
        yield len(items)


def _student(good: Path, tried: Path, right: torch.Tensor, item: tuple[str, str, bytes]) -> None:
    shutil.rmtree(tried, ignore_errors=True)
    shutil.copytree(good, tried)
    (tried / item[0]).write_bytes(item[2])
    student = checkpoint.load(tried)
    if item[1].startswith(("spec", "native_size", "output")):
        return  # an edit together with the checksum: another student
    with torch.no_grad():
        if not torch.equal(student(torch.full((1, 3, 32, 32), 0.3)), right):
            raise WrongError("it answers otherwise")


def run(counts: Counts, rng: Random, lab: Lab) -> Iterator[int]:
    """An interrupted training run with one damaged file: it ends with the same student, or says why not."""
    for verb in ("label", "train"):
        done = lab.call(verb, "r.toml")
        assert done.rc == 0, done.said
    right = (lab.train / "student" / checkpoint.WEIGHTS).read_bytes()
    shutil.rmtree(lab.train / "student")
    shutil.rmtree(max((lab.train / "checkpoints").iterdir()))
    backup = lab.keep()
    while True:
        lab.back(backup)
        path = rng.choice([path for path in sorted(lab.train.rglob("*")) if path.is_file()])
        damage, data = mutate(path.read_bytes(), rng)
        path.write_bytes(data)
        description = f"{path.relative_to(lab.train)} {damage}"
        outcome = lab.call("doctor", lab.train) if rng.random() < 0.3 else lab.call("train", "r.toml")
        weights = lab.train / "student" / checkpoint.WEIGHTS
        wrong = outcome.kind == "accepted" and weights.is_file() and weights.read_bytes() != right
        counts.add("wrong" if wrong else outcome.kind, description, outcome.said)
        yield 1
