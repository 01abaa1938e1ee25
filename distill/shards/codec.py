"""Samples: their content, collation into batches, encoding and decoding.

An encoded sample is a jpg of the region, its labels in one of CODECS and a json that describes them; see shards.shards.
Only bytes with the right checksum reach a decoder: damaged ones make some decoders crash or take minutes.

Shapes: S region size, N patches per region, P patch size.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from distill.core.codes import LAST, CodedLabels, CodedMaps
from distill.core.depth import DepthMap, Kind, cat, least_known
from distill.core.division import unit_range
from distill.core.labels import DENSE, Batch, Labels, Supervision, stack_boxes
from distill.data.photos import DECODE_ERRORS
from distill.shards.codecs import CODECS as CODECS
from distill.shards.codecs import DEFAULT_CODEC as DEFAULT_CODEC
from distill.shards.codecs import MAX_ERROR as MAX_ERROR
from distill.shards.codecs import Codes

VERSION = 1
REPAIR = "run `distill verify --repair` on its folder"


@dataclass(frozen=True, slots=True)
class Sample:
    """One region with every teacher's labels of it.

    key: `<image key>-<draw>`. image: (3,S,S) uint8. labels: by teacher, as a batch of one: shared (1,S,S), local
    (N,P,P) or None, boxes (1,N,4). record: the sample's json (crop, patches, origin, seed, ...). coded: labels whose
    maps are still codes, on their way to or from a device; each teacher is in one of the two.
    """

    key: str
    image_key: str
    image: Tensor
    labels: dict[str, Labels]
    record: dict[str, Any] = field(default_factory=dict)
    coded: dict[str, CodedLabels] = field(default_factory=dict)

    @property
    def answers(self) -> dict[str, Labels | CodedLabels]:
        """All labels, in the order of the teachers."""
        all_labels: dict[str, Labels | CodedLabels] = {**self.labels, **self.coded}
        return {name: all_labels[name] for name in self.record.get("labels", all_labels) if name in all_labels}


def collate(samples: Sequence[Sample]) -> Batch:
    """Collate samples into a batch, padded to the largest number of patches as `labels.Labels` documents.

    If a teacher's kinds differ in what is known (measured and rendered truth), the batch has the least known one.
    Raises ValueError if teachers or sizes differ between samples, KindError if depth and disparity are mixed.
    """
    names = common_teachers(samples, [sample.labels for sample in samples])
    images = unit_range(torch.stack([sample.image for sample in samples]))
    return Batch(
        tuple(sample.key for sample in samples),
        images,
        {name: _stack([sample.labels[name] for sample in samples]) for name in names},
    )


def common_teachers(samples: Sequence[Sample], labels: Sequence[Mapping[str, object]]) -> list[str]:
    """The teachers whose `labels` every one of the samples has; ValueError if teachers or sizes of images differ."""
    names, shape = list(labels[0]), samples[0].image.shape
    for sample, own in zip(samples, labels, strict=True):
        if sorted(own) != sorted(names) or sample.image.shape != shape:
            raise ValueError(
                f"{sample.key} and {samples[0].key} cannot be in one batch: they have labels by {', '.join(own)} and "
                f"{', '.join(names)}, sizes {tuple(sample.image.shape)} and {tuple(shape)}"
            )
    return names


def _stack(labels: Sequence[Labels]) -> Labels:
    kind = least_known(region.shared.kind for region in labels)
    if len({region.shared.kind.quantity for region in labels}) > 1:
        cat([region.shared for region in labels])  # raises, naming the kinds
    shared = cat([region.shared.convert(kind) for region in labels])
    supervision = replace(labels[0].supervision, kind=kind, truth=all(region.supervision.truth for region in labels))
    counts = [0 if region.local is None else len(region.local) for region in labels]
    max_patches = max(counts)
    if max_patches == 0:
        return Labels(shared, None, torch.zeros(len(labels), 0, 4), supervision=supervision)
    patch_shape = next(
        region.local.values.shape[1:] for region in labels if region.local is not None and len(region.local)
    )
    maps = []
    for region, count in zip(labels, counts, strict=True):
        if region.local is not None and count:
            maps.append(region.local.convert(kind))
        if count < max_patches:
            padding = torch.zeros(max_patches - count, *patch_shape)
            maps.append(DepthMap(padding, torch.zeros_like(padding, dtype=torch.bool), kind))
    boxes = stack_boxes([region.boxes for region in labels], max_patches)
    return Labels(shared, cat(maps), boxes, supervision=supervision)


def encode_map(values: Tensor, valid: Tensor, *, codec: str = DEFAULT_CODEC) -> tuple[bytes, dict[str, float | int]]:
    """Encode a map (H,W); returns the bytes and its range {"low", "high", "valid" (a count)}.

    Non-finite pixels are invalid. The error of a value is at most CODECS[codec].bound of high - low, plus the rounding
    to float32; the valid mask is exact. A constant map is exact; one without a valid pixel has low = high = 0.
    """
    array = values.detach().cpu().double().numpy()
    usable = valid.cpu().numpy() & np.isfinite(array)
    count = int(usable.sum())
    all_valid = count == array.size
    valid_values = array if all_valid else array[usable]
    low, high = (float(valid_values.min()), float(valid_values.max())) if count else (0.0, 0.0)
    scale = 1.0 / (high - low) if high > low else 0.0
    # One buffer, reused in place: fresh memory costs more than the arithmetic, and many threads allocate at once.
    unit = array - low if all_valid else np.subtract(array, low, out=np.zeros_like(array), where=usable)
    unit *= scale
    np.clip(unit, 0.0, 1.0, out=unit)
    spec = CODECS[codec]
    return spec.write(spec.code(unit, usable)), {"low": low, "high": high, "valid": count}


def decode_map(
    data: bytes, span: Mapping[str, float | int], *, codec: str = DEFAULT_CODEC, where: str = "map"
) -> tuple[Tensor, Tensor]:
    """Return the values (H,W) float32, zero where invalid, and the valid (H,W) bool that `encode_map` stored.

    span: as `encode_map` returned it; its "crc32", if present, is checked first. Raises OSError naming `where` for
    damaged bytes.
    """
    spec, codes = CODECS[codec], read_codes(data, span, codec=codec, where=where)
    low, high = float(span["low"]), float(span["high"])
    # A lookup table, computed in float64: low may be large compared with the range.
    table = np.nan_to_num(low + spec.units * (high - low)).astype(np.float32)
    return torch.from_numpy(np.take(table, codes)), torch.from_numpy(np.take(np.isfinite(spec.units), codes))


def read_codes(data: bytes, span: Mapping[str, float | int], *, codec: str, where: str) -> Codes:
    """Return the codes (H,W) of a map's bytes; checks and raises as `decode_map`."""
    _check_bytes(data, span, where)
    try:
        codes = CODECS[codec].read(data)
    except (ValueError, MemoryError) as error:
        reason = str(error) or "too large for this machine's memory"
        raise OSError(f"{where} is damaged: {reason}; {REPAIR}") from error
    if codes.dtype != np.uint16 or codes.ndim != 2:
        raise OSError(f"{where} is damaged: not a 16-bit map in {codec}; {REPAIR}")
    return codes


def _check_bytes(data: bytes, info: Mapping[str, float | int], where: str) -> None:
    """Raise OSError naming `where` unless a member's bytes have the checksum in `info`. Older labels have none."""
    if info.get("crc32", crc := zlib.crc32(data)) != crc:
        raise OSError(f"{where} is damaged: its checksum is wrong; {REPAIR}")


UNITS = {"metric_depth": "m", "metric_disparity": "1/m"}
"""Units of the depth kinds that have one."""


def code_rule(codec: str) -> dict[str, int]:
    """The rule from codes to values, for readers without this package, in each sample's json; {} for non-linear codes.

    A pixel below `invalid_below` has no value; `first` is the map's lowest value, `last` its highest.
    """
    spec = CODECS[codec]
    invalid = int(np.isnan(spec.units).sum())
    return {"invalid_below": invalid, "first": spec.first, "last": LAST} if spec.first else {}


def encode_sample(sample: Sample, *, codec: str = DEFAULT_CODEC) -> list[tuple[str, bytes]]:
    """Return the tar members of a sample, in order. Its record must have "image", "crop" and "patches"."""
    picture = io.BytesIO()
    pixels = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
    Image.fromarray(pixels).save(picture, "JPEG", quality=95, subsampling=0)
    members = [(f"{sample.key}.jpg", picture.getvalue())]
    entries = {}
    suffix = CODECS[codec].suffix

    def add(name: str, maps: DepthMap | CodedMaps, i: int) -> dict[str, float | int]:
        if isinstance(maps, CodedMaps):
            data = CODECS[codec].write(maps.codes[i].numpy())
            span = {"low": float(maps.low[i]), "high": float(maps.high[i]), "valid": int(maps.count[i])}
        else:
            data, span = encode_map(maps.values[i], maps.valid[i], codec=codec)
        members.append((f"{sample.key}.{name}.{suffix}", data))
        return {**span, "crc32": zlib.crc32(data)}

    for name, labels in sample.answers.items():
        shared = add(f"{name}.shared", labels.shared, 0)
        patches = labels.local
        local = [] if patches is None else [add(f"{name}.local{i}", patches, i) for i in range(len(patches))]
        stored_entry = sample.record.get("labels", {}).get(name, {})
        kind = str(labels.shared.kind)
        unit = {"unit": UNITS[kind]} if kind in UNITS else {}
        entries[name] = {**stored_entry, "kind": kind, **unit, "shared": shared, "local": local}
    record = {**sample.record, "version": VERSION, "key": sample.key, "codec": codec, "labels": entries}
    record |= {"decode": rule} if (rule := code_rule(codec)) else {}
    record["jpg"] = {"crc32": zlib.crc32(picture.getvalue())}
    record["crc32"] = zlib.crc32(dump_json(record))
    members.append((f"{sample.key}.json", dump_json(record)))
    return members


def decode_sample(
    members: Mapping[str, bytes],
    *,
    where: str = "",
    teachers: Sequence[str] | None = None,
    patches: Callable[[int], Sequence[int]] | None = None,
    coded: bool = False,
) -> Sample:
    """Decode a sample from its members, named by what follows the key: "jpg", "json", "<teacher>.shared.jls", ...

    teachers: those to decode (None: all). patches: number of patches -> which to decode (None: all). coded: leave the
    maps as codes, in `Sample.coded`. where: for messages; by default from webdataset's keys, for
    `WebDataset(tars).map(decode_sample)`. Raises OSError for damage, ValueError for a newer version or an unknown
    codec, LookupError naming an absent teacher.
    """
    where = where or f"{members.get('__url__', 'sample')}:{members.get('__key__', '')}"
    try:
        record = _parsed(members["json"])
        check_version(record, where)
        if (codec := record["codec"]) not in CODECS:
            raise ValueError(f"{where} has labels in codec {codec!r}; this version reads {', '.join(CODECS)}")
        _check_record(record, where)
        names = list(record["labels"]) if teachers is None else list(teachers)
        unknown = [name for name in names if name not in record["labels"]]
        if unknown:
            raise LookupError(f"{where} has no labels by {unknown[0]}; it has {', '.join(record['labels'])}")
        try:
            return _decoded(members, record, names, patches, coded, where)
        except _BAD_NUMBERS as error:
            reason = str(error).partition("\n")[0][:160]
            raise OSError(f"{where} is damaged: its json says what cannot be ({reason}); {REPAIR}") from error
    except _BAD_RECORD as error:
        raise OSError(f"{where} is damaged: {str(error)[:160]} is missing or unreadable; {REPAIR}") from error


_BAD_NUMBERS = (ValueError, ArithmeticError, RuntimeError, IndexError)
"""Exceptions of Python, NumPy and torch for a number or word in a record that is no size, kind, range or place."""
_BAD_RECORD = (KeyError, json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError, RecursionError)


def _parsed(data: bytes) -> dict[str, Any]:
    """A record's table; TypeError for numbers of thousands of digits, which Python's parser refuses otherwise."""
    try:
        record: dict[str, Any] = json.loads(data)
        return record
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError as error:
        raise TypeError(str(error)) from error


def _decoded(
    members: Mapping[str, bytes],
    record: dict[str, Any],
    names: Sequence[str],
    patches: Callable[[int], Sequence[int]] | None,
    coded: bool,
    where: str,
) -> Sample:
    """The sample of a record that has a known version and codec, and labels by all of `names`."""
    boxes = torch.tensor([[t, left, t + side, left + side] for t, left, side in record["patches"]], dtype=torch.float32)
    boxes = boxes.reshape(1, -1, 4) / record["crop"]["side"]
    chosen = list(range(boxes.shape[1]) if patches is None else patches(boxes.shape[1]))
    pixels = _decode_jpg(members["jpg"], record.get("jpg", {}), f"{where} jpg")
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    labels, codes = {}, {}
    for name in names:
        entry = record["labels"][name]
        teacher_labels = _read_labels(members, name, entry, boxes, chosen, record["codec"], where)
        if coded:
            codes[name] = teacher_labels
        else:
            labels[name] = teacher_labels.decode()
    return Sample(record["key"], record["image"]["key"], image, labels, record, codes)


def _check_record(record: dict[str, Any], where: str) -> None:
    """Remove and check a record's checksum; OSError names `where` if it is wrong. Older labels have none."""
    expected, actual = record.pop("crc32", None), -1
    with suppress(ValueError):  # a damaged number may have become infinite
        actual = zlib.crc32(dump_json(record))
    if expected not in (None, actual):
        raise OSError(f"{where} json is damaged: its checksum is wrong; {REPAIR}")


def _decode_jpg(data: bytes, info: Mapping[str, int], where: str) -> NDArray[np.uint8]:
    """Return the region (S,S,3); OSError names `where`."""
    _check_bytes(data, info, where)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
            if picture.mode == "RGB":
                return np.array(picture)
    except DECODE_ERRORS as error:
        raise OSError(f"{where} is damaged: it does not decode; {REPAIR}") from error
    raise OSError(f"{where} is damaged: its pixels are not RGB; {REPAIR}")


def _read_labels(
    members: Mapping[str, bytes],
    name: str,
    info: dict[str, Any],
    boxes: Tensor,
    chosen: Sequence[int],
    codec: str,
    where: str,
) -> CodedLabels:
    """Return one teacher's labels as stored; chosen: the patches to read."""
    kind = Kind(info["kind"])

    def read(contexts: Sequence[tuple[str, Mapping[str, float | int]]]) -> CodedMaps:
        codes = [
            read_codes(members[f"{name}.{c}.{CODECS[codec].suffix}"], span, codec=codec, where=f"{where} {name}.{c}")
            for c, span in contexts
        ]
        low, high = (torch.tensor([float(s[key]) for _, s in contexts], dtype=torch.float64) for key in ("low", "high"))
        count = torch.tensor([int(s["valid"]) for _, s in contexts])
        return CodedMaps(torch.from_numpy(np.stack(codes)), low, high, count, codec, kind)

    shared = read([("shared", info["shared"])])
    if not isinstance(info["local"], list):
        raise TypeError(f"the list of local maps by {name}")
    spans = [(f"local{i}", info["local"][i]) for i in chosen if info["local"]]
    # Every network has a card, and deliberately corrupted truth lists its corruptions; ground truth has neither.
    truth = "card" not in info and "corruptions" not in info
    dense = not truth or int(shared.count) >= DENSE * shared.codes.numel()
    supervision = Supervision(name, kind, truth, dense)
    return CodedLabels(shared, read(spans) if spans else None, boxes[:, chosen if spans else []], supervision)


def disagreements(sample: Sample) -> Iterator[str]:
    """Yield one line for each way in which a decoded sample differs from its record."""
    crop, image = sample.record["crop"], tuple(sample.image.shape)
    shape = (crop["size"], image[-1] if crop.get("width") else crop["size"])  # not square: the width of its image
    if image != (3, *shape):
        yield f"the image is {image}, not 3 x {shape[0]} x {shape[1]}"
    if any(min(t, left) < 0 or max(t, left) + side > crop["side"] for t, left, side in sample.record["patches"]):
        yield "a patch lies outside the region"
    for name, labels in sample.labels.items():
        info, kind = sample.record["labels"][name], labels.shared.kind
        maps = [(labels.shared, 0, info["shared"], shape)]
        if labels.local is not None:
            maps += [(labels.local, i, span, (crop["patch_size"],) * 2) for i, span in enumerate(info["local"])]
        if len(info["local"]) not in (0, len(sample.record["patches"])):
            yield f"{name} has {len(info['local'])} local maps for {len(sample.record['patches'])} patches"
        for depth, i, span, expected in maps:
            if (size := tuple(depth.values.shape[1:])) != expected:
                yield f"a map by {name} is {size}, not {expected}"
            if int(depth.valid[i].sum()) != span["valid"]:
                yield f"a map by {name} has {int(depth.valid[i].sum())} valid pixels, not {span['valid']}"
            if not span["low"] <= span["high"]:
                yield f"a map by {name} has the range {span['low']} to {span['high']}"
        if "disparity" in kind and kind.unknown != "affine" and info["shared"]["low"] < 0:
            yield f"{name} says {kind}, but has negative values"


def check_version(record: Mapping[str, Any], where: str | Path) -> None:
    """Raise ValueError if `record` was written by a newer version, or not by this package."""
    if not isinstance(version := record.get("version"), int):
        raise ValueError(f"{where} has no version: not written by distill label")
    if version > VERSION:
        raise ValueError(f"{where} has format version {version}; this distill reads up to {VERSION}: upgrade it")


def dump_json(value: Any) -> bytes:
    """JSON with sorted keys: equal content gives equal bytes. Raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
