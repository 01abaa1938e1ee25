"""One sample: what it holds, how several make a batch, and how it becomes bytes and comes back.

As bytes it is a jpg of the region, 16-bit PNGs of its labels and a json that explains them; see distill.shards.

Shapes: S region size, N patches per region, P patch size.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.depth import DepthMap, Kind, cat
from distill.labels import Batch, Labels

VERSION = 1
CODEC = "png16"
_CODES = 65534  # steps between code 1 and code 65535; code 0 is an invalid pixel
# Paeth with moderate deflate is a fifth smaller than the fastest setting, at 14 ms against 6 for 560 x 560.
_PNG = (
    *(cv2.IMWRITE_PNG_COMPRESSION, 3, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT),
    *((cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_PAETH) if hasattr(cv2, "IMWRITE_PNG_FILTER") else ()),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One region with every teacher's labels of it.

    key: `<image key>-<draw>`. image: (3,S,S) uint8. labels: by teacher, with a batch of one: shared (1,S,S), local
    (N,P,P) or None, boxes (1,N,4). record: the sample's json (crop, patches, origin, seed, ...).
    """

    key: str
    image_key: str
    image: Tensor
    labels: dict[str, Labels]
    record: dict[str, Any] = field(default_factory=dict)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples as one batch, padded to the largest number of patches as `labels.Labels` documents.

    Where a teacher's kinds differ in what is known (measured and rendered truth), the batch has what is known of all.
    Raises ValueError where samples have different teachers or sizes, KindError where depth meets disparity.
    """
    names = list(samples[0].labels)
    for sample in samples:
        if sorted(sample.labels) != sorted(names) or sample.image.shape != samples[0].image.shape:
            raise ValueError(
                f"{sample.key} and {samples[0].key} do not go into one batch: they have labels by "
                f"{', '.join(sample.labels)} and {', '.join(names)}, sizes {tuple(sample.image.shape)} and "
                f"{tuple(samples[0].image.shape)}"
            )
    images = torch.stack([sample.image for sample in samples]).float() / 255.0
    return Batch(
        tuple(sample.key for sample in samples),
        images,
        {name: _stack([sample.labels[name] for sample in samples]) for name in names},
    )


def _stack(labels: Sequence[Labels]) -> Labels:
    kind = max((one.shared.kind for one in labels), key=lambda k: ("metric", "scale", "affine").index(k.unknown))
    if len({one.shared.kind.quantity for one in labels}) > 1:
        cat([one.shared for one in labels])  # raises, naming the kinds
    shared = cat([one.shared.convert(kind) for one in labels])
    counts = [0 if one.local is None else len(one.local) for one in labels]
    most = max(counts)
    if most == 0:
        return Labels(shared, None, torch.zeros(len(labels), 0, 4))
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    patch = next(one.local.values.shape[1:] for one in labels if one.local is not None and len(one.local))
    maps, boxes = [], []
    for one, count in zip(labels, counts, strict=True):
        if one.local is not None and count:
            maps.append(one.local.convert(kind))
        if count < most:
            empty = torch.zeros(most - count, *patch)
            maps.append(DepthMap(empty, torch.zeros_like(empty, dtype=torch.bool), kind))
        spare = one.boxes[0, :1] if count else whole
        boxes.append(torch.cat([one.boxes[0], spare.expand(most - count, 4)]))
    return Labels(shared, cat(maps), torch.stack(boxes))


def encode_map(values: Tensor, valid: Tensor) -> tuple[bytes, dict[str, float | int]]:
    """A map (H,W) as a 16-bit grey PNG and its range {"low", "high", "valid" (a count)}.

    Code 0 is an invalid or non-finite pixel; codes 1 to 65535 run from low to high, so that no value is off by more
    than (high - low) / 131068. A constant map is all code 1; a map without a valid pixel has low = high = 0.
    """
    array = values.detach().cpu().double().numpy()
    usable = valid.cpu().numpy() & np.isfinite(array)
    count = int(usable.sum())
    low, high = (float(array[usable].min()), float(array[usable].max())) if count else (0.0, 0.0)
    scale = _CODES / (high - low) if high > low else 0.0
    codes = np.where(usable, np.rint((np.where(usable, array, low) - low) * scale) + 1, 0).astype(np.uint16)
    done, png = cv2.imencode(".png", codes, _PNG)
    assert done, "OpenCV refused to encode a 16-bit PNG"
    return png.tobytes(), {"low": low, "high": high, "valid": count}


def decode_map(png: bytes, span: Mapping[str, float | int], *, where: str = "map") -> tuple[Tensor, Tensor]:
    """The values (H,W) float32, zero where invalid, and the valid (H,W) bool that `encode_map` stored.

    Raises OSError naming `where` for a PNG that does not decode.
    """
    codes = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED) if png else None
    if codes is None or codes.dtype != np.uint16 or codes.ndim != 2:
        raise OSError(f"{where} is damaged: not a 16-bit grey PNG. Delete its tar and label again, or run verify")
    low, high = float(span["low"]), float(span["high"])
    # A table, made in float64: low may be large against the range.
    table = low + np.arange(-1, _CODES + 1, dtype=np.float64) * ((high - low) / _CODES)
    table[0] = 0.0
    return torch.from_numpy(table.astype(np.float32)[codes]), torch.from_numpy(codes > 0)


def encode_sample(sample: Sample) -> list[tuple[str, bytes]]:
    """The tar members of a sample, in their order. Its record must have "image", "crop" and "patches"."""
    picture = io.BytesIO()
    pixels = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
    Image.fromarray(pixels).save(picture, "JPEG", quality=95, subsampling=0)
    members = [(f"{sample.key}.jpg", picture.getvalue())]
    described = {}
    for name, labels in sample.labels.items():
        png, span = encode_map(labels.shared.values[0], labels.shared.valid[0])
        members.append((f"{sample.key}.{name}.shared.png", png))
        local = []
        for i in range(0 if labels.local is None else len(labels.local)):
            assert labels.local is not None
            png, patch_span = encode_map(labels.local.values[i], labels.local.valid[i])
            members.append((f"{sample.key}.{name}.local{i}.png", png))
            local.append(patch_span)
        before = sample.record.get("labels", {}).get(name, {})
        described[name] = {**before, "kind": str(labels.shared.kind), "shared": span, "local": local}
    record = {**sample.record, "version": VERSION, "key": sample.key, "codec": CODEC, "labels": described}
    members.append((f"{sample.key}.json", dump_json(record)))
    return members


def decode_sample(members: Mapping[str, bytes], *, where: str, teachers: Sequence[str] | None = None) -> Sample:
    """A sample from its members, by what follows the key: "jpg", "json", "<teacher>.shared.png", ...

    teachers: the ones to decode (None: all). Raises OSError for damage, ValueError for a newer version or another
    codec, LookupError for a teacher that is not there; each names `where`.
    """
    try:
        record = json.loads(members["json"])
        check_version(record, where)
        crop, described = record["crop"], record["labels"]
        if record["codec"] != CODEC:
            raise ValueError(f"{where} has labels in codec {record['codec']!r}; this version reads {CODEC!r}")
        names = list(described) if teachers is None else list(teachers)
        unknown = [name for name in names if name not in described]
        if unknown:
            raise LookupError(f"{where} has no labels by {unknown[0]}; it has {', '.join(described)}")
        boxes = torch.tensor(
            [[t, left, t + side, left + side] for t, left, side in record["patches"]], dtype=torch.float32
        )
        boxes = boxes.reshape(1, -1, 4) / crop["side"]
        with Image.open(io.BytesIO(members["jpg"]), formats=("JPEG",)) as picture:
            pixels = np.array(picture)
        labels = {name: _decode_labels(members, name, described[name], boxes, where) for name in names}
        return Sample(record["key"], record["image"]["key"], torch.from_numpy(pixels).permute(2, 0, 1), labels, record)
    except (KeyError, json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise OSError(f"{where} is damaged: {error} is missing or unreadable; run verify on the folder") from error
    except (OSError, SyntaxError) as error:
        raise OSError(str(error) if where in str(error) else f"{where} is damaged: {error}") from error


def _decode_labels(members: Mapping[str, bytes], name: str, said: dict[str, Any], boxes: Tensor, where: str) -> Labels:
    kind = Kind(said["kind"])
    values, valid = decode_map(members[f"{name}.shared.png"], said["shared"], where=f"{where} {name}.shared")
    local = [
        decode_map(members[f"{name}.local{i}.png"], span, where=f"{where} {name}.local{i}")
        for i, span in enumerate(said["local"])
    ]
    patches = DepthMap(torch.stack([v for v, _ in local]), torch.stack([v for _, v in local]), kind) if local else None
    return Labels(DepthMap(values[None], valid[None], kind), patches, boxes if local else boxes[:, :0])


def check_version(record: Mapping[str, Any], where: str | Path) -> None:
    """Raise ValueError where `record` was written by a newer version, or not by us."""
    version = record.get("version")
    if not isinstance(version, int):
        raise ValueError(f"{where} has no version: not written by distill label")
    if version > VERSION:
        raise ValueError(f"{where} has format version {version}; this distill reads up to {VERSION}: upgrade it")


def dump_json(value: Any) -> bytes:
    """JSON with sorted keys: equal content, equal bytes. NaN is refused."""
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
