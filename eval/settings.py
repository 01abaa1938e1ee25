"""[[benchmarks]] and [score]: the benchmarks and the models that are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill.core.plugins import name_fault, short_name
from distill.core.settings import above, below, raise_faults, unknown_words


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkSettings:
    """A file of eval/benchmarks with its data."""

    name: str
    """One of `distill list benchmarks`, or a Python file of yours ("./mine.py")."""
    root: str = ""
    """The benchmark's data: a folder or the published tar; nothing for those that ship with the project."""
    list: str = ""
    """A file with the samples to use, in the published list's columns; the published list by default."""
    prior: str = ""
    """A list of other samples of the same root, on which the plane baseline is fitted; rendered scenes by
    default."""
    alias: str = ""
    """The name in tables and folders; `name` by default. Needed if two benchmarks have one name."""
    protocol: Literal["marigold", "clean"] = "clean"
    """"marigold" is what Marigold's evaluation computes, oddities included; "clean" fixes them
    (distill.eval.protocol)."""
    alignment: Literal["auto", "affine", "scale", "median", "l1"] = "auto"
    """How a prediction is aligned to the truth: "auto" fits what each model's kind leaves unknown
    (distill.eval.protocol)."""
    offset_positive: bool = False
    """In marigold mode, add a constant to affine disparity so that the fit, which uses only positive pixels, uses all
    of it; this is not the published protocol and has another id."""
    processing_size: int = -1
    """The long side in pixels at which latent-diffusion teachers (Marigold, GenPercept, FiffDepth) work here; 0 takes
    the image as it is, -1 each teacher's own rule. Marigold's scripts: 0 on nyu, kitti and scannet, 756 on eth3d, 640
    on diode."""
    steps: int = 0
    """Denoising steps of teachers that draw noise (Marigold); 0 is each teacher's own number."""
    ensemble: int = 0
    """Predictions per image of teachers that draw noise, aligned and their median taken; 0 is each teacher's own
    number."""
    edges: bool = False
    """Score boundary F1 too, on the same predictions: AbsRel cannot see detail. For benchmarks of depth whose truth is
    dense; written to scores/NAME.edges--MODEL.json."""
    limit: int = 0
    """Score only this many images, the first of the list; 0 scores all."""

    def __post_init__(self) -> None:
        faults = below(self, limit=0, processing_size=-1, steps=0, ensemble=0) + unknown_words(self)
        if fault := name_fault("distill.eval.benchmarks", self.name):
            faults.append(fault)
        if "/" in self.alias_or_name or self.alias_or_name in (".", ".."):
            faults.append(f"alias = {self.alias!r} cannot name a folder of predictions: use a word without slashes")
        raise_faults(faults)

    @property
    def alias_or_name(self) -> str:
        """The name in tables and folders."""
        return self.alias or short_name(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings:
    """Which models `distill score` scores."""

    teachers: bool = True
    """The recipe's teachers."""
    student: bool = True
    """The run's student."""
    plane_prior: bool = True
    """The plane baseline: the best map that does not look at the image."""
    pictures: int = 4
    """Pictures per benchmark in the report."""

    def __post_init__(self) -> None:
        raise_faults(below(self, pictures=0) + above(self, pictures=1000))
