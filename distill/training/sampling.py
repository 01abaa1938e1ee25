"""Which samples a step uses: a pure function of (seed, step).

The stream of a run is a sequence of permutations of the training samples; global batch t is its t-th slice. So an epoch
holds every sample exactly once, and a last partial batch is completed from the next epoch's order.
Where sources are weighted, every position of the stream is first assigned to a source, and each source has such a
stream of its own: a small source is repeated more often, but no sample recurs before all others of it were used.
Processes and accumulation only split a global batch into micro-batches; neither they nor the number of workers changes
which samples a step uses, and a resumed run only needs its step.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from distill.core.crops import generator


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"holdout\x1f{key}".encode(), digest_size=8).digest(), "big")


def hold_out(image_keys: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Indices of the samples to train on and of those held out, by the hash of each sample's image key.

    All samples of an image are on the same side, which depends on the key alone: a larger fraction holds out the same
    images and more. Any fraction above 0 holds out at least one image where there are two.
    """
    images = sorted(hashes := {key: _hash(key) for key in set(image_keys)}, key=hashes.__getitem__)
    heldout_keys = {key for key in images if hashes[key] < fraction * 2**64}
    if fraction > 0 and not heldout_keys and len(images) > 1:
        heldout_keys = {images[0]}
    if len(heldout_keys) == len(images):
        heldout_keys -= {*images[-1:]}
    train = [i for i, key in enumerate(image_keys) if key not in heldout_keys]
    return train, [i for i, key in enumerate(image_keys) if key in heldout_keys]


def _permutation(count: int, seed: int, epoch: int, *source: int) -> np.ndarray:
    # Sorts raw words of the generator: unlike Generator.permutation, the same in every version of numpy.
    words = generator("order", seed, epoch, *source).bit_generator.random_raw(count)
    return np.argsort(words, kind="stable")


# In each block of this many positions every source has its share, to within one position.
BLOCK = 1024


@functools.lru_cache(maxsize=8)
def _dealt(shares: tuple[float, ...], seed: int, block: int, size: int) -> np.ndarray:
    """The source of each position of a block, (size,): each source's share, to within one position, shuffled."""
    words = generator("sources", seed, block).bit_generator.random_raw(size + 1)
    points = (np.arange(size) + (int(words[size]) >> 11) * 2.0**-53) / size
    sources = np.searchsorted(np.cumsum(shares)[:-1], points, side="right")
    return sources[np.argsort(words[:size], kind="stable")]


@functools.lru_cache(maxsize=8)
def _starts(shares: tuple[float, ...], seed: int, size: int) -> list[np.ndarray]:
    """How many positions each source had before block 0, 1, ...; a cached list that `_visits` extends."""
    return [np.zeros(len(shares), dtype=np.int64)]


def _visits(shares: tuple[float, ...], seed: int, position: int, size: int) -> tuple[int, int]:
    """The source of a position of the stream, and how many positions that source had before."""
    block, within = divmod(position, size)
    starts = _starts(shares, seed, size)
    while len(starts) <= block:
        starts.append(starts[-1] + np.bincount(_dealt(shares, seed, len(starts) - 1, size), minlength=len(shares)))
    sources = _dealt(shares, seed, block, size)
    source = int(sources[within])
    return source, int(starts[block][source] + (sources[:within] == source).sum())


def source_shares(counts: Sequence[int], weights: Sequence[float], temperature: float) -> tuple[float, ...]:
    """How often each source is used: (count * weight) ** (1 / temperature), normalized to a sum of 1.

    temperature: 1 is proportional, larger is more even, so that large sources do not drown small ones.
    """
    sizes = [(n * w) ** (1.0 / temperature) for n, w in zip(counts, weights, strict=True)]
    return tuple(size / sum(sizes) for size in sizes)


@dataclass(frozen=True, slots=True)
class SamplePosition:
    """One sample at one position of the stream. position // batch_size is its 0-based step."""

    position: int
    index: int


@dataclass(frozen=True, slots=True)
class Order:
    """The endless stream of samples. indices: those to train on; seed: the run's.

    sources: (indices, share) of each source where they are weighted; none: all samples alike. block: in each block of
    this many consecutive positions every source has its share, to within one. shuffled: each one's epoch now.
    """

    indices: tuple[int, ...]
    seed: int
    sources: tuple[tuple[tuple[int, ...], float], ...] = ()
    block: int = BLOCK
    shuffled: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def batch(self, step: int, size: int) -> list[SamplePosition]:
        """Global batch `step` (0-based): `size` consecutive positions of the stream."""
        return [SamplePosition(p, self._index(p)) for p in range(step * size, (step + 1) * size)]

    def _index(self, position: int) -> int:
        source, visit, indices = -1, position, self.indices
        if self.sources:
            source, visit = _visits(tuple(share for _, share in self.sources), self.seed, position, self.block)
            indices = self.sources[source][0]
        epoch, within = divmod(visit, len(indices))
        if self.shuffled.get(source, (-1,))[0] != epoch:  # only one is kept: of a million samples each has 8 MB
            self.shuffled[source] = epoch, _permutation(len(indices), self.seed, epoch, *[source][: len(self.sources)])
        return indices[self.shuffled[source][1][within]]


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

    weights: by source, 1 for sources beyond its end; a source of weight 0 is not used. Where all weights are equal and
    temperature is 1 the sources do not matter. even: in each run of this many positions (a batch) every source has a
    share by its weight alone, whatever its size; 0: off. Raises ValueError where no source is left to train on.
    """
    by_source: dict[int, list[int]] = {}
    for index in indices:
        by_source.setdefault(sources[index], []).append(index)
    weight = {source: weights[source] if source < len(weights) else 1.0 for source in sorted(by_source)}
    used = {source: w for source, w in weight.items() if w > 0}
    if not used and indices:
        raise ValueError("every source of images has weight 0: nothing to learn from")
    if temperature == 1.0 and len({*weight.values()}) <= 1 and not (even and len(used) > 1):
        return Order(tuple(indices), seed)
    counts = [1 if even else len(by_source[source]) for source in used]
    shares = source_shares(counts, list(used.values()), temperature)
    streams = tuple((tuple(by_source[source]), share) for source, share in zip(used, shares, strict=True))
    return Order(tuple(index for stream, _ in streams for index in stream), seed, streams, even or BLOCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchPositions:
    """A batch sampler: this process's micro-batches of steps first..steps-1, in training order."""

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
    """A hash of the training data: the samples' image keys and the indices that are used."""
    digest = hashlib.sha256("\n".join(keys).encode())
    digest.update(np.asarray(indices, dtype=np.int64).tobytes())
    return digest.hexdigest()[:32]
