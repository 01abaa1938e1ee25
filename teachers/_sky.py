"""One sky policy for all teachers of a recipe: the sky mask of one teacher applies to every map of the crop.

Depth is undefined in the sky, yet teachers predict something there: disparity near zero, the far end of [0,1], whatever
the network extrapolates; a student of two teachers would learn both. Here the teacher that knows sky (Depth Anything 3,
mono and metric) runs once per batch, and its mask is applied to all teachers' maps:

    far      the sky gets the map's own far value: the 99 % quantile of the other pixels' depth, or the 1 % quantile of
             their disparity, per map and over every pixel; unchanged if 10 pixels or fewer are sky, or are not
    invalid  the sky is invalid
    zero     the sky has disparity 0; depth without an unknown shift is converted to disparity for this; in affine
             depth, which has no value for "infinitely far", the sky is invalid

The mask includes pixels where interpolation mixed sky with something else, so it may be a pixel wider than the sky.
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
MIN_SKY_PIXELS = 10


def quantile(values: Tensor, counted: Tensor, place: float) -> Tensor:
    """The quantile of the counted values, linear between its neighbours; of any number, where torch's stops at 16
    million. A scalar on their device, which the host never waits for; NaN where none counts.
    """
    ordered = torch.where(counted, values, torch.nan).flatten().sort().values  # NaN last: those that do not count
    last = (counted.sum() - 1).clamp(min=0).double()
    at = place * last
    below = at.floor()
    lower, upper = ordered.take(torch.stack([below, torch.minimum(below + 1, last)]).long())
    return torch.lerp(lower, upper, (at - below).to(values.dtype))


def far_in_the_sky(values: Tensor, sky: Tensor, others: Tensor, place: float) -> tuple[Tensor, Tensor]:
    """A map with the quantile of `others` in the sky, and where that is; unchanged if either has MIN_SKY_PIXELS or
    fewer.
    """
    changed = sky & (others.sum() > MIN_SKY_PIXELS) & (sky.sum() > MIN_SKY_PIXELS)
    if _host_may_look(changed) and not changed.any():  # spares a sort
        return values, changed
    return torch.where(changed, quantile(values, others, place), values), changed


def _host_may_look(values: Tensor) -> bool:
    """Whether to read values costs no wait for a GPU."""
    return values.device.type == "cpu"


def kind_under(kind: Kind, policy: str) -> Kind:
    """The kind that a map of `kind` has under the policy."""
    inverts = policy == "zero" and kind.quantity == "depth" and kind.unknown != "affine"
    return Kind(f"{kind.unknown}_disparity") if inverts else kind


def apply_sky(depth: DepthMap, sky: Tensor, policy: str) -> DepthMap:
    """Maps (B,H,W) with the pixels of `sky` (B,H,W) bool treated by `policy`; see the module's docstring."""
    depth = depth.convert(kind_under(depth.kind, policy))
    if policy == "zero" and depth.kind.quantity == "disparity":
        return DepthMap(torch.where(sky, 0.0, depth.values), depth.valid | sky, depth.kind)
    if policy != "far":
        return DepthMap(depth.values, depth.valid & ~sky, depth.kind)
    place = QUANTILE if depth.kind.quantity == "depth" else 1 - QUANTILE
    maps = zip(depth.values, sky, depth.valid & ~sky, strict=True)
    values, changed = zip(*(far_in_the_sky(*each, place) for each in maps), strict=True)
    return DepthMap(torch.stack(values), depth.valid | torch.stack(changed), depth.kind)


class SkyMask:
    """The teacher that knows sky, loaded with sky="invalid"; the last batch's maps are kept for the other teachers."""

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
        """The teacher's maps with the policy applied to `eye`'s sky. keys: for teachers that draw noise."""
        sky_maps = self.eye.look(images)
        if self.teacher is self.eye.teacher:
            # The pixels that `eye` marks invalid are sky; they still have values, unless not finite.
            depth = DepthMap(sky_maps.values, torch.isfinite(sky_maps.values), sky_maps.kind)
        else:
            depth = self.teacher.predict(images, **({"keys": keys} if keys is not None else {}))
        return apply_sky(depth, ~sky_maps.valid, self.policy)


def under_policy(loaded: Sequence[tuple[str, Any]], policy: str) -> list[tuple[str, Any]]:
    """(name, teacher) pairs with every teacher under the policy; entries such as "truth", which are no teachers, pass.

    Raises ValueError if no teacher knows sky. The first that does provides the mask.
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
