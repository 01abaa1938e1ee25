"""HDF5, which is also netCDF 4 and MATLAB's .mat from version 7.3 on: the arrays of a file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill.data import packing


def arrays(data: bytes) -> dict[str, np.ndarray]:
    """Every array of numbers by its path in the file; ImportError without h5py.

    Values that netCDF's attributes declare missing are NaN; numbers with a declared scale are marked (data.packing).
    """
    import h5py

    found: dict[str, np.ndarray] = {}

    def collect(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "fiub" and item.size < 1 << 30:
            # MATLAB stores arrays column-major, and logical ones as uint8.
            stored = np.asarray(item[()].T if "MATLAB_class" in item.attrs else item[()])
            if item.attrs.get("MATLAB_class") == b"logical":
                found[name] = stored.astype(bool)
            else:
                found[name] = packing.by_netcdf(_filled(stored, item.attrs), item.attrs)

    with h5py.File(io.BytesIO(data), "r") as file:
        file.visititems(collect)
    return found


def _filled(values: np.ndarray, notes: Mapping[str, Any]) -> np.ndarray:
    """Replace values that netCDF's attributes declare missing by NaN; integers become floats then."""
    for name in ("_FillValue", "missing_value"):
        missing = np.asarray(notes.get(name, np.nan)).ravel()
        if missing.size == 1 and missing.dtype.kind in "fiu" and (values == missing[0]).any():
            wide = values if values.dtype.kind == "f" else values.astype(np.float64)
            values = np.where(values == missing[0], wide.dtype.type(np.nan), wide)
    return values


def open_hdf5(path: Path) -> Any:
    """Open an HDF5 file that holds many maps, as h5py.File; OSError names the file where it cannot be read."""
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise OSError(f"{path} is not a readable .mat of version 7.3 ({error}); download it again") from error
