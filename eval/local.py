"""Would patches help? The error of a map in a part of the image, aligned over the whole image or over that part.

Distill-Any-Depth, Fig. 2: the central half of width and height; least squares over the whole image before the crop, or
over the crop alone; metrics on the crop. If a second map is given, predicted from the crop alone, a third number shows
what that adds (Fig. 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from distill.core.depth import DepthMap, Kind
from distill.eval.fit import NoGroundTruthError, aligned_depth
from distill.eval.metrics import all_metrics
from distill.eval.protocol import Protocol


@dataclass(frozen=True, slots=True)
class LocalError:
    """AbsRel in the part: aligned over the image, over the part, and of a map of the part alone (NaN if none)."""

    globally: float
    locally: float
    patch: float = float("nan")


def central(height: int, width: int) -> tuple[slice, slice]:
    """The central half of the rows and of the columns."""
    return slice(height // 4, height // 4 + height // 2), slice(width // 4, width // 4 + width // 2)


def local_error(
    pred: np.ndarray,
    truth: DepthMap,
    kind: Kind,
    protocol: Protocol,
    *,
    part: tuple[slice, slice] | None = None,
    patch: np.ndarray | None = None,
) -> LocalError:
    """Score pred (H,W) against truth (1,H,W) in a part of it (None: `central`). patch: a map of that part alone.

    Raises NoGroundTruthError if the part has no truth, ValueError for values that are not finite.
    """
    rows, columns = part or central(*pred.shape)
    inside = DepthMap(truth.values[:, rows, columns], truth.valid[:, rows, columns], truth.kind)
    if not bool(inside.valid.any()):
        raise NoGroundTruthError("the part has no valid truth")
    whole = aligned_depth(pred, truth, kind, protocol, scaled=True)[0][rows, columns]
    own = np.ascontiguousarray(pred[rows, columns])
    maps = [whole, aligned_depth(own, inside, kind, protocol, scaled=True)[0]]
    if patch is not None:
        maps.append(aligned_depth(patch, inside, kind, protocol, scaled=True)[0])
    known = inside.convert(Kind(f"{inside.kind.unknown}_depth"))
    errors = [
        float(
            all_metrics(torch.from_numpy(np.ascontiguousarray(m, np.float32))[None], known.values, known.valid)[
                "abs_rel"
            ]
        )
        for m in maps
    ]
    return LocalError(*errors)
