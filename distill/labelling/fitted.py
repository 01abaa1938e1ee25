"""The base class of teachers whose maps are fitted to others before storing: by a bridge or to ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distill.core.depth import DepthMap


@dataclass(frozen=True, slots=True)
class FittedTeacher:
    """Wraps a teacher and predicts as it does: the fit comes afterwards."""

    teacher: Any

    @property
    def card(self) -> Any:
        """The wrapped teacher's card."""
        return self.teacher.card

    def predict(self, images: Tensor, *, keys: Sequence[str] | None = None) -> DepthMap:
        """The wrapped teacher's prediction for images (B,3,H,W) in [0,1]. keys: for teachers that draw noise."""
        prediction: DepthMap = self.teacher.predict(images) if keys is None else self.teacher.predict(images, keys=keys)
        return prediction
