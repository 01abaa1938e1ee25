"""Everything that defines how a number was made; two numbers are comparable only if their protocols are the same.

A protocol has a short `id`, the hash of all its fields. The only difference that a table may allow is the alignment (a
disparity model is fitted in disparity, a depth model in depth, as every paper does): request it with
`across_alignments=True` and show the alignment beside the number.

Two modes. `marigold` is what prs-eth/Marigold's `script/depth/eval.py` computes, oddities included. `clean` fixes
them: the fit uses every valid pixel (not every sixth column, and not only where the prediction is positive), the
truth must lie inside the benchmark's range even where the benchmark ships a mask (DIODE), and an aligned prediction
is clipped to the range of the image's own truth instead of a disparity floor of 0.001 and a depth of 1e-5.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from distill.core.depth import Kind

MODES = ("marigold", "clean")
"""The modes of a recipe. Another project's protocol has its name in eval.rivals as its mode."""
RIVAL_MODES = ("zipdepth", "moge_disparity", "moge_scale", "ultralytics", "depth_anything")

ALIGNMENTS = {
    Kind.METRIC_DEPTH: "none",
    Kind.METRIC_DISPARITY: "none",
    Kind.SCALE_DEPTH: "scale in depth",
    Kind.SCALE_DISPARITY: "scale in disparity",
    Kind.AFFINE_DEPTH: "scale and shift in depth",
    Kind.AFFINE_DISPARITY: "scale and shift in disparity",
}

CHOICES = ("auto", "affine", "scale", "median", "l1")
"""How a prediction may be aligned to the truth. auto: by what its kind leaves unknown, as every paper does. affine,
scale: least squares for scale and shift, or scale alone. median: a scale by the ratio of the medians alone, as
self-supervised depth is scored."""

TASKS = {
    "depth": "ten metrics of depth",
    "boundary_f1": "sharpness of depth edges: needs no scale, and a shift only where the kind leaves one unknown",
    "boundary_recall": "depth edges on a matte's edge: there is no depth to align to",
    "order": "which of two points is nearer: any increasing map of the prediction gives the same answer",
}
"""What is measured (distill.eval.tasks)."""

_WORDS = {
    "affine": "scale and shift",
    "scale": "scale",
    "median": "scale by medians",
    "l1": "scale of least relative error",
}


def alignment(kind: Kind, choice: str = "auto") -> str:
    """How a prediction of `kind` is aligned, in words; raises ValueError for a choice not in CHOICES."""
    if choice not in CHOICES:
        raise ValueError(f"alignment must be one of {', '.join(CHOICES)}, not {choice!r}")
    return ALIGNMENTS[kind] if choice == "auto" else f"{_WORDS[choice]} in {kind.quantity}"


def choice_of(words: str) -> str:
    """The choice that `alignment` put into these words; "" for "none" and for no words."""
    return next((choice for choice, start in _WORDS.items() if words.rpartition(" in ")[0] == start), "")


class ProtocolError(ValueError):
    """Numbers of different protocols were to be compared; the message says where the protocols differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Everything that a number depends on besides the prediction.

    benchmark: name of the file in eval/benchmarks/. mode: "marigold" or "clean". task: a key of TASKS.
    num_images, list_sha256: the images scored; the hash is over their keys, sorted, joined by newlines.
    truth: the kinds of the ground truth ("metric_depth"); where it is not metric, scores are in the truth's own space.
    alignment: how the prediction is aligned to the truth (see `alignment`); empty until a kind is chosen.
    fit_columns: the fit uses this many columns of the map (Marigold's `--alignment_max_res`); None for all.
    fit_positive: a disparity is fitted only where the prediction is positive (Marigold).
    offset_positive: a constant is added to an affine disparity first, so that all of it is positive. Its shift is
    unknown, so this is allowed; the fit then uses all pixels. Not the published protocol.
    disparity_floor: the minimum of aligned disparity; None is one over the largest valid truth of the image.
    min_depth, max_depth: metres; the truth lies strictly between them, aligned predictions are clipped to them.
    clip: "range" clips aligned predictions to [min_depth, max_depth] only; "truth" also to the range of the image's
    own truth, if scale and shift were fitted.
    mask_range: the truth is also invalid outside (min_depth, max_depth). False where only the benchmark's mask decides.
    crop, mask, resize, pooling: in words.
    space: "" measures errors of depth where the truth is metric; "disparity" measures those of one over depth.
    """

    benchmark: str
    mode: str = "clean"
    num_images: int = 0
    list_sha256: str = ""
    truth: str = "metric_depth"
    alignment: str = ""
    fit_columns: int | None = None
    fit_positive: bool = False
    offset_positive: bool = False
    disparity_floor: float | None = None
    min_depth: float = 0.0
    max_depth: float = math.inf
    clip: str = "truth"
    mask_range: bool = True
    crop: str = "none"
    mask: str = "valid truth"
    resize: str = "none: the prediction has the truth's size"
    pooling: str = "mean over images"
    task: str = "depth"
    space: str = ""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"a protocol's task must be one of {', '.join(TASKS)}, not {self.task!r}")
        if self.mode not in MODES + RIVAL_MODES:
            raise ValueError(f"a protocol's mode must be one of {', '.join(MODES + RIVAL_MODES)}, not {self.mode!r}")
        if self.space not in ("", "disparity"):
            raise ValueError(f'a protocol\'s space must be "" or "disparity", not {self.space!r}')

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits, the same on every machine; numbers with equal ids are comparable."""
        return _digest(self.as_dict())

    @property
    def setting(self) -> str:
        """The id without the alignment: what predictions of different kinds can share."""
        return _digest(replace(self, alignment="").as_dict())

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them; infinity is the string "inf"."""
        return {name: "inf" if value == math.inf else value for name, value in asdict(self).items()}

    def with_kind(self, kind: Kind | str, choice: str = "auto") -> Protocol:
        """The protocol of scoring a prediction of this kind, aligned as one of CHOICES says."""
        words = alignment(Kind(kind), choice)
        if self.task != "depth" and choice != "auto":
            raise ValueError(f"{self.benchmark} takes no other alignment ({TASKS[self.task]}); leave it at auto")
        fitted = self.task == "depth" or (self.task == "boundary_f1" and Kind(kind).unknown == "affine")
        return replace(self, alignment=words if fitted else "none")

    def of_edges(self) -> Protocol:
        """The protocol of boundary F1 on the same images: fitted as in clean mode, edges between valid pixels."""
        if self.task != "depth":
            raise ProtocolError(f"{self.benchmark} has no depth whose edges could be scored ({TASKS[self.task]})")
        clean = self.in_mode("clean")
        return replace(clean, task="boundary_f1", mask=f"edges between two pixels of: {self.mask}", alignment="")

    def with_offset(self, kind: Kind | str) -> Protocol:
        """The same with `offset_positive`, where it has an effect: for affine disparity fitted at positive pixels."""
        affine = self.alignment in ("", ALIGNMENTS[Kind.AFFINE_DISPARITY])
        has_effect = self.fit_positive and affine and Kind(kind) == Kind.AFFINE_DISPARITY
        return replace(self, offset_positive=True) if has_effect else self

    def in_mode(self, mode: str) -> Protocol:
        """The same benchmark in another mode; only marigold -> clean exists, since clean drops Marigold's oddities."""
        if mode == self.mode:
            return self
        if mode not in MODES:
            raise ValueError(f"protocol must be marigold or clean, not {mode!r}")
        if mode == "marigold":
            raise ProtocolError(
                f"{self.benchmark} has no published Marigold protocol; score it with the clean protocol"
            )
        return replace(
            self,
            mode="clean",
            fit_columns=None,
            fit_positive=False,
            offset_positive=False,
            disparity_floor=None,
            clip="truth",
            mask_range=True,
        )


def from_dict(table: Mapping[str, Any]) -> Protocol:
    """The inverse of `Protocol.as_dict`; a stored "id" is checked, so that an edited file is noticed."""
    known = {field.name for field in fields(Protocol)}
    unknown = set(table) - known - {"id"}
    if unknown:
        raise ValueError(f"unknown protocol field {', '.join(sorted(unknown))}: was it written by a newer version?")
    values: dict[str, Any] = {key: math.inf if table[key] == "inf" else table[key] for key in known & set(table)}
    protocol = Protocol(**values)
    if "id" in table and table["id"] != protocol.id:
        raise ValueError(f"protocol id {table['id']} does not match its fields (they give {protocol.id})")
    return protocol


def list_hash(keys: Iterable[str]) -> str:
    """sha256 of the keys, sorted and joined by newlines: how the published lists are identified here."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


def require_same(protocols: Mapping[str, Protocol], *, across_alignments: bool = False) -> None:
    """Raise ProtocolError unless all protocols, by the name of the number that they belong to, are the same.

    across_alignments: allow numbers that differ only in their alignment; the caller then shows it.
    """
    named = list(protocols.items())
    for name, protocol in named[1:]:
        first_name, first = named[0]
        if across_alignments:
            first, protocol = replace(first, alignment=""), replace(protocol, alignment="")
        if first != protocol:
            a, b = first.as_dict(), protocol.as_dict()
            differ = "; ".join(f"{key} {a[key]!r} against {b[key]!r}" for key in a if a[key] != b[key])
            raise ProtocolError(
                f"{first_name} and {name} were scored by different protocols and are not comparable: {differ}"
            )


def _digest(table: Mapping[str, Any]) -> str:
    """The hash of the fields; fields added later count only if not at their default, so that old ids stay valid."""
    later: dict[str, Any] = {"task": "depth", "offset_positive": False, "space": ""}
    table = {name: value for name, value in table.items() if name not in later or value != later[name]}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:12]
