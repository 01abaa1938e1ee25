"""Reader of stored depth and disparity maps in many formats, and the names under which the map of an image is found.

One reader for ground truth, benchmarks and predictions. The format is detected from the first bytes, not the suffix.
Supported: npy, npz, PNG, TIFF (integers, float16 to float64), PFM, PGM, Sintel's dpt, EXR, HDF5, MATLAB's mat, COLMAP's
bin. Colour pictures of maps, with or without a palette, are refused; a grey palette is read as its grey values. A
16-bit PNG of `distill predict` stores its range and is converted back to values; TartanAir V2's RGBA PNGs of depth are
known by their names.

A picture with identical channels is read as grey; one with an alpha channel in use is refused. Values that a file says
are missing (GDAL's tag, mask or transparent grey, netCDF's _FillValue or valid_range) become NaN; numbers that it says
mean others (scale, offset, unit) are refused, unless the caller applies just that scale.

Shapes: H height, W width of the map as a viewer shows it: the orientation tag of a PNG or TIFF is applied.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
import tokenize
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from PIL import Image

from distill.core import signatures
from distill.core.wording import first_line
from distill.data import damage, exrs, hdf5s, limits, mats, orientation, packing, rgba_floats, tiffs
from distill.data.photos import DECODE_ERRORS

READ = ".npy, .npz, .png (8 or 16 bits, grey), .tif, .pfm, .dpt, .exr, .h5, .mat and COLMAP's .bin"
SUFFIXES = (".npy", ".npz", ".pfm", ".exr", ".tif", ".tiff", ".dpt", ".h5", ".mat", ".png")
"""Suffixes of maps by priority: where several files exist, the first of these is read."""
REDUCED = "has 8 bits per pixel, but its depth has 16: a tool reduced it; unpack it again"
"""The clause about a published 16-bit map that was stored anew with eight."""
MAPPED = 1 << 22
"""Size in bytes from which a .npy is memory-mapped: allocating memory for it would take longer than reading it."""
_MATRIX = 4
"""Side up to which an array beside others is taken for a camera matrix."""
_NAMES = (
    "depth",
    "disparity",
    "disp",
    "depth_map",
    "depthmap",
    "pred",
    "prediction",
    "pred_depth",
    "predicted_depth",
    "inverse_depth",
    "inv_depth",
    "invdepth",
    "idepth",
    "arr_0",
    "dataset",
)
_INVERSE = ("disparity", "disp", "inverse_depth", "inv_depth", "invdepth", "idepth")
"""Those of _NAMES that mean disparity."""
READ_ERRORS = (*DECODE_ERRORS, zipfile.BadZipFile, zlib.error, tokenize.TokenError, RecursionError)
"""Exceptions of NumPy and the other readers on damaged files."""


class BadMapError(OSError):
    """A file that is not a map; the message is the reason, without the file's name."""


def read_map(path: str | Path, quantity: str = "", *, scale: float | None = 1.0) -> np.ndarray:
    """The upright (H,W) values of a file, of any real dtype or packing.Gapped; BadMapError says why it is no map.

    quantity: "depth" or "disparity", the one to take from a file that holds both; a file that only holds disparity by
    its arrays' names is not read as depth. "": either, depth first. scale: by which the caller multiplies the values
    (None: unknown); a file that declares another is refused. Raises FileNotFoundError for a missing file. Axes of
    length 1 are dropped.
    """
    plane = _read(Path(path), quantity, scale)
    if plane.dtype.kind == "b":
        raise BadMapError("holds only true and false: a mask, not a map")
    return plane


def largest(dtype: np.dtype) -> float:
    """The largest number of a type up to 32 bits: "out of range" in many data sets, a true depth in a few."""
    if dtype.kind in "iu":
        return float(np.iinfo(dtype).max)
    return float(np.finfo(dtype).max) if dtype == np.float16 else math.inf


def _read(path: Path, quantity: str, scale: float | None) -> np.ndarray:
    if path.stat().st_size >= MAPPED:
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                try:
                    return _plane(np.asarray(np.load(path, allow_pickle=False, mmap_mode="c")))
                except READ_ERRORS as error:
                    raise BadMapError(_unreadable("npy", error)) from error
    return decode_map(path.read_bytes(), path.name, quantity, scale=scale)


def decode_map(data: bytes, name: str = "", quantity: str = "", *, scale: float | None = 1.0) -> np.ndarray:
    """`read_map` for a file's bytes, masks included; name: the file's, for errors and TartanAir V2's depth."""
    if head := _COLMAP.match(data):
        return _plane(_colmap(data, head))
    for magic, kind, reader in _READERS:
        if data.startswith(magic):
            try:
                decoded = orientation.upright(_png(data, name) if kind == "png" else reader(data), data)
                return _plane(_choose_map(decoded, quantity) if isinstance(decoded, dict) else decoded, scale)
            except BadMapError:
                raise
            except READ_ERRORS as error:
                raise BadMapError(_unreadable(kind, error)) from error
    suffix = PurePosixPath(name).suffix
    if suffix.lower() == ".mat" and data[:4] in _MAT_4:
        with contextlib.suppress(*READ_ERRORS):
            return _plane(_choose_map(_mat(data), quantity))
    description = signatures.sniff(data) or signatures.text(data) or (_UNKNOWN if data else "empty")
    if description == "JPEG":  # JPEG-LS is another: it may be lossless
        description = damage.odd_jpeg(data).partition(",")[0] or "JPEG, which changes the numbers of a map"
    description += ": unpack it" if signatures.is_packed(description) else ""
    raise BadMapError(f"not a readable {suffix or 'map'} ({description}); supported: {READ}")


_MAT_4 = {(1000 * big + 10 * dtype).to_bytes(4, ("little", "big")[big]) for big in (0, 1) for dtype in range(6)}
"""First bytes of MATLAB version 4, which has no signature: byte order and data type, double to uint8."""
_UNKNOWN = "unknown format: store numbers without a header, as ETH3D and RealSense write them, as .npy"
_CUT = ("EOF: reading array", "mmap length is greater", "File is not a zip file", "truncated file")
"""Parts of the messages of NumPy, zipfile and HDF5 about a file that begins well."""


def _unreadable(kind: str, error: BaseException) -> str:
    if "allow_pickle" in str(error) or "Python objects" in str(error):
        return f"not a readable .{kind} (pickled Python objects, which are not loaded: save only the array of numbers)"
    if any(words in str(error) for words in _CUT):
        return f"not a readable .{kind} (truncated: its end is missing)"
    return f"not a readable .{kind} ({first_line(error, most=160)})"


def _plane(values: Any, scale: float | None = 1.0) -> np.ndarray:
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
        packed = ", as numpy stores bfloat16: save it as float32" if getattr(values, "dtype", None) == "V2" else ""
        raise BadMapError(f"holds {getattr(values, 'dtype', type(values).__name__)}, not real numbers{packed}")
    if reason := packing.conflict(values, scale):
        raise BadMapError(reason)
    values = values if isinstance(values, packing.Gapped) else np.asarray(values)
    plane = values if values.ndim == 2 else values.reshape([side for side in values.shape if side != 1])
    if plane.ndim != 2 or not plane.size:
        raise BadMapError(f"has the shape {values.shape}: a depth map has one channel, (H, W)")
    return plane


def _npz(data: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        sizes = {info.filename: info.file_size for info in archive.zip.infolist()}
        if reason := limits.unpacks_to(sum(sizes.values()), len(data)):
            raise BadMapError(reason)
        if any(name.endswith("/data.pkl") for name in sizes):
            raise BadMapError(f"a torch file, not a map: save its tensor as .npy (supported: {READ})")
        arrays: dict[str, Any] = {}
        for name in archive.files:
            try:
                arrays[name] = archive[name]
            except ValueError as error:  # pickled metadata beside the map is not opened
                if "allow_pickle" not in str(error):
                    raise
                arrays[name] = "pickled"
        return arrays


def _choose_map(arrays: Mapping[str, Any], quantity: str) -> np.ndarray:
    """The map among several arrays: the one with a map's name, or else the only two-dimensional one.

    An array named as a map that is not two-dimensional is an error, whatever lies beside it (such as a 3 x 3 camera
    matrix). So are maps of the same name in several groups at the same nesting level.
    """
    numbers = {n: a for n, a in arrays.items() if isinstance(a, np.ndarray) and a.dtype.kind in "fiu"}
    planes = {name: array for name, array in numbers.items() if sum(side != 1 for side in array.shape) == 2}
    by_priority = sorted(_NAMES, key=lambda name: name not in _INVERSE) if quantity == "disparity" else _NAMES
    matches = [name for candidate in by_priority for name in numbers if name.rpartition("/")[2].lower() == candidate]
    if matches and matches[0] in planes:
        same_name = [
            name for name in matches if name.lower().rpartition("/")[2] == matches[0].lower().rpartition("/")[2]
        ]
        outermost = min(name.count("/") for name in same_name)
        same_name = [name for name in same_name if name.count("/") == outermost]
        if len(same_name) > 1:
            raise BadMapError(f"holds {', '.join(same_name[:3])}: one map is needed")
        if quantity == "depth" and same_name[0].rpartition("/")[2].lower() in _INVERSE:
            raise BadMapError(f"holds {same_name[0]}, but depth is expected: give the kind disparity, or store depth")
        return planes[same_name[0]]
    if len(numbers) > 1:
        planes = {name: array for name, array in planes.items() if sorted(array.shape)[-2] > _MATRIX}
    if len(planes) != 1 or matches:
        listed = ", ".join(f"{name} {_describe(array)}" for name, array in list(arrays.items())[:5])
        raise BadMapError(f"holds {listed or 'nothing'}; one map is needed, or one named depth or disparity")
    return next(iter(planes.values()))


def _describe(array: Any) -> str:
    """Description of an array for error messages: its shape, or why it is not numeric."""
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        return array if isinstance(array, str) else "(no array)"
    if dtype.names:
        return f"(a struct of {', '.join(dtype.names[:5])}: save its field)"
    words = {"O": "cells or objects", "b": "only true and false"}.get(dtype.kind, "")
    words = "a sparse matrix" if hasattr(array, "tocoo") else words
    return f"({words})" if words else str(array.shape)


def _png_values(data: bytes, name: str) -> np.ndarray:
    if reason := damage.png_damage(data):
        raise BadMapError(reason)
    with limits.opened(data, "PNG") as image:
        image.load()
        if image.mode == "P":
            return _grey_plane(np.array(image.convert("RGB")), "a palette of colours: a picture of a map, not a map")
        values = np.array(image)
        if values.ndim == 3:
            if data[24] == 16:  # Pillow reduces colours to eight bits
                values = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
            elif (numbers := rgba_floats.numbers(values, name)) is not None:
                return numbers
            return _grey_plane(values, rgba_floats.fault(values, name))
        if image.mode.startswith("I") and {"kind", "low", "high"} <= set(image.info):
            low, high = float(image.info["low"]), float(image.info["high"])
            numbers = (low + values.astype(np.float64) / 65535 * (high - low)).astype(np.float32)
            return np.where(values == 0, np.float32(np.nan), numbers) if image.info.get("invalid") == "0" else numbers
        values = values // (255 // (2 ** data[24] - 1)) if data[24] in (2, 4) else values  # Pillow scales them to 255
        clear = image.info.get("transparency")  # GDAL writes its no-data value as this level
        return tiffs.with_gaps(values, values == clear) if type(clear) is int and values.dtype.kind == "u" else values


def _grey_plane(values: np.ndarray, otherwise: str) -> np.ndarray:
    """The grey values (H,W) of a picture (H,W,C) with identical channels; else BadMapError with `otherwise`."""
    colours = values[..., : -1 if values.shape[-1] in (2, 4) else None]
    equal_nan = colours.dtype.kind == "f"
    if not np.array_equal(colours, np.broadcast_to(colours[..., :1], colours.shape), equal_nan=equal_nan):
        raise BadMapError(f"{otherwise}; a depth map has one channel: store its numbers")
    alpha = values[..., -1]
    if values.shape[-1] in (2, 4) and alpha.min() < np.iinfo(alpha.dtype).max:
        raise BadMapError("is partly transparent, but a map has no alpha: store invalid pixels as 0")
    return np.ascontiguousarray(colours[..., 0])


_PFM = re.compile(rb"(Pf|PF)\s+(?:#[^\n]*\s+)*(\d+)\s+(\d+)\s+([-+.\deE]+)[ \t]*(\r\n|\n|\r|\s)")
_PGM = re.compile(rb"P([25])\s+(?:#[^\n]*\s+)*(\d+)\s+(?:#[^\n]*\s+)*(\d+)\s+(?:#[^\n]*\s+)*(\d+)\s")


def _pfm(data: bytes) -> np.ndarray:
    """Rows are stored bottom up; the sign of the scale gives the byte order, its magnitude is ignored."""
    if not (head := _PFM.match(data)):
        raise BadMapError("not a readable .pfm (its header is not PFM's)")
    width, height, planes = int(head[2]), int(head[3]), 3 if head[1] == b"PF" else 1
    if not float(head[4]):
        raise BadMapError("not a readable .pfm (its scale is 0, but the scale's sign gives the byte order)")
    if len(data) - head.end() == 8 * width * height * planes:
        raise BadMapError("not a readable .pfm (8 bytes per number, but PFM has 4: store float32)")
    kind = "<f4" if float(head[4]) < 0 else ">f4"
    start = head.end()
    if len(data) - start == 4 * width * height * planes - 1 and head[5] == b"\r\n":
        start -= 1  # the header ended in a lone CR, and the first value's first byte equals LF
    _check_length(data, start, 4 * width * height * planes, "pfm")
    values = np.frombuffer(data, kind, width * height * planes, start).reshape(height, width, planes)[::-1]
    if not np.array_equal(values, np.broadcast_to(values[..., :1], values.shape), equal_nan=True):
        raise BadMapError(f"has {planes} channels: a picture, not a map; a depth map has one channel")
    return values[..., 0]


def _pgm(data: bytes) -> np.ndarray:
    """The values as stored, whatever the header's maximum: Pillow would scale them to eight or sixteen bits."""
    if not (head := _PGM.match(data)):
        raise BadMapError("not a readable .pgm (its header is not PGM's)")
    width, height, top = (int(head[i]) for i in (2, 3, 4))
    if head[1] == b"2":
        values = np.array(re.sub(rb"#[^\n]*", b"", data[head.end() - 1 :]).split()[: width * height], dtype=np.int64)
        if values.size != width * height:
            raise BadMapError(f"not a whole .pgm: {values.size} numbers for {width} x {height}")
        return values.reshape(height, width)
    if top > 65535:
        raise BadMapError(f"not a readable .pgm (its maximum value, {top}, exceeds 16 bits)")
    kind = np.dtype(">u2" if top > 255 else "u1")
    data = damage.without_cr(data)
    start = head.end()
    _check_length(data, start, kind.itemsize * width * height, "pgm")
    return np.frombuffer(data, kind, width * height, start).reshape(height, width)


def _check_length(data: bytes, start: int, size: int, kind: str) -> None:
    if size <= 0 or len(data) - start < size:
        raise BadMapError(f"not a whole .{kind}: {len(data) - start} bytes of pixels, but its header says {size}")


def _tiff(data: bytes) -> np.ndarray:
    page, mask = 0, None  # the largest page: the first may be a thumbnail
    with contextlib.suppress(Image.UnidentifiedImageError), limits.opened(data, "TIFF") as image:
        if image.mode == "P":
            raise BadMapError("a TIFF with a palette: a picture of a map, not a map; store its numbers")
        sizes, masks = tiffs.page_sizes(image)
        page = max(sizes, key=lambda number: sizes[number][0] * sizes[number][1])
        if (count := list(sizes.values()).count(sizes[page])) > 1:
            raise BadMapError(f"holds {count} pictures of one size: one map is needed")
        mask = next((number for number, size in masks.items() if size == sizes[page]), None)
    values = tiffs.numbers(data, page)  # Pillow does not support float16 or float64
    if values.ndim == 3 and values.shape[-1] == 3:
        values = _grey_plane(values, "has 3 channels: a picture, not a map")
    return tiffs.as_declared(values, data, page, mask)


def _dpt(data: bytes) -> np.ndarray:
    """Sintel's .dpt: the number 202021.25, width, height, then float32, all little-endian."""
    width, height = struct.unpack("<ii", data[4:12])
    if min(width, height) > 0 and len(data) == 12 + 8 * width * height:
        raise BadMapError("optical flow (.flo), two numbers per pixel: not a map")
    if min(width, height) < 1 or len(data) != 12 + 4 * width * height:
        raise BadMapError(f"not a whole .dpt: {len(data)} bytes for {width} x {height} float32")
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width)


_COLMAP = re.compile(rb"(\d{1,6})&(\d{1,6})&(\d{1,3})&")


def _colmap(data: bytes, head: re.Match[bytes]) -> np.ndarray:
    """COLMAP's .bin: width&height&channels&, then little-endian float32, one channel after the other."""
    width, height, planes = (int(head[i]) for i in (1, 2, 3))
    _check_length(data, head.end(), 4 * width * height * planes, "bin")
    return np.frombuffer(data, "<f4", width * height * planes, head.end()).reshape(planes, height, width)


def _exr(data: bytes) -> np.ndarray:
    try:
        return exrs.one_map(exrs.channels(data), _NAMES)
    except ImportError as error:
        raise BadMapError('an EXR: pip install "depth-distill[maps]", or store .npy') from error
    except ValueError as error:
        raise BadMapError(str(error)) from error


def _hdf5(data: bytes) -> dict[str, Any]:
    try:
        return dict(hdf5s.arrays(data))
    except ImportError as error:
        raise BadMapError('HDF5 (or a new .mat): pip install "depth-distill[maps]", or store .npy') from error


def _mat(data: bytes) -> dict[str, Any]:
    if data[124:126] in (b"\0\2",) or b"MATLAB 7.3" in data[:32]:
        return _hdf5(data)
    try:
        return mats.arrays(data)
    except ImportError as error:
        raise BadMapError('a .mat: pip install "depth-distill[teachers]", or store .npy') from error


def _png(data: bytes, name: str = "") -> np.ndarray:
    if changed := signatures.sniff(data[:16].ljust(8)).removeprefix("PNG"):
        raise BadMapError(f"not a readable .png ({changed})")
    return _png_values(data, name)


_READERS = (
    (b"\x93NUMPY", "npy", lambda data: np.load(io.BytesIO(data), allow_pickle=False)),
    (b"PK\3\4", "npz", _npz),
    (b"\x89PNG", "png", _png),
    (b"Pf", "pfm", _pfm),
    (b"PF", "pfm", _pfm),
    (b"P5", "pgm", _pgm),
    (b"P2", "pgm", _pgm),
    (b"II*\0", "tif", _tiff),
    (b"MM\0*", "tif", _tiff),
    (b"II+\0", "tif", _tiff),
    (b"MM\0+", "tif", _tiff),
    (b"PIEH", "dpt", _dpt),
    (b"v/1\x01", "exr", _exr),
    (b"\x89HDF\r\n\x1a\n", "h5", _hdf5),
    (b"MATLAB", "mat", _mat),
)


def stored_stems(key: str) -> list[str]:
    """The names, without suffix, under which the map of an image may be stored, the most specific first.

    key: the image's path below its root. For a/rgb_0001.png: a/rgb_0001.png, a/rgb_0001_png and a/rgb_0001 (the names
    of `distill predict`), a/pred_0001 and a/0001_pred (those of Marigold's evaluation and its run.py), then
    a/rgb_0001_depth and a/rgb_0001_disp, a/rgb_0001_raw_depth_meter (Depth Anything V2's metric run.py) and
    a/rgb_0001/depth (MoGe's infer).
    """
    path = PurePosixPath(key)
    stem = path.stem if len(path.suffix) > 1 else path.name
    plain = stem.removeprefix("rgb_")
    names = [path.name, f"{stem}_{path.suffix[1:].lower()}" if len(path.suffix) > 1 else stem, stem]
    names += [f"pred_{plain}", f"{plain}_pred", f"{stem}_pred", f"pred_{stem}", f"{stem}_depth", f"{stem}_disp"]
    places = [path.with_name(name) for name in (*names, f"{stem}_raw_depth_meter")]
    return list(dict.fromkeys(map(str, (*places, path.with_name(stem) / "depth"))))


def find_map(folder: Path, keys: Iterable[str]) -> Path | None:
    """The stored map of an image that has one of `keys`, in any supported format; None where there is none."""
    stems = list(dict.fromkeys(stem for key in keys for stem in stored_stems(key)))
    # File names from a Mac may store accents decomposed (NFD), while a table has them composed (NFC).
    renormalized = [unicodedata.normalize(form, stem) for form in ("NFC", "NFD") for stem in stems]
    for stem in dict.fromkeys(stems + renormalized):
        for suffix in SUFFIXES:
            for spelling in (suffix, suffix.upper()):
                if (path := folder / f"{stem}{spelling}").is_file():
                    return path
    return None
