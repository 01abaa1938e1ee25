"""Maps as integer codes, each map with its own range: the form that shards store and that moves between devices.

A code takes two bytes, where a value and its validity take five. Every step here is one IEEE operation, rounded once,
so a map coded or decoded on a GPU has the same bits as on the CPU.

Shapes: B maps, H height, W width.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.core.depth import DepthMap, Kind, KindError, least_known
from distill.core.labels import Labels, Supervision, stack_boxes
from distill.core.trial import DifferentResultError, failure

INVALID = 0
LAST = 65535


@dataclass(frozen=True, slots=True)
class CodedMaps:
    """Maps as a shard stores them.

    codes: (B,H,W) uint16. low, high: (B,) float64, the range of each map. count: (B,) int64, its valid pixels.
    codec: the name of the codec that the codes belong to, see `register`. kind: of the values.
    """

    codes: Tensor
    low: Tensor
    high: Tensor
    count: Tensor
    codec: str
    kind: Kind

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors that have one entry per map."""
        return self.codes, self.low, self.high, self.count

    def to(self, device: torch.device | str) -> CodedMaps:
        """The same maps on another device; copies from pinned memory are asynchronous."""
        codes, low, high, count = (x.to(device, non_blocking=True) for x in self.tensors)
        return CodedMaps(codes, low, high, count, self.codec, self.kind)

    def decode(self) -> DepthMap:
        """The values in float32, zero where invalid: bit-identical to `distill.shards.codec.decode_map`."""
        units = units_of(self.codec, self.codes.device)
        fused = _fused_decode(self.codes.device) if self.codes.is_cuda else None
        values, valid = (fused or decode_values)(self.codes, self.low, self.high, units)
        return DepthMap(values, valid, self.kind)


def decode_values(codes: Tensor, low: Tensor, high: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B,H,W) float32 and valid (B,H,W) bool of codes (B,H,W) uint16.

    low, high: (B,) float64. units: (65536,) float64, as for `register`.
    """
    span, wide = (high - low)[:, None], codes.to(torch.int32)
    valid = torch.isfinite(units)[wide]
    if codes[:1].numel() < len(units):
        flat = torch.nan_to_num(low[:, None] + units[wide.flatten(1)] * span)
        return flat.float().reshape(codes.shape), valid
    # For a large map a table of its float32 values costs less than float64 arithmetic per pixel.
    tables = torch.nan_to_num(low[:, None] + units * span).float()
    starts = torch.arange(len(codes), dtype=torch.int32, device=codes.device) * len(units)
    return tables.flatten()[wide + starts[:, None, None]], valid


@functools.cache
def _fused_decode(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The kernel that decodes on a GPU; None, with one warning, where it fails or has other bits than torch."""

    def compare() -> None:
        from distill.core import codes_kernel

        example = [x.to(device) for x in codes_kernel.example()]
        expected = decode_values(*example)
        for _ in range(2):  # a kernel that was launched before is launched another way (core.launch)
            pairs = zip(codes_kernel.decode_values(*example), expected, strict=True)
            if not all(torch.equal(*pair) for pair in pairs):
                raise DifferentResultError("it has other bits")

    if reason := failure(compare):
        line = f"the kernel that decodes labels fails here ({reason}): using the slower torch code"
        warnings.warn(line, stacklevel=4)
        return None
    from distill.core import codes_kernel

    return codes_kernel.decode_values


def join(maps: Sequence[CodedMaps]) -> CodedMaps:
    """Concatenate maps of one kind, size and codec along the batch; raises KindError if kinds differ."""
    kinds = sorted({str(m.kind) for m in maps})
    if len(kinds) != 1:
        raise KindError(f"cannot join {' and '.join(kinds)}: convert them to one kind first")
    codes, low, high, count = (torch.cat(parts) for parts in zip(*(m.tensors for m in maps), strict=True))
    return CodedMaps(codes, low, high, count, maps[0].codec, maps[0].kind)


@dataclass(frozen=True, slots=True)
class CodedLabels:
    """`distill.core.labels.Labels` whose maps are still coded."""

    shared: CodedMaps
    local: CodedMaps | None
    boxes: Tensor
    supervision: Supervision = Supervision()  # noqa: RUF009  (frozen)

    def to(self, device: torch.device | str) -> CodedLabels:
        """The same labels on another device; copies from pinned memory are asynchronous."""
        local = None if self.local is None else self.local.to(device)
        return replace(self, shared=self.shared.to(device), local=local, boxes=self.boxes.to(device, non_blocking=True))

    def decode(self) -> Labels:
        """The decoded labels, on the device of the codes."""
        local = None if self.local is None else self.local.decode()
        return Labels(self.shared.decode(), local, self.boxes, supervision=self.supervision)


def stack(labels: Sequence[CodedLabels]) -> CodedLabels:
    """Stack regions of one supervision into a batch, padded to the most patches as `distill.core.labels.Labels` says.

    The kind is the least known of all: metric beside scale gives scale. Raises KindError if depth and disparity are
    mixed.
    """
    kind = least_known(region.shared.kind for region in labels)
    shared = join([_as(region.shared, kind) for region in labels])
    supervision = replace(labels[0].supervision, kind=kind)
    counts = [0 if region.local is None else len(region.local) for region in labels]
    max_patches = max(counts)
    if max_patches == 0:
        return CodedLabels(shared, None, torch.zeros(len(labels), 0, 4), supervision)
    template = next(region.local for region in labels if region.local is not None and len(region.local))
    maps = []
    for region, count in zip(labels, counts, strict=True):
        if region.local is not None and count:
            maps.append(_as(region.local, kind))
        if count < max_patches:
            blank = (torch.zeros((max_patches - count, *x.shape[1:]), dtype=x.dtype) for x in template.tensors)
            codes, low, high, valid_counts = blank
            maps.append(CodedMaps(codes, low, high, valid_counts, template.codec, kind))
    boxes = stack_boxes([region.boxes for region in labels], max_patches)
    return CodedLabels(shared, join(maps), boxes, supervision)


def _as(maps: CodedMaps, kind: Kind) -> CodedMaps:
    return replace(maps, kind=kind) if maps.kind.quantity == kind.quantity else maps


_UNITS: dict[tuple[str, torch.device], Tensor] = {}


def register(codec: str, units: Tensor) -> None:
    """Register what a codec's codes mean: units (65536,) float64, 0 a map's lowest value, 1 its highest, NaN invalid.

    Maps name their codec because they move between processes, and a table with each would be larger than a small map.
    """
    _UNITS[codec, torch.device("cpu")] = units


def units_of(codec: str, device: torch.device) -> Tensor:
    """Return the `units` table of a codec on a device, copied there once."""
    if (codec, device) not in _UNITS:
        _UNITS[codec, device] = _UNITS[codec, torch.device("cpu")].to(device)
    return _UNITS[codec, device]


def encode_linear(values: Tensor, valid: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (B,H,W) uint16 from `first` (lowest value) to LAST (highest), INVALID elsewhere; low, high, count (B,).

    values: (B,H,W) floating. valid: (B,H,W) bool; pixels that are not finite are invalid too. A constant map has the
    code `first` everywhere; one without a valid pixel has low = high = 0.
    """
    exact = values.double()
    usable = valid & torch.isfinite(exact)
    count = usable.sum((1, 2))
    has_valid = count > 0
    low = torch.where(has_valid, torch.where(usable, exact, torch.inf).amin((1, 2)), 0.0)
    high = torch.where(has_valid, torch.where(usable, exact, -torch.inf).amax((1, 2)), 0.0)
    span = high - low
    scale = torch.where(span > 0, 1.0 / torch.where(span > 0, span, 1.0), 0.0)
    unit = torch.where(usable, exact, low[:, None, None]).sub_(low[:, None, None]).mul_(scale[:, None, None])
    codes = unit.clamp_(0.0, 1.0).mul_(LAST - first).round_().add_(first)
    return torch.where(usable, codes, float(INVALID)).to(torch.int32).to(torch.uint16), low, high, count
