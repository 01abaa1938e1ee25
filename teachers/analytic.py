"""A teacher for tests and demonstrations: depth computed from the colours by a formula, with no weights.

Its answer is known exactly at every pixel, so whatever is built on it (labels, losses, scores) can be checked. It knows
nothing about depth. It computes on the images' own device, so `device` changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distill.core.depth import DepthMap, Kind
from distill.teachers import Card, WeightsMissingError, check_images, finite

CARDS: tuple[Card, ...] = (
    Card(
        name="analytic",
        weights="none",
        kind=Kind.AFFINE_DISPARITY,
        licence="none needed",
        code_licence="Apache-2.0",
        commercial=True,
        revision="1",
        source="ours",
        note="a linear function of the colours, for tests and demonstrations",
    ),
)


class Teacher:
    """values = offset + red * R + green * G + blue * B."""

    def __init__(self, card: Card, *, rgb: Sequence[float], offset: float, dtype: torch.dtype) -> None:
        if len(rgb) != 3:
            raise ValueError(f"rgb must be three factors (red, green, blue), not {list(rgb)}")
        self.card = card
        self.rgb = tuple(float(factor) for factor in rgb)
        self.offset = float(offset)
        self.dtype = dtype

    @classmethod
    def load(
        cls,
        weights: str = "none",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rgb: Sequence[float] = (0.6, 0.3, 0.1),
        offset: float = 0.5,
        kind: str = "affine_disparity",
    ) -> Teacher:
        """The formula as a teacher. weights must be "none".

        rgb, offset: the formula's numbers; the defaults are positive for images in [0,1]. kind: what the map claims to
        be.
        """
        if weights != "none":
            raise WeightsMissingError(f'the analytic teacher has no weights: give "none", not {weights!r}')
        formula = f"rgb={','.join(f'{factor:g}' for factor in rgb)} offset={offset:g}"
        card = replace(CARDS[0], kind=Kind(kind), revision=formula)
        return cls(card, rgb=rgb, offset=offset, dtype=dtype)

    @torch.no_grad()
    def predict(self, images: Tensor) -> DepthMap:
        """(B,3,H,W) in [0,1] -> (B,H,W) by the formula."""
        images = check_images(images).to(self.dtype)
        red, green, blue = self.rgb
        values = self.offset + red * images[:, 0] + green * images[:, 1] + blue * images[:, 2]
        return finite(values, self.card.kind)
