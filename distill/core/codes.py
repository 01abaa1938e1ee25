"""Maps as integer codes with a range each: what a shard stores, and what travels to and from a device.

A code is two bytes where a value and its validity are five, and every step here is an exact IEEE operation of its own
kernel, so a map that is coded or decoded on a GPU has the bits that the CPU gives it.

Shapes: B maps, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import Labels

INVALID = 0
LAST = 65535


@dataclass(frozen=True, slots=True)
class CodedMaps:
    """Maps as a shard stores them.

    codes: (B,H,W) uint16. low, high: (B,) float64, the range of each map. count: (B,) int64, its valid pixels.
    units: (65536,) float64, what each code means: 0 the lowest value, 1 the highest, NaN an invalid pixel. kind: of the
    values.
    """

    codes: Tensor
    low: Tensor
    high: Tensor
    count: Tensor
    units: Tensor
    kind: Kind

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What belongs to each map."""
        return self.codes, self.low, self.high, self.count

    def to(self, device: torch.device | str) -> CodedMaps:
        """The same maps on another device; copies from pinned memory do not wait."""
        codes, low, high, count = (x.to(device, non_blocking=True) for x in self.tensors)
        return CodedMaps(codes, low, high, count, units_on(self.units, torch.device(device)), self.kind)

    def pin_memory(self) -> CodedMaps:
        """The same maps in page-locked memory, from where a copy to a GPU runs beside the host's work."""
        codes, low, high, count = (x.pin_memory() for x in self.tensors)
        return CodedMaps(codes, low, high, count, self.units, self.kind)

    def decode(self) -> DepthMap:
        """The values in float32, zero where invalid: bit for bit those of `distill.shards.codec.decode_map`."""
        unit = self.units[self.codes.to(torch.int32)]
        span = (self.high - self.low)[:, None, None]
        valid = torch.isfinite(unit)
        values = torch.nan_to_num(unit * span + self.low[:, None, None]).float()
        return DepthMap(values, valid, self.kind)


def join(maps: Sequence[CodedMaps]) -> CodedMaps:
    """Maps of one kind, size and codec along the batch; raises KindError where kinds differ."""
    kinds = sorted({str(m.kind) for m in maps})
    if len(kinds) != 1:
        raise KindError(f"cannot join {' and '.join(kinds)}: convert them to one kind first")
    codes, low, high, count = (torch.cat(parts) for parts in zip(*(m.tensors for m in maps), strict=True))
    return CodedMaps(codes, low, high, count, maps[0].units, maps[0].kind)


@dataclass(frozen=True, slots=True)
class CodedLabels:
    """`distill.core.labels.Labels` whose maps are codes still."""

    shared: CodedMaps
    local: CodedMaps | None
    boxes: Tensor

    def decode(self) -> Labels:
        """The labels, on the device where the codes are."""
        return Labels(self.shared.decode(), None if self.local is None else self.local.decode(), self.boxes)


_UNITS: dict[tuple[int, torch.device], Tensor] = {}


def units_on(units: Tensor, device: torch.device) -> Tensor:
    """The table of a codec on a device, copied there once."""
    if units.device == device:
        return units
    key = (units.data_ptr(), device)
    if key not in _UNITS:
        _UNITS[key] = units.to(device)
    return _UNITS[key]


def encode_linear(values: Tensor, valid: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (B,H,W) uint16 from `first` (lowest value) to LAST (highest), INVALID elsewhere; low, high, count (B,).

    values: (B,H,W) floating. valid: (B,H,W) bool; pixels that are not finite are invalid too. A constant map has the
    code `first` everywhere; one without a valid pixel has low = high = 0.
    """
    exact = values.double()
    usable = valid & torch.isfinite(exact)
    count = usable.sum((1, 2))
    known = count > 0
    low = torch.where(known, torch.where(usable, exact, torch.inf).amin((1, 2)), 0.0)
    high = torch.where(known, torch.where(usable, exact, -torch.inf).amax((1, 2)), 0.0)
    span = high - low
    scale = torch.where(span > 0, 1.0 / torch.where(span > 0, span, 1.0), 0.0)
    unit = torch.where(usable, exact, low[:, None, None]).sub_(low[:, None, None]).mul_(scale[:, None, None])
    codes = unit.clamp_(0.0, 1.0).mul_(LAST - first).round_().add_(first)
    return torch.where(usable, codes, float(INVALID)).to(torch.int32).to(torch.uint16), low, high, count
