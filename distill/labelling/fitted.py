"""A teacher whose maps are fitted to others before they are stored: what a bridge and a fit to ground truth share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distill.core.depth import DepthMap


@dataclass(frozen=True, slots=True)
class FittedTeacher:
    """The teacher itself, as whoever asks it sees it: the fit comes after."""

    teacher: Any

    @property
    def card(self) -> Any:
        """The teacher's own."""
        return self.teacher.card

    def predict(self, images: Tensor, *, keys: Sequence[str] | None = None) -> DepthMap:
        """What the teacher says of images (B,3,H,W) in [0,1]. keys: for teachers that draw noise."""
        prediction: DepthMap = self.teacher.predict(images) if keys is None else self.teacher.predict(images, keys=keys)
        return prediction
