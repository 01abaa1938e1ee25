"""What a labels folder says of its format to readers without this package."""

from __future__ import annotations

from typing import Any

import numpy as np

from distill.core.codes import LAST
from distill.shards.codec import CODECS


def describe_format(codec: str) -> dict[str, Any]:
    """How a reader without this package decodes the maps of a codec, in plain values; docs/formats.md says it too."""
    how = CODECS[codec]
    described: dict[str, Any] = {
        "codec": codec,
        "suffix": how.suffix,
        "max_error": how.bound,
        "units": {"metric_depth": "m", "metric_disparity": "1/m"},
        "patches": "[top, left, side] in the photograph's pixels, from the region's top left corner",
    }
    if not how.first:
        return {**described, "invalid": "NaN", "value": "low + (x + 1) / 2 * (high - low)"}
    return {
        **described,
        "invalid_below": int(np.isnan(how.units).sum()),
        "first": how.first,
        "last": LAST,
        "value": "low + clip((code - first) / (last - first), 0, 1) * (high - low)",
    }
