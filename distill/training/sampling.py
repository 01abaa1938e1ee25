"""Which samples a step learns from, and whose labels: pure functions of (seed, step).

The stream of a run is a permutation of the training samples, then another, end to end; global batch t is its t-th
slice. So an epoch holds every sample exactly once, and a last partial batch is completed from the next epoch's order.
Where sources are weighted, every place of the stream is first given to a source, and each source has such a stream of
its own: a small one is gone through more often, and none of its samples twice before all.
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
from distill.core.labels import Labels, Supervision
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


@functools.lru_cache(maxsize=32)
def _permutation(count: int, seed: int, epoch: int, *source: int) -> np.ndarray:
    # Raw words of the generator, sorted: unlike Generator.permutation, the same for ever and in every numpy.
    words = generator("order", seed, epoch, *source).bit_generator.random_raw(count)
    return np.argsort(words, kind="stable")


# Of so many places of the stream every source has its share, but for one place.
BLOCK = 1024


@functools.lru_cache(maxsize=8)
def _dealt(shares: tuple[float, ...], seed: int, block: int, size: int = BLOCK) -> np.ndarray:
    """Which source each place of a block is given to, (size,): its share of the places (but for one), shuffled."""
    words = generator("sources", seed, block).bit_generator.random_raw(size + 1)
    points = (np.arange(size) + (int(words[size]) >> 11) * 2.0**-53) / size
    dealt = np.searchsorted(np.cumsum(shares)[:-1], points, side="right")
    return dealt[np.argsort(words[:size], kind="stable")]


@functools.lru_cache(maxsize=8)
def _starts(shares: tuple[float, ...], seed: int, size: int) -> list[np.ndarray]:
    """How many places every source has had before block 0, 1, ...; `_visits` makes it longer."""
    return [np.zeros(len(shares), dtype=np.int64)]


def _visits(shares: tuple[float, ...], seed: int, position: int, size: int) -> tuple[int, int]:
    """The source of a place of the stream, and how many places it has had before."""
    block, within = divmod(position, size)
    starts = _starts(shares, seed, size)
    while len(starts) <= block:
        starts.append(starts[-1] + np.bincount(_dealt(shares, seed, len(starts) - 1, size), minlength=len(shares)))
    dealt = _dealt(shares, seed, block, size)
    source = int(dealt[within])
    return source, int(starts[block][source] + (dealt[:within] == source).sum())


def source_shares(counts: Sequence[int], weights: Sequence[float], temperature: float) -> tuple[float, ...]:
    """How often each source is learnt from: (count * weight) ** (1 / temperature), to a sum of 1.

    temperature: 1 is in proportion, more is more even, so that large sources do not drown small ones.
    """
    sizes = [(n * w) ** (1.0 / temperature) for n, w in zip(counts, weights, strict=True)]
    return tuple(size / sum(sizes) for size in sizes)


@dataclass(frozen=True, slots=True)
class SamplePosition:
    """One sample at one place of the stream. position // batch_size is its 0-based step."""

    position: int
    index: int


@dataclass(frozen=True, slots=True)
class Order:
    """The endless stream of samples. indices: those to train on; seed: the run's.

    sources: (indices, share) of each source where they are weighted; none: all samples alike. block: of so many
    consecutive places every source has its share, but for one.
    """

    indices: tuple[int, ...]
    seed: int
    sources: tuple[tuple[tuple[int, ...], float], ...] = ()
    block: int = BLOCK

    def batch(self, step: int, size: int) -> list[SamplePosition]:
        """Global batch `step` (0-based): `size` consecutive places of the stream."""
        return [SamplePosition(p, self._index(p)) for p in range(step * size, (step + 1) * size)]

    def _index(self, position: int) -> int:
        if not self.sources:
            epoch, within = divmod(position, len(self.indices))
            return self.indices[_permutation(len(self.indices), self.seed, epoch)[within]]
        source, visit = _visits(tuple(share for _, share in self.sources), self.seed, position, self.block)
        indices = self.sources[source][0]
        epoch, within = divmod(visit, len(indices))
        return indices[_permutation(len(indices), self.seed, epoch, source)[within]]


def make_order(
    indices: Sequence[int],
    sources: Sequence[int],
    *,
    seed: int,
    weights: Sequence[float],
    temperature: float,
    even: int = 0,
) -> Order:
    """The stream of the samples `indices`, whose sources are `sources[index]`.

    weights: by source, 1 for those that it does not reach; a source of weight 0 is not learnt from. Where all weights
    are alike and temperature is 1 the sources do not matter. even: of so many consecutive places (a batch) every source
    has a share by its weight alone, however large it is; 0: not so. Raises ValueError where nothing is left to learn
    from.
    """
    by_source: dict[int, list[int]] = {}
    for index in indices:
        by_source.setdefault(sources[index], []).append(index)
    weight = {source: weights[source] if source < len(weights) else 1.0 for source in sorted(by_source)}
    kept = {source: w for source, w in weight.items() if w > 0}
    if not kept and indices:
        raise ValueError("every source of images has weight 0: nothing to learn from")
    if temperature == 1.0 and len({*weight.values()}) <= 1 and not (even and len(kept) > 1):
        return Order(tuple(indices), seed)
    counts = [1 if even else len(by_source[source]) for source in kept]
    shares = source_shares(counts, list(kept.values()), temperature)
    streams = tuple((tuple(by_source[source]), share) for source, share in zip(kept, shares, strict=True))
    return Order(tuple(index for stream, _ in streams for index in stream), seed, streams, even or BLOCK)


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


def _average_maps(
    maps: Sequence[DepthMap], shares: Sequence[float], *, aligned: bool = True
) -> tuple[DepthMap, Tensor]:
    """The mean map, and each pixel's weight: 1 / (1 + the teachers' distance there, in mean deviations if aligned)."""
    valid = torch.stack([m.valid for m in maps]).all(0)
    normal = []
    for m in maps:
        median, deviation = median_and_mean_abs_dev(m.values, valid)
        centred = (m.values - median[:, None, None]) / deviation.clamp(min=1e-12)[:, None, None]
        normal.append(torch.where(valid, centred if aligned else m.values, 0.0))
    mean = torch.stack([share / sum(shares) * one for share, one in zip(shares, normal, strict=True)]).sum(0)
    # Of two teachers, whatever their shares, this is the distance between them.
    distance = torch.stack([(one - mean).abs() for one in normal]).sum(0)
    kind = Kind.AFFINE_DISPARITY if maps[0].kind.quantity == "disparity" else Kind.AFFINE_DEPTH
    return DepthMap(mean, valid, kind), torch.where(valid, 1.0 / (1.0 + distance), 0.0)


def average_labels(labels: Mapping[str, Labels], teachers: Mapping[str, float], *, aligned: bool = True) -> Labels:
    """The mean of the teachers' maps by share, with weights for the loss: more where the teachers agree.

    Distill-Any-Depth, Sec. 4.2 and Table 4: "a weighted averaging approach (Avg.), which assigns greater weight to
    pixels where the two teachers exhibit high agreement". No formula is given; inferred: each map is first brought to
    median 0 and mean deviation 1, for maps known up to scale and shift cannot be averaged as they are; a pixel's weight
    in L_Dis is 1 / (1 + |a - b|). A pixel counts where every teacher's does. The teachers' patches must lie in the
    same places. aligned: False averages the maps as they are, each in its own scale and shift.
    """
    parts = [labels[name] for name, share in teachers.items() if share > 0]
    shares = [share for share in teachers.values() if share > 0]
    local = [part.local for part in parts if part.local is not None]
    shared, weight = _average_maps([part.shared for part in parts], shares, aligned=aligned)
    taught = [part.supervision for part in parts]
    truth, dense = (all(flags) for flags in zip(*((one.truth, one.dense) for one in taught), strict=True))
    supervision = Supervision("average", shared.kind, truth, dense)
    if len(local) != len(parts):
        return Labels(shared, None, parts[0].boxes, weight, supervision=supervision)
    if any(not torch.equal(part.boxes, parts[0].boxes) for part in parts):
        raise ValueError(
            'strategy = "average" needs labels of the same patches from every teacher; label them in one run'
        )
    patches, patch_weight = _average_maps(local, shares, aligned=aligned)
    return Labels(shared, patches, parts[0].boxes, weight, patch_weight, supervision)


def choose_patches(count: int, seed: int, position: int, number: int) -> list[int]:
    """Which `count` of a region's `number` patches are learnt from at this place of the stream; all of fewer."""
    if number <= count:
        return list(range(number))
    return sorted(int(i) for i in generator("patches", seed, position).permutation(number)[:count])


def meet_labels(labels: Labels, kind: Kind | str, keep_unmet: bool = False) -> Labels:
    """The labels as the kind that the student predicts, or as they are where they know less than it does.

    Then the objective brings the prediction to them. Raises distill.core.depth.KindError where they do not meet;
    keep_unmet: those stay as they are too.
    """
    kind, stored = Kind(kind), labels.shared.kind
    if keep_unmet and not stored.can_become(kind):
        return labels
    return labels if kind.can_become(stored) and not stored.can_become(kind) else labels.convert(kind)


AVERAGES = ("average", "average_unaligned")
"""The strategies that learn from a mean of all teachers' maps; in place of a teacher's name they mean it."""


def learnt_labels(
    labels: Mapping[str, Labels], *, teachers: Mapping[str, float], name: str, kind: str, keep_unmet: bool = False
) -> Labels:
    """The labels that one step learns from: those of `name`, or the average of all where name is one of AVERAGES."""
    wanted = list(teachers) if name in AVERAGES else [name]
    met = {n: meet_labels(labels[n], kind, keep_unmet) for n in wanted}
    return average_labels(met, teachers, aligned=name == "average") if name in AVERAGES else met[name]


def fingerprint(keys: Sequence[str], indices: Sequence[int]) -> str:
    """A hash of what there is to train on: samples' image keys and which of them are used."""
    digest = hashlib.sha256("\n".join(keys).encode())
    digest.update(np.asarray(indices, dtype=np.int64).tobytes())
    return digest.hexdigest()[:32]
