"""Numbers that their file declares to mean others: stored x factor + offset, and a unit, as netCDF and GDAL write them.

h5py, OpenCV and most TIFF readers return such numbers as stored, netCDF's and xarray's tools as meant. A caller that
multiplies by the declared factor itself gets what the file means; anything else would be wrong without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from distill.data import cells

_LENGTHS = {
    **cells.UNITS,
    **{unit: 1000.0 for unit in ("km", "kilometre", "kilometer", "kilometres", "kilometers")},
    **{unit: 0.3048 for unit in ("ft", "foot", "feet")},
    **{unit: 0.0254 for unit in ("in", "inch", "inches")},
    **{"dm": 0.1, "um": 1e-6},
}
"""Metres per unit of a file's own declaration; any other text declares nothing that matters here."""


class Packed(np.ndarray):
    """An array of stored numbers with the factor and offset to metres that its file declares, and its unit."""

    factor: float
    offset: float
    unit: str


class Gapped(np.ndarray):
    """Floats that were stored as integers: NaN stands for those that their file declares missing."""


def with_gaps(values: np.ndarray, empty: np.ndarray, *, floats: DTypeLike) -> np.ndarray:
    """Samples with NaN where `empty`; integers become `floats` then, marked as Gapped."""
    if not empty.any():
        return values
    wide = values if values.dtype.kind == "f" else values.astype(floats)
    gapped = np.where(empty, wide.dtype.type(np.nan), wide)
    return gapped if wide is values else gapped.view(Gapped)


def packed(values: np.ndarray, factor: float, offset: float, unit: str = "") -> np.ndarray:
    """The array, marked as Packed where its numbers mean others. unit: of the numbers after factor and offset."""
    metres = _LENGTHS.get(unit.strip().rstrip(".").lower(), 1.0)
    factor, offset = factor * metres, offset * metres
    if (factor, offset) == (1.0, 0.0) or not (math.isfinite(factor) and math.isfinite(offset)):
        return values
    marked = values.view(Packed)
    marked.factor, marked.offset, marked.unit = factor, offset, unit.strip() if metres != 1.0 else ""
    return marked


def by_netcdf(values: np.ndarray, notes: Mapping[str, Any]) -> np.ndarray:
    """`packed` by the attributes scale_factor, add_offset and units of an HDF5 data set."""
    return packed(values, *_factor_and_offset(notes), text(notes.get("units")))


def meant(values: np.ndarray, notes: Mapping[str, Any]) -> np.ndarray:
    """The numbers that stored ones mean by scale_factor and add_offset, in float64."""
    factor, offset = _factor_and_offset(notes)
    return values.astype(np.float64) * factor + offset


def _factor_and_offset(notes: Mapping[str, Any]) -> tuple[float, float]:
    return _number(notes.get("scale_factor"), 1.0), _number(notes.get("add_offset"), 0.0)


def by_gdal(values: np.ndarray, xml: str) -> np.ndarray:
    """`packed` by the text of GDAL's metadata tag, of the first band."""
    found: dict[str, str] = {}
    for attributes, content in re.findall(r"<Item\b([^>]*)>([^<]*)</Item>", xml):
        role = re.search(r'\brole="(scale|offset|unittype)"', attributes)
        sample = re.search(r'\bsample="(\d+)"', attributes)
        if role and (sample is None or sample[1] == "0"):
            found[role[1]] = content
    factor, offset = (_number(found.get(role, plain), math.nan) for role, plain in (("scale", 1.0), ("offset", 0.0)))
    return packed(values, factor, offset, found.get("unittype", ""))


def numbers(note: Any) -> np.ndarray:
    """The numbers of an attribute, of any real dtype; none where it is absent or has no numbers."""
    values = np.asarray(note).ravel()
    return values if values.dtype.kind in "fiu" else np.empty(0)


def text(note: Any) -> str:
    """An attribute as text; "" where it is absent or not text."""
    note = note.ravel()[0] if isinstance(note, np.ndarray) and note.size == 1 else note
    return note.decode(errors="replace") if isinstance(note, bytes) else note if isinstance(note, str) else ""


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
    rule += f" (it is in {values.unit})" if values.unit else ""
    remedy = "" if values.offset else f", or give {values.factor:g} as scale_to_metres of a table of pairs"
    return f"its numbers mean {rule} by its own declaration, which is not applied: store that as .npy{remedy}"
