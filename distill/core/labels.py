"""The labels of a batch of regions, in the form the objective reads: maps and their supervision.

Shapes: B regions, N patches per region, S region size, P patch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.core.depth import DepthMap, Kind

# Ground truth with a smaller fraction of valid pixels in a region is sparse: a lidar's lines cover about a twentieth, a
# depth camera or a renderer nearly all. The threshold is ours.
DENSE = 0.25


@dataclass(frozen=True, slots=True)
class Supervision:
    """The source and type of labels: it selects the objective, and only labels of one supervision share a tensor.

    teacher: the name under which they are stored. kind: of the maps as they are stored. truth: measured or rendered,
    not predicted by a network. dense: most pixels are known; always True for pseudo-labels.
    """

    teacher: str = ""
    kind: Kind = Kind.AFFINE_DISPARITY
    truth: bool = False
    dense: bool = True

    @property
    def metric(self) -> bool:
        """Whether the maps are in metres, or in one over metres."""
        return self.kind.unknown == "metric"

    @classmethod
    def of(cls, shared: DepthMap, *, teacher: str, truth: bool) -> Supervision:
        """Return the supervision of one region, whose map is `shared` (1,S,S)."""
        dense = not truth or float(shared.valid.float().mean()) >= DENSE
        return cls(teacher, shared.kind, truth, dense)


@dataclass(frozen=True, slots=True)
class Labels:
    """One teacher's labels of B regions.

    shared: the teacher's map of the whole region, (B,S,S).
    local: its maps of the patches, (B*N,P,P), region by region; None where the labels have no patches.
    boxes: where the patches lie, (B,N,4): top, left, bottom, right as fractions of the region. Regions with fewer
    than N patches repeat a box, with a map that has no valid pixel.
    shared_weight, local_weight: the weight of each pixel, shaped like the maps; None: all equal. Only averages of
    teachers have them, and they are made last, from augmented labels.
    supervision: the same for all regions. Its kind stays that of the stored maps when `convert` changes the maps.
    """

    shared: DepthMap
    local: DepthMap | None
    boxes: Tensor
    shared_weight: Tensor | None = None
    local_weight: Tensor | None = None
    supervision: Supervision = Supervision()  # noqa: RUF009  (frozen)

    @property
    def known(self) -> Tensor:
        """(B,) bool: the regions with any valid pixel, in the region's map or in a patch's."""
        known = self.shared.valid.flatten(1).any(1)
        return known if self.local is None else known | self.local.valid.reshape(len(known), -1).any(1)

    def to(self, device: torch.device | str) -> Labels:
        """The same labels on another device."""
        local = None if self.local is None else self.local.to(device)
        shared_weight, local_weight = (
            None if w is None else w.to(device) for w in (self.shared_weight, self.local_weight)
        )
        boxes = self.boxes.to(device)
        return Labels(self.shared.to(device), local, boxes, shared_weight, local_weight, self.supervision)

    def convert(self, kind: Kind | str) -> Labels:
        """Convert the labels to another kind; raises distill.core.depth.KindError where that is impossible."""
        local = None if self.local is None else self.local.convert(kind)
        return replace(self, shared=self.shared.convert(kind), local=local)


def stack_boxes(boxes: Sequence[Tensor], count: int) -> Tensor:
    """(B,count,4) from each region's boxes (1,n,4), padded by its first one; by the whole region where it has none."""
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    rows = [torch.cat([own, (own[:1] if len(own) else whole).expand(count - len(own), 4)]) for (own,) in boxes]
    return torch.stack(rows)


@dataclass(frozen=True, slots=True)
class Batch:
    """Regions and every teacher's labels of them.

    keys: one per region. images: (B,3,S,S) float32 in [0,1]. labels: by teacher name.
    """

    keys: tuple[str, ...]
    images: Tensor
    labels: dict[str, Labels]

    def __len__(self) -> int:
        return len(self.keys)
