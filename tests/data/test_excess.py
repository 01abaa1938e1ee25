"""Photographs of so many parts that reading takes minutes cost a line; progressive ones and metadata are read."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from distill.data.photos import BadImageError, decode


def jpeg(**options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(3 * 64 * 64, dtype=np.uint8).reshape(64, 64, 3)).save(file, "JPEG", **options)
    return file.getvalue()


def with_scans(count: int) -> bytes:
    data = jpeg(progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    return data[:at] + scan * count + b"\xff\xd9"


def test_many_scans_are_refused_and_some_are_read():
    whole = decode(jpeg(progressive=True))
    assert decode(with_scans(100)).shape == whole.shape
    assert (decode(jpeg(progressive=True) + b"\xff\xda\x00\x02" * 5000) == whole).all(), "a film behind it"
    with pytest.raises(BadImageError, match="more than 1000 scans"):
        decode(with_scans(1100))


def test_many_segments_are_refused_and_some_are_read():
    data = jpeg()
    for segment in (b"\xff\xfe\x00\x03a", b"\xff"):
        assert (decode(data[:2] + segment * 1000 + data[2:]) == decode(data)).all()
        with pytest.raises(BadImageError, match="more than 10000 parts"):
            decode(data[:2] + segment * 10_100 + data[2:])


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_many_tiny_chunks_are_refused_and_some_are_read():
    pixels = zlib.compress(b"".join(b"\0" + bytes(range(64)) for _ in range(64)))
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 0, 0, 0, 0))
    tail = chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    for name in (b"tEXt", b"IDAT"):
        tiny = chunk(name, b"a\0b" if name == b"tEXt" else b"")
        assert decode(head + (tiny * 1000 if name == b"tEXt" else b"") + tail).shape == (3, 64, 64)
        with pytest.raises(BadImageError, match="more than 100000 tiny chunks"):
            decode(head + tiny * 100_100 + tail)
