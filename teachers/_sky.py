"""One sky policy for all teachers of a recipe: what one of them sees as sky holds for every map of the crop.

Depth has no value in the sky. Teachers say something all the same: disparity near zero, the far end of [0,1], whatever
the network extrapolates; a student of two teachers would learn both. Here the teacher that knows sky (Depth Anything 3,
mono and metric) is asked once for each batch, and its mask is applied to everybody's maps:

    far      the sky gets the map's own far value: the 99 % quantile of the other pixels' depth, or the 1 % quantile of
             their disparity, per map and over every pixel; unchanged where 10 pixels or fewer are sky, or are not
    invalid  the sky is invalid
    zero     the sky has disparity 0; depth without an unknown shift becomes disparity for it; in affine depth, which
             has no value for "infinitely far", the sky is invalid

The mask is cut where interpolation mixed sky with something else, so it may be a pixel wider than the sky.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill.core.depth import DepthMap, Kind
from distill.teachers import Card

POLICIES = ("far", "invalid", "zero")
QUANTILE = 0.99
FEW = 10


def quantile(values: Tensor, place: float) -> Tensor:
    """The quantile of a flat tensor of any length, linear between its neighbours; torch's own stops at 16 million."""
    ordered = values.sort().values
    at = place * (len(ordered) - 1)
    return torch.lerp(ordered[int(at)], ordered[min(int(at) + 1, len(ordered) - 1)], at - int(at))


def kind_under(kind: Kind, policy: str) -> Kind:
    """The kind that a map of `kind` has under the policy."""
    inverts = policy == "zero" and kind.quantity == "depth" and kind.unknown != "affine"
    return Kind(f"{kind.unknown}_disparity") if inverts else kind


def apply_sky(depth: DepthMap, sky: Tensor, policy: str) -> DepthMap:
    """Maps (B,H,W) with the pixels of `sky` (B,H,W) bool treated by `policy`; see the module."""
    depth = depth.convert(kind_under(depth.kind, policy))
    if policy == "zero" and depth.kind.quantity == "disparity":
        return DepthMap(torch.where(sky, 0.0, depth.values), depth.valid | sky, depth.kind)
    if policy != "far":
        return DepthMap(depth.values, depth.valid & ~sky, depth.kind)
    place = QUANTILE if depth.kind.quantity == "depth" else 1 - QUANTILE
    values, valid = depth.values.clone(), depth.valid.clone()
    for i, one in enumerate(sky):
        rest = depth.values[i][depth.valid[i] & ~one]
        if rest.numel() > FEW and int(one.sum()) > FEW:
            values[i][one] = quantile(rest, place)
            valid[i] |= one
    return DepthMap(values, valid, depth.kind)


class SkyMask:
    """The teacher that knows sky, loaded with sky="invalid"; the last batch's answer is kept for the other teachers."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher
        self.last: tuple[Tensor, DepthMap] | None = None

    def look(self, images: Tensor) -> DepthMap:
        """Its maps of (B,3,H,W) images, invalid in the sky."""
        if self.last is None or self.last[0].shape != images.shape or not torch.equal(self.last[0], images):
            self.last = images, self.teacher.predict(images)
        return self.last[1]


class SkyPolicyTeacher:
    """A teacher whose maps follow the policy."""

    card: Card

    def __init__(self, teacher: Any, eye: SkyMask, policy: str) -> None:
        if policy not in POLICIES:
            raise ValueError(f"a sky policy must be one of {', '.join(POLICIES)}, not {policy!r}")
        self.teacher, self.eye, self.policy = teacher, eye, policy
        self.card = replace(teacher.card, kind=kind_under(teacher.card.kind, policy))

    @torch.no_grad()
    def predict(self, images: Tensor, *, keys: Sequence[str] | None = None) -> DepthMap:
        """As the teacher predicts, with the eye's sky treated. keys: for teachers that draw noise."""
        seen = self.eye.look(images)
        if self.teacher is self.eye.teacher:
            # What the eye calls invalid is sky and has a value all the same, unless it is no number.
            depth = DepthMap(seen.values, torch.isfinite(seen.values), seen.kind)
        else:
            depth = self.teacher.predict(images, **({"keys": keys} if keys is not None else {}))
        return apply_sky(depth, ~seen.valid, self.policy)


def under_policy(loaded: Sequence[tuple[str, Any]], policy: str) -> list[tuple[str, Any]]:
    """(name, teacher) pairs with every teacher under the policy; words such as "truth" pass.

    Raises ValueError where no teacher knows sky. The first that does decides.
    """
    eyes = [teacher for _, teacher in loaded if getattr(teacher, "sees_sky", False)]
    if not eyes:
        names = ", ".join(name for name, _ in loaded)
        raise ValueError(
            f'labels.sky = "{policy}" needs a teacher that knows sky, as DA3MONO-LARGE does; none of {names} does: add '
            'one, or leave it at "own"'
        )
    eye = SkyMask(eyes[0])
    return [(name, SkyPolicyTeacher(t, eye, policy) if hasattr(t, "predict") else t) for name, t in loaded]
