"""[run] and [compare]: the run's name, folder, seed and device; what `distill compare` looks at."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from distill.core.settings import above, below, raise_faults


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """The run's name, its folder, and the one seed that everything is drawn from."""

    name: str
    """The run's name."""
    out: str = ""
    """The run's folder, a path; runs/NAME by default."""
    seed: int = 0
    """The random seed of everything: scenes, crops, order, weights."""
    device: str = "auto"
    """"auto" (CUDA, then Apple's GPU, then the CPU), cpu, cuda, cuda:N, mps or xpu."""

    def __post_init__(self) -> None:
        faults = below(self, seed=0)
        if not self.name.strip() or {".", ".."} & set(self.name.split("/")):
            faults.append(f"name = {self.name!r} cannot name a folder below runs/: use a plain word")
        if "://" in self.out:
            faults.append(
                f"out = {self.out!r}: a run writes to a path, since it finishes files by renaming them; mount it"
            )
        if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", self.device):
            faults.append(f"device must be auto, cpu, cuda, cuda:N, mps or xpu, not {self.device!r}")
        raise_faults(faults)

    @property
    def folder(self) -> Path:
        """The run's folder; "runs/NAME" by default."""
        return Path(self.out or f"runs/{self.name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSettings:
    """What `distill compare` looks at."""

    limit: int = 200
    """Images, taken evenly from all sources; 0 takes all."""
    side: int = 640
    """Larger images are shrunk until their longer side has this many pixels."""
    student: bool = True
    """The run's student takes part too, once it is trained."""
    time_at: int = 0
    """Every model is also timed on one square image with sides of this many pixels, the median of 20 calls after
    warm-up; 0 = off. `--size` sets it."""

    def __post_init__(self) -> None:
        raise_faults(below(self, limit=0, side=32, time_at=0) + above(self, side=65536, time_at=8192))
