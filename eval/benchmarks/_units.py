"""Depth of a benchmark that is stored in another unit than the published one: refused, or doubted."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

from distill.eval.protocol import Protocol

_log = logging.getLogger(__name__)
_TYPICAL = {"kitti": (3.0, 35.0), "nyu": (0.6, 8.0), "scannet": (0.4, 7.0)}
"""Metres between which the median of an image's depth lies, with room: a street's lidar, a room's sensor. Ours."""
_ENOUGH = 3
"""Implausible images, and no other before them, until the unit is doubted."""
_medians: dict[tuple[str, str], list[float]] = {}


def check_unit(metres: np.ndarray, measured: np.ndarray, protocol: Protocol, name: str) -> None:
    """Raise OSError if 19 of 20 measured pixels lie beyond the protocol's range: their unit is another.

    Logs a warning once where the first images of a root all have an implausible median. name: "ROOT: FILE".
    """
    some = metres[measured] if protocol.max_depth < math.inf else metres[:0]
    some = some[:: max(1, len(some) // 4096)]
    if not some.size:
        return
    if (far := float(np.quantile(some, 0.05))) > protocol.max_depth:
        raise OSError(
            f"{name}: 95 % of its depth is above {far:.4g} m, but {protocol.benchmark} ends at {protocol.max_depth:g} "
            "m: it is stored in another unit than the published one"
        )
    first = _medians.setdefault((protocol.benchmark, name.partition(": ")[0]), [])
    if len(first) < _ENOUGH:
        first.append(float(np.median(some)))
        if len(first) == _ENOUGH and (doubt := unit_doubt(first, protocol)):
            _log.warning("%s: %s", name.partition(": ")[0], doubt)


def unit_doubt(medians: Sequence[float], protocol: Protocol) -> str:
    """Why the unit is doubtful of images whose depth has these medians, in metres; "" where it is not, or unknown."""
    low, high = _TYPICAL.get(protocol.benchmark, (0.0, math.inf))
    if len(medians) < _ENOUGH or any(low <= median <= high for median in medians):
        return ""
    return (
        f"the median depth of its first {len(medians)} images is {', '.join(f'{median:.3g}' for median in medians)} m, "
        f"but {protocol.benchmark} mostly lies between {low:g} and {high:g} m: is it stored in another unit than the "
        "published one?"
    )
