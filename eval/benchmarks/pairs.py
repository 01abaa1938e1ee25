"""Your own photographs with ground truth: a table of pairs as `distill.data.pairs` reads it.

root: the .tsv or a folder with an INDEX.tsv. list_file: names to use, one per line (further columns are ignored). There
is no published list, and the truths may be of several kinds; those without a metric scale are scored in their own space
(see distill.eval.fit).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from distill.core.division import unit_range
from distill.data.pairs import Pair, read_names, read_pairs
from distill.eval.benchmarks import BenchmarkSample, prediction_path
from distill.eval.protocol import Protocol

PROTOCOL = Protocol(
    benchmark="pairs",
    truth="as the table says",
    mask="finite, positive, and not one of the table's invalid values",
    resize="the truth to the photograph's size, by nearest neighbour",
)


def samples(root: Path | str | None, list_file: Path | str | None = None) -> list[BenchmarkSample]:
    """The pairs of the table `root`, grouped by their dataset."""
    if root is None:
        raise ValueError("the benchmark pairs needs a root: a .tsv of pairs, or a folder with an INDEX.tsv")
    names = None if list_file is None else read_names(list_file)
    return [
        BenchmarkSample(
            pair.name,
            prediction_path(f"{pair.name}.npy"),
            partial(_image, pair),
            pair.truth,
            pair.dataset,
            photo=pair.photo,
            focal=partial(float, pair.focal) if pair.focal else None,
            kind=pair.kind,
        )
        for pair in read_pairs(root, names=names, first_word=True)
    ]


def _image(pair: Pair) -> Tensor:
    """(3,H,W) float32 in [0,1]."""
    return unit_range(pair.rgb())
