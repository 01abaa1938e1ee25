"""MATLAB's .mat up to version 7: the arrays of a file. (Version 7.3 is HDF5.)"""

from __future__ import annotations

import io
import zlib
from typing import Any

from distill.data.limits import most_unpacked, unpacks_to

_COMPRESSED, _HEADER = 15, 128
_PIECE = 1 << 20
_DEFLATE = 1032
"""The most times its size that deflate unpacks to."""


def arrays(data: bytes) -> dict[str, Any]:
    """Every variable by name; logical ones as bool. ImportError without SciPy, ValueError for too many bytes.

    SciPy raises other exceptions for damage.
    """
    import scipy.io

    _check_size(data)
    table = scipy.io.loadmat(io.BytesIO(data), chars_as_strings=False)
    # loadmat does not mark logical arrays.
    masks = {name for name, _, matlab_class in scipy.io.whosmat(io.BytesIO(data)) if matlab_class == "logical"}
    named = {name: array for name, array in table.items() if not name.startswith("__")}
    return {name: array.astype(bool) if name in masks else array for name, array in named.items()}


def _check_size(data: bytes) -> None:
    """Unpack the variables, keeping none of their bytes, where they may be too many; ValueError if they are."""
    most, size, at = most_unpacked(len(data)), 0, _HEADER
    if len(data) * _DEFLATE <= most:
        return
    order = "big" if data[126:128] == b"MI" else "little"
    while at + 8 <= len(data):
        kind, length = (int.from_bytes(data[i : i + 4], order) for i in (at, at + 4))  # type: ignore[arg-type]
        packed, unpacking = data[at + 8 : at + 8 + length], zlib.decompressobj()
        at += 8 + length
        while kind == _COMPRESSED and packed:
            try:
                size += len(unpacking.decompress(packed, _PIECE))
            except zlib.error:
                return  # SciPy's reader describes damage
            packed = unpacking.unconsumed_tail
            if size > most:
                raise ValueError(unpacks_to(size, len(data)))
