"""The quality gate of an export: its delta1 on a benchmark, or on a labels folder, against the float32 student's.

Scores are those of `distill score` (eval.fit.measure), the mean over images; an export is refused if it loses more than
MAX_DELTA1_DROP, a tenth of a point: less than the difference between seeds, more than that of rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.core.depth import Kind
from distill.core.division import unit_range
from distill.core.plugins import find
from distill.eval.benchmarks import BenchmarkSample
from distill.eval.fit import NoGroundTruthError, measure
from distill.eval.metrics import from_sums
from distill.eval.protocol import Protocol
from distill.shards.shards import MANIFEST, LabelDataset

MAX_DELTA1_DROP = 0.001
"""The accepted loss of delta1, which is at most 1: a tenth of a point."""

MAX_IMAGES = 64
"""Maximum number of images taken from a labels folder, evenly spread over it."""


class QualityError(ValueError):
    """An export loses too much."""


Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Gate:
    """What an export is measured on, and what it may lose.

    benchmark: its name, or a labels folder. root, list_file: as `distill score` takes them. allow_drop: a larger loss
    is reported, not refused.
    """

    benchmark: str = "scenes"
    root: str | None = None
    list_file: str | None = None
    allow_drop: bool = False

    def check(self, before: Run, after: Run, kind: Kind, out: str | Path) -> str:
        """Returns a line with both delta1; raises QualityError naming `out` if `after` loses too much.

        before, after: from an image (3,H,W) in [0,1] to its map (H,W), by the float32 student and by the export.
        """
        samples, protocol = self.samples()
        before_score, after_score = (delta1(run, samples, protocol, kind) for run in (before, after))
        line = f"delta1 {after_score:.4f}, float32 {before_score:.4f} ({self.benchmark}, {len(samples)} images)"
        if not after_score >= before_score - MAX_DELTA1_DROP and not self.allow_drop:
            drop = 100 * (before_score - after_score)
            raise QualityError(
                f"{out}: not written: {line} is a loss of {drop:.2f} points, more than {100 * MAX_DELTA1_DROP}; "
                "use another precision, more calibration images, or --allow-drop"
            )
        return line

    def samples(self) -> tuple[Sequence[BenchmarkSample], Protocol]:
        """The images with their ground truth: in a labels folder the first teacher's shared maps."""
        if (Path(self.benchmark) / MANIFEST).is_file():
            return _of_labels(Path(self.benchmark)), Protocol(
                benchmark="labels", num_images=0, list_sha256="", min_depth=0.0, max_depth=1e9, mask="valid labels"
            )
        module = find("distill.eval.benchmarks", self.benchmark)
        return list(module.samples(self.root, self.list_file)), module.PROTOCOL


def delta1(run: Run, samples: Sequence[BenchmarkSample], protocol: Protocol, kind: Kind) -> float:
    """The mean over images; run: (3,H,W) in [0,1] to (H,W), a map of `kind`. ValueError if no image has valid truth."""
    fitted, sums = protocol.with_kind(kind), []
    for sample in samples:
        with contextlib.suppress(NoGroundTruthError):  # a label whose fit was dropped is nowhere valid
            sums.append(measure(run(sample.image()).numpy(), sample.truth(), kind, fitted).sums)
    if not sums:
        raise ValueError("none of the gate's images has valid ground truth: give another --gate")
    return float(from_sums(torch.stack(sums))["delta1"].mean())


def calibration(labels: str | Path) -> list[Tensor]:
    """Crops (3,S,S) uint8 of a labels folder, at most MAX_IMAGES, evenly spread; raises LabelDataset's errors."""
    dataset = LabelDataset(labels)
    return [dataset.get(i, []).image for i in _spread(len(dataset))]


def _of_labels(folder: Path) -> list[BenchmarkSample]:
    dataset = LabelDataset(folder)
    name = dataset.teachers[0]

    def sample(i: int) -> BenchmarkSample:
        return BenchmarkSample(
            dataset.keys[i],
            f"{i}.npy",
            lambda: unit_range(dataset.get(i, []).image),
            lambda: dataset.get(i, [name]).labels[name].shared,
        )

    return [sample(i) for i in _spread(len(dataset)) if name in dataset.teachers_of(i)]


def _spread(count: int) -> list[int]:
    return (
        [round(i * (count - 1) / max(MAX_IMAGES - 1, 1)) for i in range(MAX_IMAGES)]
        if count > MAX_IMAGES
        else list(range(count))
    )
