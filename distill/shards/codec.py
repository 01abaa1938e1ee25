"""One sample: what it holds, how several make a batch, and how it becomes bytes and comes back.

As bytes it is a jpg of the region, its labels in one of CODECS and a json that explains them; see shards.shards.
A decoder is handed only bytes whose checksum is right: damaged ones make some decoders crash or take minutes.

Shapes: S region size, N patches per region, P patch size.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from distill.core.codes import CodedLabels, CodedMaps, register
from distill.core.depth import DepthMap, Kind, cat
from distill.core.labels import DENSE, Batch, Labels, Supervision

VERSION = 1
MAX_ERROR = 1 / 8192  # of a map's range: what every codec promises
# From tests/speed/codecs.py: a fifth of png16's bytes. High-throughput JPEG 2000 is as small and twice as fast, but the
# decoder in imagecodecs crashes the process on damaged bytes, which a label shard from elsewhere may hold.
DEFAULT_CODEC = "jls"

# Paeth with moderate deflate is a fifth smaller than the fastest setting, at 14 ms against 6 for 560 x 560.
_PNG = (
    *(cv2.IMWRITE_PNG_COMPRESSION, 3, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT),
    *((cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_PAETH) if hasattr(cv2, "IMWRITE_PNG_FILTER") else ()),
)
# JPEG-LS changes a code by at most this. 8 would break MAX_ERROR, for rounding to a code costs another half.
_NEAR = 7

REPAIR = "run `distill verify --repair` on its folder"

Codes = NDArray[np.uint16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """How the numbers of a map become bytes, by way of 16-bit codes.

    suffix: of the tar member. bound: the largest error, as a fraction of the map's range. units: (65536,) float64, what
    each code means: 0 the map's lowest value, 1 its highest, NaN an invalid pixel. code: (H,W) float64 units, which it
    may overwrite, and bool usable to codes. first: the code of the lowest value where codes are linear in the value up
    to 65535, else 0. write, read: codes (H,W) to bytes and back; `read` raises ValueError for what it cannot read.
    """

    suffix: str
    bound: float
    units: NDArray[np.float64]
    first: int
    code: Callable[[NDArray[np.float64], NDArray[np.bool_]], Codes]
    write: Callable[[Codes], bytes]
    read: Callable[[bytes], NDArray[Any]]


def _linear(first: int, near: int = 0) -> tuple[NDArray[np.float64], Callable[..., Codes], float]:
    """Codes from `first` (lowest value) to 65535 (highest), and 0 for invalid: units, coder, error.

    A coder that moves codes by up to `near` never makes a valid pixel invalid or the reverse where first > 2 near.
    """
    assert first > 2 * near
    steps = 65535 - first
    codes = np.arange(65536, dtype=np.float64)
    units = np.where(codes > near, np.clip((codes - first) / steps, 0.0, 1.0), np.nan)

    def code(unit: NDArray[np.float64], usable: NDArray[np.bool_]) -> Codes:
        unit *= steps
        np.rint(unit, out=unit)
        unit += first
        unit *= usable
        return unit.astype(np.uint16)

    return units, code, (near + 0.5) / steps


def _png16() -> Codec:
    units, code, bound = _linear(1)

    def write(codes: Codes) -> bytes:
        done, png = cv2.imencode(".png", codes, _PNG)
        assert done, "OpenCV refused to encode a 16-bit PNG"
        return png.tobytes()

    def read(data: bytes) -> NDArray[Any]:
        codes = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
        if codes is None:
            raise ValueError("not a PNG")
        return codes

    return Codec(suffix="png", bound=bound, units=units, first=1, code=code, write=write, read=read)


def _jls() -> Codec:
    units, code, bound = _linear(2 * _NEAR + 2, near=_NEAR)

    def write(codes: Codes) -> bytes:
        return bytes(imagecodecs.jpegls_encode(codes, level=_NEAR))

    def read(data: bytes) -> NDArray[Any]:
        try:
            return np.asarray(imagecodecs.jpegls_decode(data))
        except (imagecodecs.JpeglsError, MemoryError) as error:
            raise ValueError(f"not JPEG-LS ({error})") from error

    return Codec(suffix="jls", bound=bound, units=units, first=2 * _NEAR + 2, code=code, write=write, read=read)


def _float16() -> Codec:
    # From -1 to 1, where half precision is twice as fine as from 0 to 1: off by 2**-12 of half the range at most.
    halves = np.arange(65536).astype(np.uint16).view(np.float16)
    units = (np.where(np.isfinite(halves), halves, np.float16(np.nan)).astype(np.float64) + 1.0) / 2.0

    def code(unit: NDArray[np.float64], usable: NDArray[np.bool_]) -> Codes:
        return np.where(usable, 2.0 * unit - 1.0, np.nan).astype(np.float16).view(np.uint16)

    def write(codes: Codes) -> bytes:
        file = io.BytesIO()
        np.save(file, codes.view(np.float16))
        return gzip.compress(file.getvalue(), compresslevel=6, mtime=0)

    def read(data: bytes) -> NDArray[Any]:
        try:
            return np.load(io.BytesIO(gzip.decompress(data)), allow_pickle=False).view(np.uint16)
        except (OSError, EOFError, zlib.error, TypeError) as error:
            raise ValueError(f"not a compressed npy ({error})") from error

    return Codec(suffix="npy.gz", bound=2.0**-13, units=units, first=0, code=code, write=write, read=read)


CODECS = {"jls": _jls(), "png16": _png16(), "float16": _float16()}
for _name, _codec in CODECS.items():
    register(_name, torch.from_numpy(_codec.units))


@dataclass(frozen=True, slots=True)
class Sample:
    """One region with every teacher's labels of it.

    key: `<image key>-<draw>`. image: (3,S,S) uint8. labels: by teacher, with a batch of one: shared (1,S,S), local
    (N,P,P) or None, boxes (1,N,4). record: the sample's json (crop, patches, origin, seed, ...). coded: labels whose
    maps are codes still, on their way to or from a device; a teacher is in one of the two.
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
        both: dict[str, Labels | CodedLabels] = {**self.labels, **self.coded}
        return {name: both[name] for name in self.record.get("labels", both) if name in both}


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
    first = labels[0].supervision
    supervision = replace(first, kind=kind, truth=all(one.supervision.truth for one in labels))
    counts = [0 if one.local is None else len(one.local) for one in labels]
    max_patches = max(counts)
    if max_patches == 0:
        return Labels(shared, None, torch.zeros(len(labels), 0, 4), supervision=supervision)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    patch = next(one.local.values.shape[1:] for one in labels if one.local is not None and len(one.local))
    maps, boxes = [], []
    for one, count in zip(labels, counts, strict=True):
        if one.local is not None and count:
            maps.append(one.local.convert(kind))
        if count < max_patches:
            empty = torch.zeros(max_patches - count, *patch)
            maps.append(DepthMap(empty, torch.zeros_like(empty, dtype=torch.bool), kind))
        spare = one.boxes[0, :1] if count else whole
        boxes.append(torch.cat([one.boxes[0], spare.expand(max_patches - count, 4)]))
    return Labels(shared, cat(maps), torch.stack(boxes), supervision=supervision)


def encode_map(values: Tensor, valid: Tensor, *, codec: str = DEFAULT_CODEC) -> tuple[bytes, dict[str, float | int]]:
    """A map (H,W) in a codec, and its range {"low", "high", "valid" (a count)}.

    Non-finite pixels are invalid. No value is off by more than CODECS[codec].bound of high - low, and by the rounding
    to float32; which pixels are valid is exact. A constant map is exact; one without a valid pixel has low = high = 0.
    """
    array = values.detach().cpu().double().numpy()
    usable = valid.cpu().numpy() & np.isfinite(array)
    count = int(usable.sum())
    whole = count == array.size
    known = array if whole else array[usable]
    low, high = (float(known.min()), float(known.max())) if count else (0.0, 0.0)
    scale = 1.0 / (high - low) if high > low else 0.0
    # One buffer, written over: fresh memory costs more than the arithmetic, and many threads ask for it at once.
    unit = array - low if whole else np.subtract(array, low, out=np.zeros_like(array), where=usable)
    unit *= scale
    np.clip(unit, 0.0, 1.0, out=unit)
    how = CODECS[codec]
    return how.write(how.code(unit, usable)), {"low": low, "high": high, "valid": count}


def decode_map(
    data: bytes, span: Mapping[str, float | int], *, codec: str = DEFAULT_CODEC, where: str = "map"
) -> tuple[Tensor, Tensor]:
    """The values (H,W) float32, zero where invalid, and the valid (H,W) bool that `encode_map` stored.

    span: what `encode_map` returned; its "crc32", if there is one, is checked first. Raises OSError naming `where` for
    bytes that are not what was written.
    """
    how, codes = CODECS[codec], read_codes(data, span, codec=codec, where=where)
    low, high = float(span["low"]), float(span["high"])
    # A table, made in float64: low may be large against the range.
    table = np.nan_to_num(low + how.units * (high - low)).astype(np.float32)
    return torch.from_numpy(np.take(table, codes)), torch.from_numpy(np.take(np.isfinite(how.units), codes))


def read_codes(data: bytes, span: Mapping[str, float | int], *, codec: str, where: str) -> Codes:
    """The codes (H,W) of a map's bytes, checked and raising as `decode_map`."""
    reason = "its checksum is wrong" if span.get("crc32", crc := zlib.crc32(data)) != crc else ""
    how = CODECS[codec]
    codes: NDArray[Any] = np.zeros(0)
    try:
        codes = how.read(data) if not reason else codes
    except ValueError as error:
        reason = str(error)
    if reason or codes.dtype != np.uint16 or codes.ndim != 2:
        reason = reason or f"not a 16-bit map in {codec}"
        raise OSError(f"{where} is damaged: {reason}; {REPAIR}")
    return codes


def encode_sample(sample: Sample, *, codec: str = DEFAULT_CODEC) -> list[tuple[str, bytes]]:
    """The tar members of a sample, in their order. Its record must have "image", "crop" and "patches"."""
    picture = io.BytesIO()
    pixels = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
    Image.fromarray(pixels).save(picture, "JPEG", quality=95, subsampling=0)
    members = [(f"{sample.key}.jpg", picture.getvalue())]
    described = {}
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
        before = sample.record.get("labels", {}).get(name, {})
        described[name] = {**before, "kind": str(labels.shared.kind), "shared": shared, "local": local}
    record = {**sample.record, "version": VERSION, "key": sample.key, "codec": codec, "labels": described}
    record["jpg"] = {"crc32": zlib.crc32(picture.getvalue())}
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
    """A sample from its members, by what follows the key: "jpg", "json", "<teacher>.shared.jls", ...

    teachers: the ones to decode (None: all). patches: which of so many to decode (None: all). coded: leave the maps as
    codes, in `Sample.coded`. where: by default what webdataset says, for `WebDataset(tars).map(decode_sample)`. Raises
    OSError for damage, ValueError for a newer version or unknown codec, LookupError for an absent teacher, naming it.
    """
    where = where or f"{members.get('__url__', 'sample')}:{members.get('__key__', '')}"
    try:
        record = json.loads(members["json"])
        check_version(record, where)
        crop, described, codec = record["crop"], record["labels"], record["codec"]
        if codec not in CODECS:
            raise ValueError(f"{where} has labels in codec {codec!r}; this version reads {', '.join(CODECS)}")
        names = list(described) if teachers is None else list(teachers)
        unknown = [name for name in names if name not in described]
        if unknown:
            raise LookupError(f"{where} has no labels by {unknown[0]}; it has {', '.join(described)}")
        boxes = torch.tensor(
            [[t, left, t + side, left + side] for t, left, side in record["patches"]], dtype=torch.float32
        )
        boxes = boxes.reshape(1, -1, 4) / crop["side"]
        chosen = list(range(boxes.shape[1]) if patches is None else patches(boxes.shape[1]))
        pixels = _decode_jpg(members["jpg"], record.get("jpg", {}), f"{where} jpg")
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        labels, codes = {}, {}
        for name in names:
            one = _read_labels(members, name, described[name], boxes, chosen, codec, where)
            if coded:
                codes[name] = one
            else:
                labels[name] = one.decode()
        return Sample(record["key"], record["image"]["key"], image, labels, record, codes)
    except (KeyError, json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise OSError(f"{where} is damaged: {error} is missing or unreadable; {REPAIR}") from error


def _decode_jpg(data: bytes, info: Mapping[str, int], where: str) -> NDArray[np.uint8]:
    """The region (S,S,3); OSError names `where`. Older labels have no checksum of it."""
    if info.get("crc32", crc := zlib.crc32(data)) != crc:
        raise OSError(f"{where} is damaged: its checksum is wrong; {REPAIR}")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
            return np.array(picture)
    except (OSError, SyntaxError) as error:
        raise OSError(f"{where} is damaged: it does not decode; {REPAIR}") from error


def _read_labels(
    members: Mapping[str, bytes],
    name: str,
    info: dict[str, Any],
    boxes: Tensor,
    chosen: Sequence[int],
    codec: str,
    where: str,
) -> CodedLabels:
    """One teacher's labels as they are stored; `chosen`: the patches to read."""
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
    spans = [(f"local{i}", info["local"][i]) for i in chosen if info["local"]]
    # Every network has a card; ground truth has none.
    truth = "card" not in info
    dense = not truth or int(shared.count) >= DENSE * shared.codes.numel()
    supervision = Supervision(name, kind, truth, dense)
    return CodedLabels(shared, read(spans) if spans else None, boxes[:, chosen if spans else []], supervision)


def disagreements(sample: Sample) -> Iterator[str]:
    """Where a sample that was read is not what its record says, a line each."""
    crop, size = sample.record["crop"], sample.record["crop"]["size"]
    if sample.image.shape != (3, size, size):
        yield f"the image is {tuple(sample.image.shape)}, not 3 x {size} x {size}"
    if any(min(t, left) < 0 or max(t, left) + side > crop["side"] for t, left, side in sample.record["patches"]):
        yield "a patch lies outside the region"
    for name, labels in sample.labels.items():
        info = sample.record["labels"][name]
        maps = [(labels.shared, 0, info["shared"], size)]
        if labels.local is not None:
            maps += [(labels.local, i, span, crop["patch_size"]) for i, span in enumerate(info["local"])]
        if len(info["local"]) not in (0, len(sample.record["patches"])):
            yield f"{name} has {len(info['local'])} local maps for {len(sample.record['patches'])} patches"
        for depth, i, span, side in maps:
            if depth.values.shape[1:] != (side, side):
                yield f"a map by {name} is {tuple(depth.values.shape[1:])}, not {side} x {side}"
            if int(depth.valid[i].sum()) != span["valid"]:
                yield f"a map by {name} has {int(depth.valid[i].sum())} valid pixels, not {span['valid']}"
            if not span["low"] <= span["high"]:
                yield f"a map by {name} has the range {span['low']} to {span['high']}"
        if "disparity" in labels.shared.kind and labels.shared.kind.unknown != "affine" and info["shared"]["low"] < 0:
            yield f"{name} says {labels.shared.kind}, but has negative values"


def check_version(record: Mapping[str, Any], where: str | Path) -> None:
    """Raise ValueError where `record` was written by a newer version, or not by us."""
    if not isinstance(version := record.get("version"), int):
        raise ValueError(f"{where} has no version: not written by distill label")
    if version > VERSION:
        raise ValueError(f"{where} has format version {version}; this distill reads up to {VERSION}: upgrade it")


def dump_json(value: Any) -> bytes:
    """JSON with sorted keys: equal content, equal bytes. NaN is refused."""
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
