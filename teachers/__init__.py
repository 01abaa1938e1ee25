"""Teachers: the Teacher protocol, the card of facts about a checkpoint, and helpers that the teacher files share.

One file in this folder is one teacher; its name is the file's name. Each offers `class Teacher` and `CARDS`, the
published checkpoints it knows, the default first. Upstream packages are imported inside `load`, so importing a
teacher's file is cheap.

A teacher's worst failure is silent: weights that stay random because their names did not match. So every parameter of
the network must be in the file, and every tensor of the file must belong to the network.

Shapes: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from distill.core.weights import (
    WeightsMismatchError,
    WeightsMissingError,
    below_prefix,
    find_weights,
    mentions,
    read_state,
)
from distill.teachers._strictly import REPORT_MISMATCHES, check_claimed, load_checked, load_strictly, sizing_tensors
from distill.teachers._where import WEIGHT_SUFFIXES, cached_revision, read_config, resolve, revision_of, to_download

# Reading a teacher's settings (distill.teachers._settings) imports this package and must not wait for torch.
if TYPE_CHECKING:
    from torch import Tensor

    from distill.core.depth import DepthMap, Kind

__all__ = [
    "REPORT_MISMATCHES",
    "WEIGHT_SUFFIXES",
    "Card",
    "Teacher",
    "WeightsMismatchError",
    "WeightsMissingError",
    "below_prefix",
    "cached_revision",
    "card_for",
    "check_claimed",
    "check_images",
    "check_resize",
    "find_weights",
    "finite",
    "load_checked",
    "load_strictly",
    "pad_to_multiple",
    "read_config",
    "mentions",
    "read_state",
    "resolve",
    "revision_of",
    "sizing_tensors",
    "to_download",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Facts about a teacher's checkpoint; stored with every label that it makes.

    name: the plug-in's. weights: hub id or path. kind: of the maps. licence: of the weights; code_licence: of the code
    they came with. commercial: whether the weights' licence allows commercial use (False if unknown).
    revision: the hub's commit, or the weights' sha256. multiple: input sides must be multiples of it.
    native_size: of the authors' resizing rule (None: no resizing). seeded: predict takes `keys=` and draws its noise
    from them. source: repository and file, or paper.
    """

    name: str
    weights: str
    kind: Kind
    licence: str
    code_licence: str
    commercial: bool
    revision: str = "unknown"
    multiple: int = 1
    native_size: int | None = None
    source: str = ""
    note: str = ""
    seeded: bool = False

    @property
    def larger_is(self) -> str:
        """ "farther" or "nearer": what a larger value means."""
        return self.kind.larger_is


class Teacher(Protocol):
    """The interface of every teacher; `load` takes teacher-specific options as further keywords."""

    card: Card

    def predict(self, images: Tensor) -> DepthMap:
        """Depth of images (B,3,H,W) float32 RGB in [0,1], at H x W. A batch of N equals N batches of one."""
        ...


def check_images(images: Tensor) -> Tensor:
    """(B,3,H,W) floating RGB as float32; raises ValueError for anything else. Values outside [0,1] pass unclamped."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        advice = []
        if images.ndim in (3, 4) and images.shape[-3] != 3:
            if images.shape[-1] == 3:
                advice.append(f"its channels are last: permute({'2, 0, 1' if images.ndim == 3 else '0, 3, 1, 2'})")
            else:
                advice.append("it needs 3 channels")
        if images.ndim == 3:
            advice.append("add the batch dimension: images[None]")
        if not images.is_floating_point():
            advice.append("divide uint8 by 255")
        requirement = f"images must be (B,3,H,W) float RGB in [0,1], not {tuple(images.shape)} {images.dtype}"
        raise ValueError(f"{requirement}{': ' if advice else ''}{'; '.join(advice)}")
    return images.float()


def check_resize(resize: str, native_size: int | None, *, zero_is_given: bool = False) -> None:
    """Raises ValueError unless resize is "native" or "none" and native_size fits it (0 may mean "as given")."""
    if resize not in ("native", "none"):
        raise ValueError(f'resize must be "native" (the authors\' rule) or "none" (the size given), not {resize!r}')
    if native_size is not None and native_size < (0 if zero_is_given else 1):
        raise ValueError(f"native_size must be a positive number of pixels, not {native_size}")
    if resize == "none" and native_size is not None:
        raise ValueError('native_size has no meaning with resize="none": leave one of them out')


def finite(values: Tensor, kind: Kind) -> DepthMap:
    """A map of (B,H,W) values, valid wherever they are finite."""
    from distill.core.depth import DepthMap

    values = values.float()
    return DepthMap(values, values.isfinite(), kind)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """(B,C,H,W) with its last rows and columns repeated until both sides are multiples; cut the output to [:H, :W]."""
    from torch.nn import functional

    below, right = -images.shape[-2] % multiple, -images.shape[-1] % multiple
    return functional.pad(images, (0, right, 0, below), mode="replicate") if below or right else images


def card_for(cards: Sequence[Card], weights: str | Path) -> Card:
    """The published card of `weights`; else the first card's facts, with no licence claimed.

    A local path is recognised if it contains the published id's name: "x/Depth-Anything-V2-Large/a.pth", or the hub's
    own cache.
    """
    text = f"/{Path(str(weights).partition('@')[0]).as_posix()}/"
    for card in cards:
        name = card.weights.partition("/")[2]
        if f"/{name}/" in text or f"/models--{card.weights.replace('/', '--')}/" in text:
            return replace(card, weights=str(weights))
    return replace(
        cards[0], weights=str(weights), licence="unknown", commercial=False, note="weights of unknown origin"
    )
