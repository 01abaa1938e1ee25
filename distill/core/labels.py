"""What teachers say about a batch of regions, in the form the objective reads it.

Shapes: B regions, N patches per region, S region size, P patch size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.depth import DepthMap


@dataclass(frozen=True, slots=True)
class Labels:
    """One teacher's labels of B regions.

    shared: the teacher's map of the whole region, (B,S,S).
    local: its maps of the patches, (B*N,P,P), region by region; None where the labels have no patches.
    boxes: where the patches lie, (B,N,4): top, left, bottom, right as fractions of the region. Regions with fewer
    than N patches repeat a box whose map is nowhere valid.
    shared_weight, local_weight: how much each pixel counts, shaped like the maps; None: all alike. Only averages of
    teachers have them, and they are made last, from augmented labels.
    """

    shared: DepthMap
    local: DepthMap | None
    boxes: Tensor
    shared_weight: Tensor | None = None
    local_weight: Tensor | None = None

    def to(self, device: torch.device | str) -> Labels:
        """The same labels on another device."""
        local = None if self.local is None else self.local.to(device)
        weights = (None if w is None else w.to(device) for w in (self.shared_weight, self.local_weight))
        return Labels(self.shared.to(device), local, self.boxes.to(device), *weights)


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
