"""Features of a frozen encoder for labelled regions, computed once and stored: a decoder then trains without it.

    <folder>/features_00000.tar    per sample key K, readable by plain webdataset:
        K.patches.npy               the four patch maps (4,C,h,w) float16
        K.cls.npy                   the four class tokens (4,C) float16
        K<MIRRORED>.patches.npy     the same of the mirrored region, if the run mirrors
    <folder>/features_00000.json   the offset of each sample
    <folder>/features.json         the list of tars: written last, its existence means that all features are there

A tar is written under a temporary name, synced and renamed; a stopped run continues with the next tar. A region of S
pixels takes 16 C (S / patch)^2 bytes with its mirror image: 0.4 MB for a ViT-S/14 at 112, 9.8 MB at 560.

Shapes: B regions, C channels of the encoder, h, w its token grid.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.core import files
from distill.core.division import unit_range
from distill.core.progress import Report
from distill.shards.codec import VERSION
from distill.shards.handles import OpenTars
from distill.shards.shards import ShardWriter, members_of, read_json, shard_index

DONE = "features.json"
MIRRORED = "_mirrored"
PER_TAR = 256
REPAIR_FEATURES = "delete its folder: the next training computes it again"

Features = list[tuple[Tensor, Tensor]]
"""Four (patch map, class token) pairs, as an encoder returns them."""
StackedFeatures = tuple[tuple[Tensor, Tensor], ...]
"""The same for a batch: (patch map (B,C,h,w), class token (B,C)) pairs."""


def write_features(
    folder: Path,
    keys: Sequence[str],
    image_of: Callable[[int], Tensor],
    encode: Callable[[Tensor], Features],
    *,
    mirrored: bool,
    facts: dict[str, Any],
    batch_size: int = 16,
    report: Report | None = None,
) -> None:
    """Store the features of every sample, continuing after the tars that exist.

    image_of: a sample's number -> its region (3,S,S) uint8; all of one size. encode: images (B,3,S,S) float32 in [0,1]
    -> four (patch map (B,C,h,w), class token (B,C)). mirrored: also of the mirrored regions. facts: what the features
    depend on. Raises ValueError for a feature that float16 cannot hold, OSError if a write fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tars = []
    for number, start in enumerate(range(0, len(keys), PER_TAR)):
        path = folder / f"features_{number:05d}.tar"
        if not (path.is_file() and path.with_suffix(".json").is_file()):
            chosen = range(start, min(start + PER_TAR, len(keys)))
            with ShardWriter(path) as writer:
                for batch in (chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)):
                    images = unit_range(torch.stack([image_of(index) for index in batch]))
                    _add(writer, [keys[index] for index in batch], encode(images), "")
                    if mirrored:
                        _add(writer, [keys[index] for index in batch], encode(images.flip(-1)), MIRRORED)
                    if report:
                        report(batch[-1] + 1, len(keys))
                table = {"version": VERSION, "tar": writer.close(), "samples": writer.index}
                files.write_json(path.with_suffix(".json"), table, indent=None)
                writer.publish()
        tars.append(read_json(path.with_suffix(".json"))["tar"])
    files.write_json(folder / DONE, {"version": VERSION, "mirrored": mirrored, "tars": tars, **facts})


def _add(writer: ShardWriter, keys: Sequence[str], features: Features, suffix: str) -> None:
    patches = torch.stack([patch for patch, _ in features], 1).to(torch.float16).cpu()  # (B,4,C,h,w)
    tokens = torch.stack([cls for _, cls in features], 1).to(torch.float16).cpu()
    if not (torch.isfinite(patches).all() and torch.isfinite(tokens).all()):
        raise ValueError(
            f"features of {keys[0]} or one beside it do not fit into 16 bits: set train.cache_features = false"
        )
    for key, patch, cls in zip(keys, patches, tokens, strict=True):
        name = key + suffix
        writer.add(name, [(f"{name}.patches.npy", _npy(patch)), (f"{name}.cls.npy", _npy(cls))])


def _npy(values: Tensor) -> bytes:
    out = io.BytesIO()
    np.save(out, values.numpy(), allow_pickle=False)
    return out.getvalue()


class FeatureStore:
    """Random access to stored features by sample key. Can be forked or pickled to DataLoader workers.

    Raises FileNotFoundError or OSError, naming the file, for an unfinished or damaged folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / DONE).is_file():
            raise FileNotFoundError(f"{folder} has no finished features: train again, which goes on with them")
        self.facts = read_json(folder / DONE)
        self.places: dict[str, tuple[str, int, int]] = {}
        for tar in self.facts["tars"]:
            path = folder / tar["name"]
            if not path.is_file() or path.stat().st_size != tar["bytes"]:
                raise OSError(f"{path} is missing or damaged; {REPAIR_FEATURES}")
            for key, start, size in shard_index(path):
                self.places[key] = (tar["name"], start, size)
        self._open_tars = OpenTars(folder)

    def get(self, key: str, *, mirrored: bool = False) -> Features:
        """Four (patch map (C,h,w), class token (C,)) pairs, float16, of a sample or of its mirror image."""
        name = key + (MIRRORED if mirrored else "")
        if name not in self.places:
            raise LookupError(f"{self.folder} has no features of {name}; {REPAIR_FEATURES}")
        tar, start, size = self.places[name]
        where = f"{self.folder / tar}:{name}"
        members = members_of(self._open_tars.read(tar, start, size), where, remedy=REPAIR_FEATURES)
        try:
            patches, tokens = (
                torch.from_numpy(np.load(io.BytesIO(members[part]), allow_pickle=False))
                for part in ("patches.npy", "cls.npy")
            )
        except (KeyError, ValueError, EOFError) as error:
            raise OSError(f"{where} is damaged ({error}); {REPAIR_FEATURES}") from error
        return list(zip(patches, tokens, strict=True))


def stacked(samples: Sequence[Features | None]) -> StackedFeatures | None:
    """Stack the features of single regions into those of a batch; None if there are none."""
    present = [features for features in samples if features is not None]
    levels = zip(*present, strict=True)
    return tuple((torch.stack([p for p, _ in level]), torch.stack([c for _, c in level])) for level in levels) or None


def moved(features: StackedFeatures | None, device: torch.device) -> StackedFeatures | None:
    """The same features on another device; copies from pinned memory are asynchronous."""
    if features is None:
        return None
    return tuple((p.to(device, non_blocking=True), c.to(device, non_blocking=True)) for p, c in features)
