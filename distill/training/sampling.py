"""Which samples a step learns from: a pure function of (seed, step).

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from distill.core.crops import generator


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


def fingerprint(keys: Sequence[str], indices: Sequence[int]) -> str:
    """A hash of what there is to train on: samples' image keys and which of them are used."""
    digest = hashlib.sha256("\n".join(keys).encode())
    digest.update(np.asarray(indices, dtype=np.int64).tobytes())
    return digest.hexdigest()[:32]
