"""Numbers that their file declares to mean others: stored x factor + offset, as netCDF and GDAL write them.

h5py, OpenCV and most TIFF readers return such numbers as stored, netCDF's and xarray's tools as meant. A caller that
multiplies by the declared factor itself gets what the file means; anything else would be wrong without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np


class Packed(np.ndarray):
    """An array of stored numbers with the factor and offset that its file declares."""

    factor: float
    offset: float


def packed(values: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """The array, marked as Packed where its numbers mean others."""
    if (factor, offset) == (1.0, 0.0) or not (math.isfinite(factor) and math.isfinite(offset)):
        return values
    marked = values.view(Packed)
    marked.factor, marked.offset = factor, offset
    return marked


def by_netcdf(values: np.ndarray, notes: Mapping[str, Any]) -> np.ndarray:
    """`packed` by the attributes scale_factor and add_offset of an HDF5 data set."""
    factor, offset = (_number(notes.get(name), plain) for name, plain in (("scale_factor", 1.0), ("add_offset", 0.0)))
    return packed(values, factor, offset)


def by_gdal(values: np.ndarray, xml: str) -> np.ndarray:
    """`packed` by the text of GDAL's metadata tag, of the first band."""
    found: dict[str, float] = {}
    for attributes, text in re.findall(r"<Item\b([^>]*)>([^<]*)</Item>", xml):
        role = re.search(r'\brole="(scale|offset)"', attributes)
        sample = re.search(r'\bsample="(\d+)"', attributes)
        if role and (sample is None or sample[1] == "0"):
            found[role[1]] = _number(text, math.nan)
    return packed(values, found.get("scale", 1.0), found.get("offset", 0.0))


def _number(value: Any, otherwise: float) -> float:
    try:
        return float(np.asarray(value).ravel()[0])
    except (TypeError, ValueError, IndexError):
        return otherwise


def conflict(values: np.ndarray, factor: float | None) -> str:
    """Why numbers that a caller multiplies by `factor` (None: by an unknown one) are not what the file means, or ""."""
    if not isinstance(values, Packed):
        return ""
    if not values.offset and (factor is None or math.isclose(factor, values.factor, rel_tol=1e-5)):
        return ""
    sign = "-" if values.offset < 0 else "+"
    rule = f"stored x {values.factor:g}" + (f" {sign} {abs(values.offset):g}" if values.offset else "")
    remedy = "" if values.offset else f", or give {values.factor:g} as scale_to_metres of a table of pairs"
    return f"its numbers mean {rule} by its own declaration, which is not applied: store that as .npy{remedy}"
