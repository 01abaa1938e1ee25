"""Depth maps: values, the mask of usable values, and the kind that says what they mean.

A map's `Kind` is its quantity (depth or disparity) and what is unknown about it (nothing, the scale, or the scale and
the shift). Kinds decide which alignment a score may use and which labels a loss may mix; maps of different kinds cannot
be mixed by accident.

Shapes: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class KindError(ValueError):
    """Two kinds cannot be combined or converted; the message names both and the remedy."""


UNKNOWNS = ("metric", "scale", "affine")
"""What may be unknown about a map, from least to most: nothing, the scale, the scale and the shift."""


class Kind(StrEnum):
    """Quantity x what is unknown. Depth grows with distance, disparity with nearness."""

    METRIC_DEPTH = "metric_depth"
    SCALE_DEPTH = "scale_depth"
    AFFINE_DEPTH = "affine_depth"
    METRIC_DISPARITY = "metric_disparity"
    SCALE_DISPARITY = "scale_disparity"
    AFFINE_DISPARITY = "affine_disparity"
    # The same members by the names that files and messages use.
    metric_depth = METRIC_DEPTH
    scale_depth = SCALE_DEPTH
    affine_depth = AFFINE_DEPTH
    metric_disparity = METRIC_DISPARITY
    scale_disparity = SCALE_DISPARITY
    affine_disparity = AFFINE_DISPARITY

    @property
    def quantity(self) -> str:
        """ "depth" or "disparity"."""
        return self.value.split("_")[1]

    @property
    def unknown(self) -> str:
        """ "metric" (nothing), "scale", or "affine" (scale and shift)."""
        return self.value.split("_")[0]

    @property
    def larger_is(self) -> str:
        """ "farther" for depth, "nearer" for disparity."""
        return "farther" if self.quantity == "depth" else "nearer"

    def can_become(self, kind: Kind) -> bool:
        """Whether `DepthMap.convert` can do it: knowledge may be dropped, and 1/x needs a known shift."""
        if UNKNOWNS.index(kind.unknown) < UNKNOWNS.index(self.unknown):
            return False
        return self.quantity == kind.quantity or self.unknown != "affine"


@dataclass(frozen=True, slots=True)
class DepthMap:
    """A batch of depth maps with their valid pixels and kind.

    values: (B,H,W) float32. Undefined where `valid` is False (any number, NaN included).
    valid: (B,H,W) bool, True where a value may be used.
    kind: what the values are.
    """

    values: Tensor
    valid: Tensor
    kind: Kind

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.values.shape != self.valid.shape:
            raise ValueError(
                f"values and valid must both be (B,H,W), not {tuple(self.values.shape)} and {tuple(self.valid.shape)}"
            )
        if self.valid.dtype != torch.bool:
            raise ValueError(f"valid must be bool, not {self.valid.dtype}")
        object.__setattr__(self, "values", self.values.float())
        object.__setattr__(self, "kind", Kind(self.kind))

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, index: slice) -> DepthMap:
        """A sub-batch; the index must keep the batch dimension."""
        return DepthMap(self.values[index], self.valid[index], self.kind)

    def to(self, device: torch.device | str) -> DepthMap:
        """The same map on another device."""
        return DepthMap(self.values.to(device), self.valid.to(device), self.kind)

    def convert(self, kind: Kind | str) -> DepthMap:
        """Convert the map to another kind, where that is possible.

        depth <-> disparity inverts exactly, and only if no shift is unknown; pixels that are not positive and finite
        become invalid. Knowledge may be dropped (metric -> scale -> affine), never invented. Raises KindError naming
        both kinds.
        """
        kind = Kind(kind)
        if kind == self.kind:
            return self
        if UNKNOWNS.index(kind.unknown) < UNKNOWNS.index(self.kind.unknown):
            missing = "scale" if self.kind.unknown == "scale" else "scale and shift"
            raise KindError(
                f"{self.kind} cannot become {kind}: its {missing} would have to be invented. "
                f"Align it to a ground truth first, or ask for {self.kind}"
            )
        if kind.quantity == self.kind.quantity:
            return DepthMap(self.values, self.valid, kind)
        if self.kind.unknown == "affine":
            raise KindError(
                f"{self.kind} cannot become {kind}: its shift is unknown, so 1/x means nothing. Use a checkpoint that "
                f'predicts {kind.quantity}, or bridge = "primary", which fits the missing shift to another teacher'
            )
        usable = self.valid & torch.isfinite(self.values) & (self.values > 0)
        inverted = torch.where(usable, 1.0 / torch.where(usable, self.values, 1.0), 0.0)
        return DepthMap(inverted, usable, kind)


def least_known(kinds: Iterable[Kind]) -> Kind:
    """Return the kind of which least is known, the first among equals: metric beside scale gives scale."""
    return max(kinds, key=lambda kind: UNKNOWNS.index(kind.unknown))


def cat(maps: Sequence[DepthMap]) -> DepthMap:
    """Concatenate maps of one kind and size along the batch; raises KindError if kinds differ."""
    kinds = sorted({str(m.kind) for m in maps})
    if len(kinds) != 1:
        raise KindError(f"cannot join {' and '.join(kinds)}: convert them to one kind first")
    return DepthMap(torch.cat([m.values for m in maps]), torch.cat([m.valid for m in maps]), maps[0].kind)
