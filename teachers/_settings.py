"""[[teachers]]: the teachers of a recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from distill.core.plugins import name_fault, short_name
from distill.core.settings import raise_faults, unknown_words

RESIZING = ("resize", "native_size")
"""Options of `load` that set the size at which a network works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    """One teacher: a file of teachers/ with its weights and options, or the images' own ground truth."""

    name: str
    """One of `distill list teachers`, a Python file of yours ("./mine.py"), or "truth", the source's own ground
    truth."""
    weights: str = ""
    """A hub id, a file or a folder; the first of the teacher's cards by default."""
    alias: str = ""
    """The name in labels, logs and tables; `name` by default. Needed if two teachers have the same name."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The number format that the network computes in."""
    compile: bool = False
    """Compile its networks (torch.compile) for the one size of crops: faster on a GPU after a minute's start; the
    manifest says how far its maps are from eager float32 ones."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the teacher's `load` when it makes labels; of "truth": how it is corrupted
    (distill.data.corruptions)."""
    score_options: dict[str, Any] = field(default_factory=dict)
    """Options that differ when it is scored. Scoring takes `options` without `resize` and `native_size`, which were
    chosen for crops: the authors' own resizing applies, unless set here."""

    def __post_init__(self) -> None:
        raise_faults(unknown_words(self))
        fault = "" if self.name == "truth" else name_fault("distill.teachers", self.name)
        if fault:
            raise ValueError(fault)
        if "." in self.alias_or_name or "/" in self.alias_or_name:
            raise ValueError(f"{self.alias_or_name!r} cannot name a label: set alias to a word without dots or slashes")

    @property
    def content(self) -> dict[str, Any]:
        """The settings that determine the content of a labels folder."""
        return {key: value for key, value in asdict(self).items() if key != "score_options"}

    @property
    def scored_with(self) -> dict[str, Any]:
        """Options of `load` when it is scored, before those that a benchmark adds."""
        return {key: value for key, value in self.options.items() if key not in RESIZING} | self.score_options

    @property
    def alias_or_name(self) -> str:
        """The name under which the labels are stored."""
        return self.alias or short_name(self.name)
