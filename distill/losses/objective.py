"""The weighted sum of the terms that apply: L = L_sc + 0.5 L_lg + 1.0 L_feat + 2.0 L_grad (Distill-Any-Depth, 4.1).

The labels' supervision decides the objective: [loss.truth] where ground truth teaches, and those terms
(distill/losses/terms) whose needs are met. Every part is one value per image; only the trainer averages, over the
global batch, so that 8 x 1 equals 2 x 4 accumulated equals 4 processes x 2.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from distill.core.depth import DepthMap, Kind, KindError
from distill.core.labels import Labels
from distill.core.plugins import find
from distill.losses.losses import compare
from distill.losses.normalize import Comparison, single_or_double
from distill.losses.settings import FACTS, TERMS, LossSettings
from distill.losses.terms import TermInputs

NEAREST = 1e-3
"""A predicted depth is clamped to at least this before it is converted to disparity: a millimetre, in metres."""


@dataclass(frozen=True)
class Objective:
    """The training objective, from a recipe's [loss]. kind: what the student predicts. max_depth: the largest depth
    that it can predict, in metres; pixels of metric labels beyond it are left out, as in Depth Anything V2's training.

    Raises ValueError for a term that no label can satisfy.
    """

    settings: LossSettings = field(default_factory=LossSettings)
    kind: Kind = Kind.AFFINE_DISPARITY
    max_depth: float | None = None
    against_truth: LossSettings = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", Kind(self.kind))
        object.__setattr__(self, "against_truth", self.settings.against_truth())
        metric = {name for s in (self.settings, self.against_truth) for name in s.weights if FACTS[name].is_metric}
        if metric and self.kind.unknown != "metric":
            raise ValueError(
                f"loss.{min(metric)} compares metres, and the student predicts {self.kind}: set train.kind = "
                f'"metric_depth" and student.max_depth, or leave it out'
            )

    def __call__(
        self, pred: Tensor, labels: Labels, features: Tensor | None = None, teacher_features: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total (B,) and its parts by name, each (B,), unweighted.

        pred: (B,S,S), the student's prediction, converted to the labels' kind where that is less specific (a metric
        student, pseudo-labels up to scale and shift). features, teacher_features: (B,C,h,w) of the student and of the
        frozen encoder, or None where the recipe has no feature alignment. "dead_contexts" among the parts is a count
        and has no weight. Raises KindError for labels to whose kind the prediction cannot be converted, ValueError
        where no term applies to them.
        """
        device = pred.device.type
        # Entering autocast takes longer than asking for it.
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            pred = self._as(labels.shared.kind, single_or_double(pred))
            return self._sum(pred, self._within(labels), features, teacher_features)

    def _as(self, kind: Kind, pred: Tensor) -> Tensor:
        """The prediction, converted to the labels' kind."""
        if kind.quantity == self.kind.quantity:
            return pred
        if not self.kind.can_become(kind):
            raise KindError(
                f"the student learns {self.kind}, and a label of kind {kind} cannot become that: use a checkpoint "
                f'that predicts {self.kind.quantity}, or bridge = "primary"'
            )
        return 1.0 / pred.clamp(min=NEAREST)

    def _within(self, labels: Labels) -> Labels:
        """The labels; metric ones without pixels beyond `max_depth`."""
        if self.max_depth is None or labels.shared.kind.unknown != "metric":
            return labels
        local = None if labels.local is None else _nearer(labels.local, self.max_depth)
        return replace(labels, shared=_nearer(labels.shared, self.max_depth), local=local)

    def _sum(
        self, pred: Tensor, labels: Labels, features: Tensor | None, teacher_features: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        s = self.against_truth if labels.supervision.truth else self.settings
        labels = _in_unit_range(labels) if s.label_range == "unit" else labels
        inputs = TermInputs(
            pred=pred,
            labels=labels,
            features=features,
            reference=teacher_features,
            normalization=s.normalization,
            patch_resolution=s.patch_resolution,
            compare=partial(_compare, s),
        )
        met = inputs.has
        parts: dict[str, Tensor] = {}
        total: Tensor | None = None
        for name, weight in s.weights.items():
            value = find(TERMS, name).term(inputs, **s.options(name)) if FACTS[name].needs <= met else None
            if value is not None:
                parts[name] = value
                total = _plus(total, weight, value)
        if total is None:
            unmet = {name: " and ".join(sorted(FACTS[name].needs - met)) for name in s.weights}
            reasons = ", ".join(f"{name} needs {needs or 'other labels'}" for name, needs in unmet.items())
            raise ValueError(
                f"labels by {labels.supervision.teacher} ({labels.supervision.kind}) have no applicable [loss] term: "
                f"{reasons or 'every weight of [loss] is 0'}"
            )
        return total, parts | inputs.counts


def _plus(total: Tensor | None, weight: float, value: Tensor) -> Tensor:
    """total + weight * value, in one operation where that has the same bits."""
    if total is None:
        return value if weight == 1.0 else weight * value
    # The product with a power of two is exact, so it does not matter whether it is rounded before the sum.
    return torch.add(total, value, alpha=weight) if math.frexp(weight)[0] == 0.5 else total + weight * value


def _nearer(depth: DepthMap, limit: float) -> DepthMap:
    values, metres = depth.values, depth.kind.quantity == "depth"
    within = (values > 0) & (values <= limit) if metres else values >= 1.0 / limit
    return DepthMap(values, depth.valid & within, depth.kind)


def _in_unit_range(labels: Labels) -> Labels:
    """Labels scaled so that each region's lowest and highest valid value are 0 and 1, patches too; flat ones stay."""
    shared, local = labels.shared, labels.local
    known = shared.valid & torch.isfinite(shared.values)
    low = torch.where(known, shared.values, torch.inf).flatten(1).amin(1)
    high = torch.where(known, shared.values, -torch.inf).flatten(1).amax(1)
    not_flat = high > low
    low, span = torch.where(not_flat, low, 0.0), torch.where(not_flat, high - low, 1.0)

    def scaled(one: DepthMap) -> DepthMap:
        times = len(one) // max(1, len(low))
        first, length = (v.repeat_interleave(times)[:, None, None] for v in (low, span))
        return DepthMap((one.values - first) / length, one.valid, one.kind)

    return replace(labels, shared=scaled(shared), local=None if local is None else scaled(local))


def _compare(s: LossSettings, pred: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None) -> Comparison:
    return compare(
        pred,
        target,
        valid,
        s.normalization,
        trim_top=s.trim_top,
        label_only=s.label_only,
        weight=weight,
        reference_hdn=s.reference_hdn,
        contexts=s.contexts,
    )
