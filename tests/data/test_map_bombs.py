"""Maps of a stranger: few bytes that claim, or unpack to, any number of pixels end in a sentence, before any memory."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from distill.data import exrs, limits
from distill.data.limits import LIMIT
from distill.data.maps import BadMapError, decode_map


def png(width: int, height: int) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))]
    parts = [
        struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in [*chunks, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(width: int, height: int, bits: int) -> bytes:
    """Float samples, deflated; Pillow does not know those of 64 bits."""
    pixels = zlib.compress(bytes(99))
    tags = [(256, width), (257, height), (258, bits), (259, 8), (262, 1), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(pixels)), (339, 3)]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", 10) + table + bytes(4)


def hdf5(count: int, side: int, **options) -> bytes:
    h5py = pytest.importorskip("h5py")
    file = io.BytesIO()
    with h5py.File(file, "w") as archive:
        for number in range(count):
            archive.create_dataset(f"d{number}", shape=(side, side), dtype="f8", chunks=(100, 100), **options)
    return file.getvalue()


def exr(side: int) -> bytes:
    openexr = pytest.importorskip("OpenEXR")
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".exr") as file:
        header = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage}
        openexr.File(header, {"Z": np.zeros((16, 16), np.float32)}).write(file.name)
        data = file.read()
    return data.replace(struct.pack("<4i", 0, 0, 15, 15), struct.pack("<4i", 0, 0, side - 1, side - 1))


def npz(count: int, size: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(count):
            archive.writestr(f"a{number}.npy", bytes(size))
    return file.getvalue()


def mat(size: int) -> bytes:
    inner = struct.pack("<IIIIII", 14, size + 64, 6, 8, 6, 0) + bytes(size)
    packed = zlib.compress(inner)
    return b"MATLAB 5.0".ljust(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed


CLAIMS = {
    "a.png": lambda: png(60_000, 60_000),
    "b.png": lambda: png(17_000, 17_000),
    "a.tif": lambda: tiff(30_000, 30_000, 64),
    "b.tif": lambda: tiff(17_000, 17_000, 32),
    "c.tif": lambda: tiff(13_000, 13_000, 64),
    "a.h5": lambda: hdf5(1, 30_000),
    "b.h5": lambda: hdf5(9, 3_000, compression="gzip"),
    "a.exr": lambda: exr(100_000),
    "b.exr": lambda: exr(15_000),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_file_that_claims_what_it_cannot_hold_takes_no_memory(name):
    data = CLAIMS[name]()
    tracemalloc.start()
    try:
        with pytest.raises(BadMapError, match=r"set DISTILL_MAX_PIXELS|exceeds limit"):
            decode_map(data, name)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("name", "make"), [("a.npz", lambda: npz(3, 1 << 19)), ("a.mat", lambda: mat(3 << 19))])
def test_what_unpacks_to_far_more_than_its_bytes_is_refused_unless_told(name, make, monkeypatch):
    data = make()
    monkeypatch.setattr(limits, "_UNSUSPECTED", 1 << 20)
    with pytest.raises(
        BadMapError, match=r"bytes unpack to \d+: a decompression bomb\? If not, set DISTILL_MAX_PIXELS"
    ):
        decode_map(data, name)
    monkeypatch.setenv(LIMIT, "1000000")
    with pytest.raises(BadMapError) as told:  # neither holds a map
        decode_map(data, name)
    assert "bomb" not in str(told.value)


def test_a_large_map_that_compresses_well_is_read(monkeypatch):
    file = io.BytesIO()
    np.savez_compressed(file, depth=np.repeat(np.arange(2000, dtype=np.float32)[None], 2000, 0))
    monkeypatch.setattr(limits, "_UNSUSPECTED", 1 << 22)
    assert decode_map(file.getvalue(), "a.npz").shape == (2000, 2000)


def test_an_exr_counts_half_precision_as_two_bytes(tmp_path, monkeypatch):
    openexr = pytest.importorskip("OpenEXR")
    header = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage}
    planes = {f"L{number}.{name}": np.zeros((10, 20), np.float16) for number in range(6) for name in "ABGR"}
    parts = [
        openexr.Part({**header, "name": "beauty"}, planes),
        openexr.Part({**header, "name": "depth"}, {"Z": np.ones((10, 20), np.float32)}),
    ]
    openexr.File(parts).write(str(tmp_path / "a.exr"))
    data = (tmp_path / "a.exr").read_bytes()
    claimed = []
    monkeypatch.setattr(exrs, "unpacks_to", lambda size, packed: claimed.append((size, packed)) or "")
    assert (decode_map(data, "a.exr") == 1).all()
    assert claimed == [(200 * (24 * 2 + 4), len(data))]


def test_numbers_of_another_file_are_not_opened(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(bytes(range(64)))
    for name in ("external", "virtual"):
        file = io.BytesIO()
        with h5py.File(file, "w") as archive:
            if name == "external":
                archive.create_dataset("depth", (8, 8), "u1", external=[(str(tmp_path / "secret"), 0, 64)])
            else:
                layout = h5py.VirtualLayout((8, 8), "u1")
                layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "depth", (8, 8))
                archive.create_virtual_dataset("depth", layout)
        with pytest.raises(BadMapError, match="depth lies in other files, which are not opened"):
            decode_map(file.getvalue(), "a.h5")
