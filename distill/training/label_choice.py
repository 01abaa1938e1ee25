"""Whose labels a step uses, and as what kind: those of a teacher drawn by share, or the mean of all; pure functions.

Shapes: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.core.crops import generator
from distill.core.depth import DepthMap, Kind
from distill.core.labels import Labels, Supervision
from distill.losses.losses import median_and_mean_abs_dev


def choose_teacher(teachers: Mapping[str, float], *, seed: int, step: int) -> str:
    """The teacher of 0-based `step`, drawn by share from (seed, step): the same on every process."""
    point = generator("teacher", seed, step).random() * sum(teachers.values())
    for name, share in teachers.items():
        if point < share:
            return name
        point -= share
    return next(name for name, share in reversed(list(teachers.items())) if share > 0)


def _average_maps(maps: Sequence[DepthMap], shares: Sequence[float], *, aligned: bool) -> tuple[DepthMap, Tensor]:
    """The mean map, and each pixel's weight: 1 / (1 + the teachers' distance there, in mean deviations if aligned)."""
    valid = torch.stack([m.valid for m in maps]).all(0)
    normalized = []
    for m in maps:
        median, deviation = median_and_mean_abs_dev(m.values, valid)
        centred = (m.values - median[:, None, None]) / deviation.clamp(min=1e-12)[:, None, None]
        normalized.append(torch.where(valid, centred if aligned else m.values, 0.0))
    mean = torch.stack([share / sum(shares) * values for share, values in zip(shares, normalized, strict=True)]).sum(0)
    # For two teachers, whatever their shares, this is the distance between them.
    distance = torch.stack([(values - mean).abs() for values in normalized]).sum(0)
    kind = Kind.AFFINE_DISPARITY if maps[0].kind.quantity == "disparity" else Kind.AFFINE_DEPTH
    return DepthMap(mean, valid, kind), torch.where(valid, 1.0 / (1.0 + distance), 0.0)


def average_labels(labels: Mapping[str, Labels], teachers: Mapping[str, float], *, aligned: bool = True) -> Labels:
    """The mean of the teachers' maps by share, with weights for the loss: more where the teachers agree.

    Distill-Any-Depth, Sec. 4.2 and Table 4: "a weighted averaging approach (Avg.), which assigns greater weight to
    pixels where the two teachers exhibit high agreement". No formula is given; inferred: each map is first brought to
    median 0 and mean deviation 1, because maps known up to scale and shift cannot be averaged as they are; a pixel's
    weight in L_Dis is 1 / (1 + |a - b|). A pixel is valid where it is in every teacher's map. The teachers' patches
    must be the same. aligned: False averages the maps as they are, each in its own scale and shift.
    """
    parts = [labels[name] for name, share in teachers.items() if share > 0]
    shares = [share for share in teachers.values() if share > 0]
    local = [part.local for part in parts if part.local is not None]
    shared, weight = _average_maps([part.shared for part in parts], shares, aligned=aligned)
    truth, dense = all(part.supervision.truth for part in parts), all(part.supervision.dense for part in parts)
    supervision = Supervision("average", shared.kind, truth, dense)
    if len(local) != len(parts):
        return Labels(shared, None, parts[0].boxes, weight, supervision=supervision)
    if any(not torch.equal(part.boxes, parts[0].boxes) for part in parts):
        raise ValueError(
            'strategy = "average" needs labels of the same patches from every teacher; label them in one run'
        )
    patches, patch_weight = _average_maps(local, shares, aligned=aligned)
    return Labels(shared, patches, parts[0].boxes, weight, patch_weight, supervision)


def choose_patches(count: int, seed: int, position: int, number: int) -> list[int]:
    """Indices of the patches to use at this stream position, `count` of a region's `number`; all of them if fewer."""
    if number <= count:
        return list(range(number))
    return sorted(int(i) for i in generator("patches", seed, position).permutation(number)[:count])


def convert_labels(labels: Labels, kind: Kind | str, keep_unconvertible: bool = False) -> Labels:
    """The labels converted to the kind that the student predicts, or unchanged where they know less than it does.

    Then the objective converts the prediction instead. Raises distill.core.depth.KindError where neither converts to
    the other; keep_unconvertible: returns those labels unchanged too.
    """
    kind, stored = Kind(kind), labels.shared.kind
    if keep_unconvertible and not stored.can_become(kind):
        return labels
    return labels if kind.can_become(stored) and not stored.can_become(kind) else labels.convert(kind)


AVERAGES = ("average", "average_unaligned")
"""The strategies that use a mean of all teachers' maps; also used in place of a teacher's name."""


def learnt_labels(
    labels: Mapping[str, Labels],
    *,
    teachers: Mapping[str, float],
    name: str,
    kind: str,
    keep_unconvertible: bool = False,
) -> Labels:
    """The labels that one step uses: those of `name`, or the average of all where name is one of AVERAGES."""
    if name not in AVERAGES:
        return convert_labels(labels[name], kind, keep_unconvertible)
    converted = {teacher: convert_labels(labels[teacher], kind, keep_unconvertible) for teacher in teachers}
    return average_labels(converted, teachers, aligned=name == "average")
