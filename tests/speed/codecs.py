"""Size and speed of depth labels in each codec, on a teacher's maps of real photographs.

    python -m tests.speed.codecs                   # the photographs in scikit-image's and scikit-learn's wheels
    python -m tests.speed.codecs DIR [--count 24]  # a folder of photographs, or of tars packed as SA-1B packs them
    python -m tests.speed.codecs --weights FOLDER --encoder-weights FILE

The teacher is a student folder at 560 pixels, "pocket" by default. Prints for every codec bits per pixel (mean and
largest), MB/s of float32 map encoded and decoded and milliseconds per map (processor time, the fastest of three runs),
and the largest error relative to the guaranteed 1/8192 of the map's range. The codecs of shards.codec come first,
through the functions that write shards; then other codecs that were tried, on the same maps and with the same error
bound where the codec accepts one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import torch

from distill.core.crop_settings import CropSettings
from distill.data import sources
from distill.data.photos import BadImageError
from distill.labelling.jobs import prepare
from distill.shards.codec import CODECS, DEFAULT_CODEC, MAX_ERROR, decode_map, encode_map
from distill.teachers.checkpoint import Teacher

STEPS = 4096  # a map quantized to this many steps is off by at most 1/8192 of its range


@dataclass
class Way:
    """A way to store a map: `write` returns the bytes and the range; `read` returns float32 values from both."""

    write: Callable[[torch.Tensor], tuple[bytes, dict]]
    read: Callable[[bytes, dict], torch.Tensor]


def ours(codec: str) -> Way:
    def write(values: torch.Tensor) -> tuple[bytes, dict]:
        return encode_map(values, torch.ones_like(values, dtype=torch.bool), codec=codec)

    return Way(write, lambda data, span: decode_map(data, span, codec=codec)[0])


def stepped(encode: Callable, decode: Callable, steps: int = STEPS) -> Way:
    """An exact codec of integers, on maps quantized to `steps`."""

    def write(values: torch.Tensor) -> tuple[bytes, dict]:
        array = values.double().numpy()
        low, high = array.min(), array.max()
        return encode(np.rint((array - low) * (steps / (high - low))).astype(np.uint16)), {"low": low, "high": high}

    def read(data: bytes, span: dict) -> torch.Tensor:
        codes = decode(data).astype(np.float64)
        return torch.from_numpy((span["low"] + codes * ((span["high"] - span["low"]) / steps)).astype(np.float32))

    return Way(write, read)


def bounded(encode: Callable, decode: Callable) -> Way:
    """A codec of floats that takes the largest allowed error."""

    def write(values: torch.Tensor) -> tuple[bytes, dict]:
        array = values.numpy()
        low, high = float(array.min()), float(array.max())
        unit = ((array - low) / (high - low)).astype(np.float32)
        return encode(unit, MAX_ERROR * 0.999), {"low": low, "high": high, "shape": array.shape}

    def read(data: bytes, span: dict) -> torch.Tensor:
        unit = decode(data, span["shape"]).reshape(span["shape"])
        return torch.from_numpy((span["low"] + unit * (span["high"] - span["low"])).astype(np.float32))

    return Way(write, read)


def raw_float16(values: torch.Tensor) -> tuple[bytes, dict]:
    return values.half().numpy().tobytes(), {"shape": values.shape}


def ways() -> dict[str, Way]:
    c = imagecodecs
    table = {f"{name}{' (default)' if name == DEFAULT_CODEC else ''}": ours(name) for name in CODECS}
    table["jpeg-ls NEAR 8"] = stepped(lambda a: c.jpegls_encode(a, level=8), c.jpegls_decode, 65535)
    table["jpeg-ls exact"] = stepped(c.jpegls_encode, c.jpegls_decode)
    table["jpeg 2000"] = stepped(lambda a: c.jpeg2k_encode(a, level=0, reversible=True), c.jpeg2k_decode)
    if hasattr(c, "HTJ2K") and c.HTJ2K.available:
        table["high-throughput j2k"] = stepped(c.htj2k_encode, c.htj2k_decode)
    table["jpeg xl, effort 1"] = stepped(lambda a: c.jpegxl_encode(a, lossless=True, effort=1), c.jpegxl_decode)
    table["jpeg xl, effort 3"] = stepped(lambda a: c.jpegxl_encode(a, lossless=True, effort=3), c.jpegxl_decode)
    table["png, 4096 steps"] = stepped(lambda a: c.png_encode(a, level=3), c.png_decode)
    table["lerc + zstd"] = bounded(
        lambda a, e: c.lerc_encode(a, level=e, compression="zstd"), lambda d, _: c.lerc_decode(d)
    )
    if c.SZ3.available:
        table["sz3"] = bounded(
            lambda a, e: c.sz3_encode(a, mode="abs", abs=e), lambda d, s: c.sz3_decode(d, shape=s, dtype="float32")
        )
    table["float16, as it is"] = Way(
        raw_float16,
        lambda data, span: torch.from_numpy(np.frombuffer(data, np.float16).reshape(span["shape"]).astype(np.float32)),
    )
    return table


def maps(folder: str | None, count: int, weights: str, encoder_weights: str | None) -> list[torch.Tensor]:
    if folder is None:
        shards = sources.bundled_photos()
    elif tars := sorted(Path(folder).glob("*.tar")):
        shards = sources.tars(tars)
    else:
        shards = sources.folders(folder)
    entries = [entry for shard in shards for entry in shard.scan().entries]
    teacher = Teacher.load(weights, native_size=560, encoder_weights=encoder_weights)
    crops, depth_maps = CropSettings(min_side=560, on_small="use", patches="none"), []
    for entry in entries[:: max(1, len(entries) // count)][:count]:
        try:
            depth_maps.append(teacher.predict(prepare(entry.load(), crops=crops).region[None].float() / 255).values[0])
        except BadImageError as error:
            print(f"left out {entry.origin}: {error}")
    return depth_maps


def least(work: Callable[[], object], repeats: int = 3) -> float:
    """Processor seconds of the fastest of several runs, to exclude the load of a busy machine."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--weights", default="pocket")
    parser.add_argument("--encoder-weights")
    args = parser.parse_args()
    labels = maps(args.folder, args.count, args.weights, args.encoder_weights)
    print(f"{len(labels)} maps of 560 x 560 by {args.weights}; imagecodecs {imagecodecs.__version__}")
    print(f"{'':22}{'bits/pixel':>11}{'largest':>9}{'encode':>16}{'decode':>18}{'error / promise':>18}")
    for name, way in ways().items():
        way.read(*way.write(labels[0]))  # the first call loads the library
        bits, seconds, worst = [], [0.0, 0.0], 0.0
        for values in labels:
            data, span = way.write(values)
            back = way.read(data, span)
            seconds[0] += least(lambda: way.write(values))  # noqa: B023  (called at once)
            seconds[1] += least(lambda: way.read(data, span))  # noqa: B023
            bits.append(8 * len(data) / values.numel())
            error = (back.double() - values.double()).abs().max() / (values.double().max() - values.double().min())
            worst = max(worst, float(error) / MAX_ERROR)
        mega = sum(values.numel() * 4 for values in labels) / 1e6
        speed = [f"{mega / s:6.0f} MB/s {1e3 * s / len(labels):4.1f} ms" for s in seconds]
        broken = "  broken" if worst > 1.001 else ""
        print(f"{name:22}{np.mean(bits):11.2f}{max(bits):9.2f}  {speed[0]}  {speed[1]}{worst:13.3f}{broken}")


if __name__ == "__main__":
    main()
