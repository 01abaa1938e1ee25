"""Losses: one value per image, shape (B,), in float32 or better. Only the objective averages.

A pixel outside `valid` never counts, whatever its value (NaN included); an image without usable pixels gives 0.
The gradient flows to the prediction alone, once, not under torch.func. ValueError for maps of other or different shapes
and a `valid` that is not bool.
Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.plugins import find, not_taken
from distill.core.shapes import check_maps
from distill.losses import fused
from distill.losses.normalize import Comparison, single_or_double
from distill.losses.normalize._hdn import hdn
from distill.losses.normalize._per_image import FLAT, FLOOR


def compare(
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    normalization: str,
    *,
    trim_top: float = 0.0,
    label_only: bool = False,
    weight: Tensor | None = None,
    reference_hdn: bool = False,
    contexts: str = "dr",
) -> Comparison:
    """`distillation_loss`, and the numbers of contexts with and without information."""
    check_maps(pred=pred, target=target, valid=valid, weight=weight)
    if not 0.0 <= trim_top < 1.0:
        raise ValueError(f"trim_top must be in [0, 1), not {trim_top}")
    plugin = find("distill.losses.normalize", normalization)
    asked = {"trim_top": trim_top or None, "label_only": label_only or None, "weight": weight}
    options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if not reference_hdn or not plugin.LEVELS:
        if contexts != "dr":
            raise ValueError(f"contexts = {contexts!r} needs reference_hdn and a normalization with contexts")
        if options and (missing := not_taken(plugin.compare, tuple(options))):
            raise ValueError(f"normalization {normalization!r}: its compare takes no {missing}, which is asked for")
        return plugin.compare(pred, target, valid, **options)
    if options:
        raise ValueError("reference_hdn is HDN's released loss, which knows no trim_top, label_only or weights")
    # With one context: that code's SSIMAE, which does include the maximum.
    loss = hdn(pred, target, valid, plugin.LEVELS if max(plugin.LEVELS) > 1 else (), contexts=contexts)
    number = sum(level**2 if contexts == "ds" else level for level in plugin.LEVELS)
    live = torch.full_like(valid[:, 0, 0], number, dtype=torch.long)
    return Comparison(loss, live, torch.zeros_like(live))


def distillation_loss(
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    normalization: str,
    *,
    trim_top: float = 0.0,
    label_only: bool = False,
    weight: Tensor | None = None,
    reference_hdn: bool = False,
    contexts: str = "dr",
) -> Tensor:
    """L_Dis of Distill-Any-Depth, Sec. 3.1: mean |N(pred) - N(target)| over the pixels that count, (B,).

    pred, target, valid: (B,H,W). normalization: "global", "hybrid", "local" or "none" (any file in
    distill/losses/normalize).
    trim_top: the fraction of pixels with the largest loss that is dropped (Depth Anything V2: 0.1).
    label_only: normalize the student with the label's statistics, not with its own.
    weight: (B,H,W), each pixel's weight in the mean; None: all equal.
    reference_hdn: exactly HDN's released code, oddities included (`hdn_loss`): "hybrid" is its level 3, "local" the
    finest contexts of that, "global" its SSIMAE. contexts: which of its variants; see `hdn_loss`. Without reference_hdn
    contexts are equal parts of the label's range.
    """
    return compare(
        pred, target, valid, normalization, trim_top=trim_top, label_only=label_only, weight=weight,
        reference_hdn=reference_hdn, contexts=contexts,
    ).loss  # fmt: skip


def hdn_loss(
    pred: Tensor, target: Tensor, valid: Tensor, *, contexts: str = "dr", level: int = 3, finest_only: bool = False
) -> Tensor:
    """Hierarchical depth normalization exactly as released (icoz69/HDN, demo.py), (B,): its MEAN is that code's value.

    pred, target, valid: (B,H,W). contexts: "dr" (equal parts of the label's range), "dp" (of its pixels, by
    percentile) or "ds" (squares of the image). level: the range is cut into 1, 2, ... 2**(level - 1) parts, the image
    into as many rows and columns. finest_only: the finest cut only; level = 0 is the code's SSIMAE.
    The oddities that it keeps are listed in distill/losses/normalize/_hdn.py. The mean is over the whole batch, so
    images are not independent of each other. A batch without valid pixels gives 0 (NaN in the released code).
    """
    check_maps(pred=pred, target=target, valid=valid)
    levels = tuple(2**k for k in range(level))
    return hdn(pred, target, valid, levels[-1:] if finest_only else levels, contexts=contexts)


def median_and_mean_abs_dev(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Median and mean absolute deviation from it over valid pixels, (B,) each; (0, 0) where nothing is valid."""
    check_maps(values=values, valid=valid)
    values = single_or_double(values)
    result = fused.median_and_mean_abs_dev(values, valid, _median_and_mean_abs_dev)
    return _median_and_mean_abs_dev(values, valid) if result is None else result


def _median_and_mean_abs_dev(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    # Row by row: torch's quickselect over a whole tensor is ten times faster than along a dimension.
    filled = torch.where(valid, values, torch.nan).flatten(1)
    rows = (row.nanmedian()[None] for row in filled.unbind())
    median = torch.nan_to_num(torch.cat([filled.new_zeros(0), *rows]))
    spread = torch.where(valid, (values - median[:, None, None]).abs(), 0.0).sum((-2, -1))
    return median, spread / valid.sum((-2, -1)).clamp(min=1)


def _clean(values: Tensor, usable: Tensor) -> Tensor:
    """The values, 0 where not usable; half precision becomes float32."""
    return single_or_double(torch.where(usable, values, 0.0))


def _globally_normalized_difference(pred: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """N_glo(pred) - N_glo(target), zero outside the returned mask, which is empty for a flat label."""
    usable = valid & torch.isfinite(target)
    clean_pred, clean_target = _clean(pred, usable), _clean(target.detach(), usable)
    pred_median, pred_scale = _median_and_mean_abs_dev(clean_pred, usable)
    label_median, label_scale = _median_and_mean_abs_dev(clean_target, usable)
    informative = label_scale > FLAT * clean_target.abs().amax((-2, -1))
    usable = usable & informative[:, None, None]
    normal = (clean_pred - pred_median[:, None, None]) / pred_scale.clamp(min=FLOOR)[:, None, None]
    label = (clean_target - label_median[:, None, None]) / torch.where(informative, label_scale, 1.0)[:, None, None]
    return torch.where(usable, normal - label, 0.0), usable


def squared_loss(pred: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None = None) -> Tensor:
    """mean (N_glo(pred) - N_glo(target))^2, (B,): `distillation_loss` "global" with squared differences.

    weight: (B,H,W) not negative, each pixel's weight; None: all equal. Flat labels give 0. Ours.
    """
    check_maps(pred=pred, target=target, valid=valid, weight=weight)
    difference, usable = _globally_normalized_difference(pred, target, valid)
    each = usable.to(difference.dtype) if weight is None else torch.where(usable, weight.to(difference.dtype), 0.0)
    total = each.sum((-2, -1))
    return (difference.square() * each).sum((-2, -1)) / torch.where(total > 0, total, 1.0)


def gradient_loss(
    pred: Tensor, target: Tensor, valid: Tensor, *, scales: int = 4, normalize: bool = True, whole_image: Any = None
) -> Tensor:
    """Multi-scale gradient matching (MiDaS, Eq. 11) on the globally normalized difference, (B,).

    At each of `scales` scales the difference is subsampled by 2, 4, ...; |d/dx| + |d/dy| between valid neighbours is
    summed and divided by the scale's number of valid pixels; the scales are added. normalize=False takes the raw
    difference, for a student trained without normalization. whole_image: `Comparison.whole_image` of the same maps,
    which avoids computing their statistics again, or None.
    """
    check_maps(pred=pred, target=target, valid=valid)
    options = (scales, normalize)
    pred = single_or_double(pred)
    result = fused.gradient_loss(pred, target, valid, *options, whole_image=whole_image, reference=_gradient_loss)
    return _gradient_loss(pred, target, valid, *options) if result is None else result


def _gradient_loss(pred: Tensor, target: Tensor, valid: Tensor, scales: int, normalize: bool) -> Tensor:
    if normalize:
        difference, usable = _globally_normalized_difference(pred, target, valid)
    else:
        usable = valid & torch.isfinite(target)
        difference = _clean(pred, usable) - _clean(target.detach(), usable)
    total = difference.new_zeros(len(difference))
    for scale in range(scales):
        step = 2**scale
        d, v = difference[:, ::step, ::step], usable[:, ::step, ::step]
        across = torch.where(v[:, :, 1:] & v[:, :, :-1], (d[:, :, 1:] - d[:, :, :-1]).abs(), 0.0).sum((-2, -1))
        down = torch.where(v[:, 1:] & v[:, :-1], (d[:, 1:] - d[:, :-1]).abs(), 0.0).sum((-2, -1))
        total = total + (across + down) / v.sum((-2, -1)).clamp(min=1)
    return total


def feature_loss(features: Tensor, reference: Tensor, *, margin: float = 0.85) -> Tensor:
    """1 - cosine between student and reference features (B,C,h,w), over tokens below `margin`
    (Depth Anything, Sec. 3.3).

    A token above the margin has no loss: the student may keep what the frozen encoder does not know. That the mean is
    over the other tokens only, not over all, is inferred.
    """
    cosine = F.cosine_similarity(features.float(), reference.detach().float(), dim=1)
    below = cosine < margin
    return torch.where(below, 1.0 - cosine, 0.0).sum((-2, -1)) / below.sum((-2, -1)).clamp(min=1)


def anchor_loss(pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Squared log ratio of the prediction's and the label's mean deviation, (B,). Ours.

    A scale-invariant loss has a gradient orthogonal to the prediction, so each step can only increase the output's
    norm. This small term keeps its magnitude near the label's. Flat labels give 0.
    """
    check_maps(pred=pred, target=target, valid=valid)
    usable = valid & torch.isfinite(target)
    clean_target = _clean(target.detach(), usable)
    _, spread = median_and_mean_abs_dev(_clean(pred, usable), usable)
    _, label = median_and_mean_abs_dev(clean_target, usable)
    informative = label > FLAT * clean_target.abs().amax((-2, -1))
    ratio = spread.clamp(min=FLOOR).log() - torch.where(informative, label, 1.0).log()
    return torch.where(informative, ratio.square(), 0.0)
