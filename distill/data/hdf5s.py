"""HDF5, which is also netCDF 4 and MATLAB's .mat from version 7.3 on: the arrays of a file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill.data import packing
from distill.data.limits import unpacks_to


def arrays(data: bytes) -> dict[str, np.ndarray]:
    """Every array of numbers by its path in the file; ImportError without h5py.

    Values that netCDF's attributes declare missing or out of range are NaN; numbers with a declared scale or unit are
    marked (data.packing). ValueError for numbers that are compressed with a filter that is not installed, that lie in
    other files, or that are too many.
    """
    import h5py

    found: dict[str, Any] = {}

    def collect(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "fiub" and _is_small(item):
            if item.external or (item.is_virtual and any(part.file_name != "." for part in item.virtual_sources())):
                raise ValueError(f"{name} lies in other files, which are not opened: store its numbers in one")
            if missing := [str(number) for number in _filters(item) if not h5py.h5z.filter_avail(number)]:
                raise ValueError(
                    f"{name} is compressed with HDF5's filter {missing[0]}, which is not installed: store it with gzip"
                )
            found[name] = item

    with h5py.File(io.BytesIO(data), "r") as file:
        file.visititems(collect)
        # Chunks that were never written take no bytes of the file.
        if reason := unpacks_to(sum(item.size * item.dtype.itemsize for item in found.values()), len(data)):
            raise ValueError(reason)
        return {name: _numbers_of(item) for name, item in found.items()}


def _numbers_of(item: Any) -> np.ndarray:
    """A data set's numbers by MATLAB's and netCDF's attributes."""
    # MATLAB stores arrays column-major, and logical ones as uint8.
    stored = np.asarray(item[()].T if "MATLAB_class" in item.attrs else item[()])
    if item.attrs.get("MATLAB_class") == b"logical":
        return stored.astype(bool)
    if stored.dtype.kind == "i" and _is_unsigned(item.attrs):
        stored = stored.view(stored.dtype.str.replace("i", "u"))
    return packing.by_netcdf(_filled(stored, item.attrs), item.attrs)


def _is_small(item: Any) -> bool:
    """Whether a data set is no larger than a map; False for one without any array (h5py.Empty)."""
    return item.size is not None and bool(item.size < 1 << 30)


def _filters(item: Any) -> list[int]:
    """The numbers of the filters through which a data set must go."""
    properties = item.id.get_create_plist()
    filters = [properties.get_filter(i) for i in range(properties.get_nfilters())]
    return [int(number) for number, *_ in filters]


def _filled(values: np.ndarray, notes: Mapping[str, Any]) -> np.ndarray:
    """Replace values that netCDF's attributes declare missing or out of range by NaN; integers become floats then."""
    absent = _beyond(values, notes)
    for name in ("_FillValue", "missing_value"):
        for missing in _numbers(notes, name, values.dtype):
            absent |= values == missing
    return packing.with_gaps(values, absent, floats=np.float64)


def _beyond(values: np.ndarray, notes: Mapping[str, Any]) -> np.ndarray:
    """Where values are outside netCDF's valid_range, or valid_min and valid_max."""
    absent = np.zeros(values.shape, bool)
    span, lowest, highest = (_numbers(notes, name, values.dtype) for name in ("valid_range", "valid_min", "valid_max"))
    lowest, highest = (span[:1], span[1:]) if span.size == 2 else (lowest[:1], highest[:1])
    for bound, outside in ((lowest, np.less), (highest, np.greater)):
        if not bound.size:
            continue
        if values.dtype.kind == "f":  # 0.7 as float64 is above 0.7 as float32
            absent |= outside(values, bound.astype(values.dtype))
        else:  # bounds of stored integers are integers: others are of what those mean
            absent |= outside(packing.meant(values, notes) if bound.dtype.kind == "f" else values, bound)
    return absent


def _is_unsigned(notes: Mapping[str, Any]) -> bool:
    """Whether netCDF's attributes declare signed integers to be unsigned ones."""
    return packing.text(notes.get("_Unsigned")).lower() == "true"


def _numbers(notes: Mapping[str, Any], name: str, dtype: np.dtype) -> np.ndarray:
    """The numbers of an attribute; signed ones count as unsigned where those of the data set do."""
    found = packing.numbers(notes.get(name))
    return found.astype(dtype) if found.dtype.kind == "i" and dtype.kind == "u" and _is_unsigned(notes) else found


def open_hdf5(path: Path) -> Any:
    """Open an HDF5 file that holds many maps, as h5py.File; OSError names the file where it cannot be read."""
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise OSError(f"{path} is not a readable .mat of version 7.3 ({error}); download it again") from error
