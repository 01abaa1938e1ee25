"""Samples with known maps, and a finished folder of them."""

from __future__ import annotations

import torch

from distill.core.depth import DepthMap, Kind
from distill.core.labels import Labels
from distill.shards.codec import MAX_ERROR, dump_json, encode_sample
from distill.shards.shards import (
    Sample,
    ShardWriter,
    hash_keys,
    write_manifest,
)

SIZE, PATCH = 16, 8


def depth_map(count, size, kind, seed) -> DepthMap:
    rng = torch.Generator().manual_seed(seed)
    valid = torch.rand(count, size, size, generator=rng) > 0.2
    values = torch.rand(count, size, size, generator=rng) * 3
    return DepthMap(torch.where(valid, values, torch.nan), valid, kind)


def make_sample(
    key="sa_1", draw=0, *, patches=3, teachers=("one", "two"), kind=Kind.AFFINE_DISPARITY, seed=0
) -> Sample:
    squares = [[2 * i, i, PATCH] for i in range(patches)]
    boxes = torch.tensor([[t, left, t + s, left + s] for t, left, s in squares]).float().reshape(1, -1, 4) / 20
    image = (torch.arange(3 * SIZE * SIZE).reshape(3, SIZE, SIZE) // 4).to(torch.uint8)
    labels = {}
    for number, name in enumerate(teachers):
        local = depth_map(patches, PATCH, kind, seed + 10 * number + 1) if patches else None
        labels[name] = Labels(depth_map(1, SIZE, kind, seed + 10 * number), local, boxes)
    record = {
        "image": {"key": key, "origin": f"a.tar:{key}.jpg", "height": 40, "width": 50},
        "crop": {"top": 1, "left": 2, "side": 20, "size": SIZE, "patch_size": PATCH, "draw": draw},
        "patches": squares,
        "seed": 0,
        "sky": None,
    }
    return Sample(f"{key}-{draw}", key, image, labels, record)


def write(folder, samples, *, name="sa_0-000.tar", sidecar=True, codec="jls"):
    """A finished labels folder with one tar."""
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder / name) as writer:
        for sample in samples:
            writer.add(sample.key, encode_sample(sample, codec=codec))
        tar_facts = writer.close()
        if sidecar:
            table = {"version": 1, "tar": tar_facts, "samples": writer.index, "part": 0, "of": 1}
            table |= {"images": [sample.image_key for sample in samples], "quarantine": [], "kinds": {}}
            (folder / name).with_suffix(".json").write_bytes(dump_json(table))
        writer.publish()
    keys = list(dict.fromkeys(s.image_key for s in samples))
    manifest = {
        "teachers": {name: {} for name in samples[0].labels},
        "shards": [tar_facts],
        "images": {"keys": keys, "count": len(keys), "sha256": hash_keys(keys)},
        "quarantine": [],
    }
    write_manifest(folder, manifest)
    return folder


def same_map(stored: DepthMap, wanted: DepthMap):
    usable = wanted.valid & torch.isfinite(wanted.values)
    assert torch.equal(stored.valid, usable) and stored.kind == wanted.kind
    for got, want, where in zip(stored.values, wanted.values, usable, strict=True):
        span = (want[where].max() - want[where].min()).item() if where.any() else 0.0
        assert (got - want)[where].abs().max().item() <= span * MAX_ERROR + 1e-6
        assert (got[~where] == 0).all()
