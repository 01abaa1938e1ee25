"""Stored maps: the numbers of one depth or disparity map, whatever it was written as, and the names that it goes by.

One reader for ground truth, benchmarks and predictions. The format is told by the first bytes, not by the suffix. Read
are npy, npz, PNG, TIFF (integers, float16 to float64), PFM, Sintel's dpt, EXR, HDF5, MATLAB's mat and COLMAP's bin.
Pictures of maps are not maps: colours, and palettes of colours, are refused, while a grey palette means its greys. A
16-bit PNG of `distill predict` carries its range and is given back as values.

A picture whose channels are all the same is its grey values; one that is transparent somewhere is refused. Where a TIFF
or HDF5 file says that there is no data (GDAL's tag, netCDF's _FillValue), the value is NaN.

Shapes: H height, W width of the map as stored.
"""

from __future__ import annotations

import contextlib
import io
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
from distill.data import damage, exrs, tiffs
from distill.data.photos import DECODE_ERRORS

READ = ".npy, .npz, .png (8 or 16 bits, grey), .tif, .pfm, .dpt, .exr, .h5, .mat and COLMAP's .bin"
SUFFIXES = (".npy", ".npz", ".pfm", ".exr", ".tif", ".tiff", ".dpt", ".h5", ".mat", ".png")
"""Where several files would do, the first of these is the map."""
MAPPED = 1 << 22
"""Bytes from which a .npy is mapped instead of read: fresh memory for it costs more time than reading it."""
_PAGES = 16
_MATRIX = 4
"""Sides up to which an array beside others is a camera's matrix."""
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
    "arr_0",
    "dataset",
)
_INVERSE = ("disparity", "disp")
"""Of these, the names of disparity."""
READ_ERRORS = (*DECODE_ERRORS, zipfile.BadZipFile, zlib.error, tokenize.TokenError, RecursionError)
"""What NumPy and the other readers raise on damaged files."""


class BadMapError(OSError):
    """A file that is no map; the message is the reason, without the file's name."""


def read_map(path: Path, quantity: str = "depth") -> np.ndarray:
    """(H,W) numbers of a file as they are stored, of any real dtype; BadMapError says why it is no map.

    quantity: "depth" or "disparity", which of both is taken of a file that holds both. Raises FileNotFoundError where
    there is none. Axes of length 1 are dropped.
    """
    plane = _read(path, quantity)
    if plane.dtype.kind == "b":
        raise BadMapError("holds true and false alone: a mask, not a map")
    return plane


def _read(path: Path, quantity: str) -> np.ndarray:
    if path.stat().st_size >= MAPPED:
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                try:
                    return _plane(np.asarray(np.load(path, allow_pickle=False, mmap_mode="c")))
                except READ_ERRORS as error:
                    raise BadMapError(_said("npy", error)) from error
    return decode_map(path.read_bytes(), path.name, quantity)


def decode_map(data: bytes, name: str = "", quantity: str = "depth") -> np.ndarray:
    """`read_map` of a file's bytes, masks included; name: of the file, for what is said of one of no known format."""
    if head := _COLMAP.match(data):
        return _plane(_colmap(data, head))
    for magic, kind, reader in _READERS:
        if data.startswith(magic):
            try:
                found = reader(data)
                return _plane(_chosen(found, quantity) if isinstance(found, dict) else found)
            except BadMapError:
                raise
            except READ_ERRORS as error:
                raise BadMapError(_said(kind, error)) from error
    suffix = PurePosixPath(name).suffix
    if suffix.lower() == ".mat" and data[:4] in _MAT_4:
        with contextlib.suppress(*READ_ERRORS):
            return _plane(_chosen(_mat(data), quantity))
    what = signatures.sniff(data) or signatures.text(data) or (_UNKNOWN if data else "empty")
    what = "JPEG, which changes the numbers of a map" if what == "JPEG" else what
    what += ": unpack it" if signatures.is_packed(what) else ""
    raise BadMapError(f"not a readable {suffix or 'map'} ({what}); read are {READ}")


_MAT_4 = {(1000 * big + 10 * dtype).to_bytes(4, ("little", "big")[big]) for big in (0, 1) for dtype in range(6)}
"""What MATLAB's version 4, which has no signature, begins with: the order of bytes and the type, double to uint8."""
_UNKNOWN = "of no known format: numbers without a header, as ETH3D's and RealSense's, are to be stored as .npy"


def _said(kind: str, error: BaseException) -> str:
    if "allow_pickle" in str(error) or "Python objects" in str(error):
        return f"not a readable .{kind} (pickled Python objects, which are not opened: save the array of numbers alone)"
    return f"not a readable .{kind} ({(str(error).splitlines() or [type(error).__name__])[0][:160]})"


def _plane(values: Any) -> np.ndarray:
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
        raise BadMapError(f"holds {getattr(values, 'dtype', type(values).__name__)}, not real numbers")
    plane = values if values.ndim == 2 else values.reshape([side for side in values.shape if side != 1])
    if plane.ndim != 2 or not plane.size:
        raise BadMapError(f"has the shape {values.shape}: a depth map has one channel, (H, W)")
    return plane


def _npz(data: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        sizes = {info.filename: info.file_size for info in archive.zip.infolist()}
        if sum(sizes.values()) > 1 << 32:
            raise BadMapError(f"unpacks to {sum(sizes.values())} bytes: not one map")
        if any(name.endswith("/data.pkl") for name in sizes):
            raise BadMapError(f"a torch file, not a map: save its tensor as .npy (read are {READ})")
        arrays: dict[str, Any] = {}
        for name in archive.files:
            try:
                arrays[name] = archive[name]
            except ValueError as error:  # notes beside the map may be pickled: they stay closed
                if "allow_pickle" not in str(error):
                    raise
                arrays[name] = "pickled"
        return arrays


def _chosen(arrays: Mapping[str, Any], quantity: str) -> np.ndarray:
    """The one map of several arrays: the one that is called as a map is, or the only one that can be one.

    What is called depth and has several planes is an error: a camera's 3 x 3 matrix beside it is no map. So are several
    depths of as many groups.
    """
    numbers = {n: a for n, a in arrays.items() if isinstance(a, np.ndarray) and a.dtype.kind in "fiu"}
    planes = {name: array for name, array in numbers.items() if sum(side != 1 for side in array.shape) == 2}
    meant = sorted(_NAMES, key=lambda name: name not in _INVERSE) if quantity == "disparity" else _NAMES
    called = [name for wanted in meant for name in numbers if name.rpartition("/")[2].lower() == wanted]
    if called and called[0] in planes:
        alike = [name for name in called if name.lower().rpartition("/")[2] == called[0].lower().rpartition("/")[2]]
        outermost = min(name.count("/") for name in alike)
        alike = [name for name in alike if name.count("/") == outermost]
        if len(alike) > 1:
            raise BadMapError(f"holds {', '.join(alike[:3])}: one map is needed")
        return planes[alike[0]]
    if len(numbers) > 1:
        planes = {name: array for name, array in planes.items() if sorted(array.shape)[-2] > _MATRIX}
    if len(planes) != 1 or called:
        listed = ", ".join(f"{name} {_sort(array)}" for name, array in list(arrays.items())[:5])
        raise BadMapError(f"holds {listed or 'nothing'}; one map is needed, or one that is called depth or disparity")
    return next(iter(planes.values()))


def _sort(array: Any) -> str:
    """What stands under a name: a shape, or what keeps it from being numbers."""
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        return array if isinstance(array, str) else "(no array)"
    if dtype.names:
        return f"(a struct of {', '.join(dtype.names[:5])}: save its field)"
    words = {"O": "cells or objects", "b": "true and false alone"}.get(dtype.kind, "")
    words = "a sparse matrix" if hasattr(array, "tocoo") else words
    return f"({words})" if words else str(array.shape)


def _picture(data: bytes) -> np.ndarray:
    if reason := damage.png_damage(data):
        raise BadMapError(reason)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.load()
        if image.mode == "P":
            return _grey(np.array(image.convert("RGB")), "a palette of colours: a picture of a map, not a map")
        values = np.array(image)
        if values.ndim == 3:
            if data[24] == 16:  # Pillow keeps eight bits of colours
                values = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
            return _grey(values, f"has {len(image.getbands())} channels: a picture, not a map")
        if image.mode.startswith("I") and {"kind", "low", "high"} <= set(image.info):
            low, high = float(image.info["low"]), float(image.info["high"])
            numbers = (low + values.astype(np.float64) / 65535 * (high - low)).astype(np.float32)
            return np.where(values == 0, np.float32(np.nan), numbers) if image.info.get("invalid") == "0" else numbers
        return values // (255 // (2 ** data[24] - 1)) if data[24] in (2, 4) else values  # Pillow stretches them to 255


def _grey(values: np.ndarray, otherwise: str) -> np.ndarray:
    """The one channel of a picture (H,W,C) whose colours are all the same; BadMapError says `otherwise`."""
    colours = values[..., : -1 if values.shape[-1] in (2, 4) else None]
    if (colours != colours[..., :1]).any():
        raise BadMapError(f"{otherwise}; a depth map has one channel: store its numbers")
    alpha = values[..., -1]
    if values.shape[-1] in (2, 4) and alpha.min() < np.iinfo(alpha.dtype).max:
        raise BadMapError("is transparent in places, and a map has no alpha: store what is invalid as 0")
    return np.ascontiguousarray(colours[..., 0])


_PFM = re.compile(rb"(Pf|PF)\s+(?:#[^\n]*\s+)*(\d+)\s+(\d+)\s+([-+.\deE]+)[ \t]*(\r\n|\n|\r|\s)")
_PGM = re.compile(rb"P([25])\s+(?:#[^\n]*\s+)*(\d+)\s+(?:#[^\n]*\s+)*(\d+)\s+(?:#[^\n]*\s+)*(\d+)\s")


def _pfm(data: bytes) -> np.ndarray:
    """Rows from the bottom up; the sign of the scale is the order of bytes, its size says nothing."""
    if not (head := _PFM.match(data)):
        raise BadMapError("not a readable .pfm (its header is not PFM's)")
    width, height, planes = int(head[2]), int(head[3]), 3 if head[1] == b"PF" else 1
    if not float(head[4]):
        raise BadMapError("not a readable .pfm (its scale is 0, whose sign would say the order of bytes)")
    if len(data) - head.end() == 8 * width * height * planes:
        raise BadMapError("not a readable .pfm (8 bytes a number, and PFM has 4: store float32)")
    kind = "<f4" if float(head[4]) < 0 else ">f4"
    start = head.end()
    if len(data) - start == 4 * width * height * planes - 1 and head[5] == b"\r\n":
        start -= 1  # a lone CR ended the header, and the first number begins with a byte like LF
    _check_length(data, start, 4 * width * height * planes, "pfm")
    values = np.frombuffer(data, kind, width * height * planes, start).reshape(height, width, planes)[::-1]
    if not np.array_equal(values, np.broadcast_to(values[..., :1], values.shape), equal_nan=True):
        raise BadMapError(f"has {planes} channels: a picture, not a map; a depth map has one channel")
    return values[..., 0]


def _pgm(data: bytes) -> np.ndarray:
    """The numbers as they stand, whatever the greatest may be: Pillow stretches them to eight or sixteen bits."""
    if not (head := _PGM.match(data)):
        raise BadMapError("not a readable .pgm (its header is not PGM's)")
    width, height, top = (int(head[i]) for i in (2, 3, 4))
    if head[1] == b"2":
        plain = np.array(re.sub(rb"#[^\n]*", b"", data[head.end() - 1 :]).split()[: width * height], dtype=np.int64)
        if plain.size != width * height:
            raise BadMapError(f"not a whole .pgm: {plain.size} numbers for {width} x {height}")
        return plain.reshape(height, width)
    if top > 65535:
        raise BadMapError(f"not a readable .pgm (its greatest value, {top}, is beyond 16 bits)")
    kind = np.dtype(">u2" if top > 255 else "u1")
    data = damage.without_cr(data)
    start = head.end()
    _check_length(data, start, kind.itemsize * width * height, "pgm")
    return np.frombuffer(data, kind, width * height, start).reshape(height, width)


def _check_length(data: bytes, start: int, size: int, kind: str) -> None:
    if size <= 0 or len(data) - start < size:
        raise BadMapError(f"not a whole .{kind}: {len(data) - start} bytes of pixels, and its header says {size}")


def _tiff(data: bytes) -> np.ndarray:
    page = 0  # the first may be a thumbnail
    with contextlib.suppress(Image.UnidentifiedImageError), Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
        if image.mode == "P":
            raise BadMapError("a TIFF with a palette: a picture of a map, not a map; store its numbers")
        sizes = [_page_size(image, number) for number in range(min(_PAGES, getattr(image, "n_frames", 1)))]
        page = max(range(len(sizes)), key=lambda number: sizes[number][0] * sizes[number][1])
        if sizes.count(sizes[page]) > 1:
            raise BadMapError(f"holds {sizes.count(sizes[page])} pictures of one size: one map is needed")
    return tiffs.without_nodata(tiffs.numbers(data, page), data, page)  # Pillow knows no float16 or float64


def _page_size(image: Any, number: int) -> tuple[int, int]:
    image.seek(number)
    return image.width, image.height


def _dpt(data: bytes) -> np.ndarray:
    """Sintel's: the number 202021.25, width, height, then float32, all little-endian."""
    width, height = struct.unpack("<ii", data[4:12])
    if min(width, height) > 0 and len(data) == 12 + 8 * width * height:
        raise BadMapError("optical flow (.flo), two numbers a pixel: not a map")
    if min(width, height) < 1 or len(data) != 12 + 4 * width * height:
        raise BadMapError(f"not a whole .dpt: {len(data)} bytes for {width} x {height} float32")
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width)


_COLMAP = re.compile(rb"(\d{1,6})&(\d{1,6})&(\d{1,3})&")


def _colmap(data: bytes, head: re.Match[bytes]) -> np.ndarray:
    """COLMAP's .bin: width&height&channels&, then float32, little-endian, a channel after the other."""
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
        import h5py
    except ImportError as error:
        raise BadMapError('HDF5 (or a new .mat): pip install "depth-distill[maps]", or store .npy') from error
    arrays: dict[str, np.ndarray] = {}

    def collect(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "fiub" and item.size < 1 << 30:
            # MATLAB writes columns first, and what is true and false as uint8.
            stored = item[()].T if "MATLAB_class" in item.attrs else item[()]
            mask = item.attrs.get("MATLAB_class") == b"logical"
            arrays[name] = np.asarray(stored, bool) if mask else _filled(np.asarray(stored), item.attrs)

    with h5py.File(io.BytesIO(data), "r") as file:
        file.visititems(collect)
    return arrays


def _filled(values: np.ndarray, notes: Mapping[str, Any]) -> np.ndarray:
    """NaN where netCDF's notes say that nothing was written; integers become floats then."""
    for name in ("_FillValue", "missing_value"):
        said = np.asarray(notes.get(name, np.nan)).ravel()
        if said.size == 1 and said.dtype.kind in "fiu" and (values == said[0]).any():
            wide = values if values.dtype.kind == "f" else values.astype(np.float64)
            values = np.where(values == said[0], wide.dtype.type(np.nan), wide)
    return values


def open_hdf5(path: Path) -> Any:
    """A whole HDF5 file (h5py.File), for one that holds many maps; OSError names it where it cannot be read."""
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise OSError(f"{path} is not a readable .mat of version 7.3 ({error}); download it again") from error


def _mat(data: bytes) -> dict[str, Any]:
    if data[124:126] in (b"\0\2",) or b"MATLAB 7.3" in data[:32]:
        return _hdf5(data)
    try:
        import scipy.io
    except ImportError as error:
        raise BadMapError('a .mat: pip install "depth-distill[teachers]", or store .npy') from error
    table = scipy.io.loadmat(io.BytesIO(data), chars_as_strings=False)
    masks = {name for name, _, sort in scipy.io.whosmat(io.BytesIO(data)) if sort == "logical"}  # which loadmat forgets
    arrays = {name: array for name, array in table.items() if not name.startswith("__")}
    return {name: array.astype(bool) if name in masks else array for name, array in arrays.items()}


def _png(data: bytes) -> np.ndarray:
    if changed := signatures.sniff(data[:8].ljust(8)).removeprefix("PNG"):
        raise BadMapError(f"not a readable .png ({changed})")
    return _picture(data)


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
    (b"PIEH", "dpt", _dpt),
    (b"v/1\x01", "exr", _exr),
    (b"\x89HDF\r\n\x1a\n", "h5", _hdf5),
    (b"MATLAB", "mat", _mat),
)


def stored_stems(key: str) -> list[str]:
    """The names, without suffix, under which the map of an image may be stored, the most particular first.

    key: the image's path below its root. For a/rgb_0001.png: a/rgb_0001.png, a/rgb_0001_png and a/rgb_0001 (as
    `distill predict` names its maps), a/pred_0001 and a/0001_pred (as Marigold's evaluation and its run.py do), then
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
    """The stored map of an image that goes by one of `keys`, in any format that is read; None where there is none."""
    stems = dict.fromkeys(stem for key in keys for stem in stored_stems(key))
    # A folder that came from a Mac spells accents in two characters, where a table has one.
    spelt = dict.fromkeys(unicodedata.normalize(form, stem) for form in ("NFC", "NFD") for stem in stems)
    for stem in [*stems, *(spelt.keys() - stems.keys())]:
        for suffix in SUFFIXES:
            for spelled in (suffix, suffix.upper()):
                if (path := folder / f"{stem}{spelled}").is_file():
                    return path
    return None
