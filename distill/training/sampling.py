"""Which samples a step learns from, and whose labels: pure functions of (seed, step).

The stream of a run is a permutation of the training samples, then another, end to end; global batch t is its t-th
slice. So an epoch holds every sample exactly once, and a last partial batch is completed from the next epoch's order.
Processes and accumulation only cut a global batch into micro-batches; neither they nor the number of workers changes
what a step learns from, and a resumed run needs to know nothing but its step.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distill.core.crops import generator
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Labels
from distill.losses.losses import median_and_mean_abs_dev


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"holdout\x1f{key}".encode(), digest_size=8).digest(), "big")


def hold_out(image_keys: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Indices of the samples to train on and of those held out, by the hash of each sample's image key.

    All samples of an image are on one side. The side depends on the key alone: a larger fraction holds out the same
    images and more. Any fraction above 0 holds out at least one image where there are two.
    """
    images = sorted(set(image_keys), key=_hash)
    held = {key for key in images if _hash(key) < fraction * 2**64}
    if fraction > 0 and not held and len(images) > 1:
        held = {images[0]}
    if len(held) == len(images):
        held.discard(images[-1])
    train = [i for i, key in enumerate(image_keys) if key not in held]
    return train, [i for i, key in enumerate(image_keys) if key in held]


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    # Raw words of the generator, sorted: unlike Generator.permutation, the same for ever and in every numpy.
    words = generator("order", seed, epoch).bit_generator.random_raw(count)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True, slots=True)
class SamplePosition:
    """One sample at one place of the stream. position // batch_size is its 0-based step."""

    position: int
    index: int


@dataclass(frozen=True, slots=True)
class Order:
    """The endless stream of samples. indices: those to train on; seed: the run's."""

    indices: tuple[int, ...]
    seed: int

    def batch(self, step: int, size: int) -> list[SamplePosition]:
        """Global batch `step` (0-based): `size` consecutive places of the stream."""
        count = len(self.indices)
        places = []
        for position in range(step * size, (step + 1) * size):
            epoch, within = divmod(position, count)
            places.append(SamplePosition(position, self.indices[_permutation(count, self.seed, epoch)[within]]))
        return places


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchPositions:
    """A batch sampler: this process's micro-batches of steps first..steps-1, in the order in which they are learnt."""

    order: Order
    batch_size: int
    accumulate: int
    process: int
    processes: int
    steps: int
    first: int = 0

    def __post_init__(self) -> None:
        parts = self.processes * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of processes x accumulate "
                f"({self.processes} x {self.accumulate})"
            )
        if len(self.order.indices) < self.batch_size:
            raise ValueError(
                f"{len(self.order.indices)} training samples are fewer than one batch of {self.batch_size}: "
                f"label more images, or lower batch_size or val_fraction"
            )

    def after(self, step: int) -> MicroBatchPositions:
        """The same, from 0-based `step` on."""
        return replace(self, first=step)

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[SamplePosition]]:
        micro = self.batch_size // (self.processes * self.accumulate)
        for step in range(self.first, self.steps):
            places = self.order.batch(step, self.batch_size)
            for part in range(self.accumulate):
                start = (part * self.processes + self.process) * micro
                yield places[start : start + micro]


def choose_teacher(teachers: Mapping[str, float], *, seed: int, step: int) -> str:
    """Whose labels 0-based `step` learns from, drawn by share from (seed, step): the same on every process."""
    drawn = generator("teacher", seed, step).random() * sum(teachers.values())
    for name, share in teachers.items():
        if drawn < share:
            return name
        drawn -= share
    return next(name for name, share in reversed(list(teachers.items())) if share > 0)


def _average_maps(maps: Sequence[DepthMap], shares: Sequence[float]) -> tuple[DepthMap, Tensor]:
    """The mean map, and each pixel's weight: 1 / (1 + the teachers' distance there, in mean deviations)."""
    valid = torch.stack([m.valid for m in maps]).all(0)
    normal = []
    for m in maps:
        median, deviation = median_and_mean_abs_dev(m.values, valid)
        centred = (m.values - median[:, None, None]) / deviation.clamp(min=1e-12)[:, None, None]
        normal.append(torch.where(valid, centred, 0.0))
    mean = torch.stack([share / sum(shares) * one for share, one in zip(shares, normal, strict=True)]).sum(0)
    # Of two teachers, whatever their shares, this is the distance between them.
    distance = torch.stack([(one - mean).abs() for one in normal]).sum(0)
    kind = Kind.AFFINE_DISPARITY if maps[0].kind.quantity == "disparity" else Kind.AFFINE_DEPTH
    return DepthMap(mean, valid, kind), torch.where(valid, 1.0 / (1.0 + distance), 0.0)


def average_labels(labels: Mapping[str, Labels], teachers: Mapping[str, float]) -> Labels:
    """The mean of the teachers' maps by share, with weights for the loss: more where the teachers agree.

    Distill-Any-Depth, Sec. 4.2 and Table 4: "a weighted averaging approach (Avg.), which assigns greater weight to
    pixels where the two teachers exhibit high agreement". No formula is given; inferred: each map is first brought to
    median 0 and mean deviation 1, for maps known up to scale and shift cannot be averaged as they are; a pixel's weight
    in L_Dis is 1 / (1 + |a - b|). A pixel counts where every teacher's does. The teachers' patches must lie in the
    same places.
    """
    parts = [labels[name] for name, share in teachers.items() if share > 0]
    shares = [share for share in teachers.values() if share > 0]
    local = [part.local for part in parts if part.local is not None]
    shared, weight = _average_maps([part.shared for part in parts], shares)
    if len(local) != len(parts):
        return Labels(shared, None, parts[0].boxes, weight)
    if any(not torch.equal(part.boxes, parts[0].boxes) for part in parts):
        raise ValueError(
            'strategy = "average" needs labels of the same patches from every teacher; label them in one run'
        )
    patches, patch_weight = _average_maps(local, shares)
    return Labels(shared, patches, parts[0].boxes, weight, patch_weight)


def convert_labels(labels: Labels, kind: Kind | str) -> Labels:
    """The labels as another kind; raises distill.core.depth.KindError where that would be unlawful."""
    local = None if labels.local is None else labels.local.convert(kind)
    return Labels(labels.shared.convert(kind), local, labels.boxes)


def learnt_labels(labels: Mapping[str, Labels], *, teachers: Mapping[str, float], name: str, kind: str) -> Labels:
    """The labels that one step learns from: those of `name`, or the average of all where name is "average"."""
    wanted = list(teachers) if name == "average" else [name]
    converted = {n: convert_labels(labels[n], kind) for n in wanted}
    return average_labels(converted, teachers) if name == "average" else converted[name]


def fingerprint(keys: Sequence[str], indices: Sequence[int]) -> str:
    """A hash of what there is to train on: samples' image keys and which of them are used."""
    digest = hashlib.sha256("\n".join(keys).encode())
    digest.update(np.asarray(indices, dtype=np.int64).tobytes())
    return digest.hexdigest()[:32]
