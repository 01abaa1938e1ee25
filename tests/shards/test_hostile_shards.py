"""Labels of a stranger, with right checksums: a sentence for what cannot be, and no memory for what only claims."""

from __future__ import annotations

import copy
import gzip
import io
import json
import struct
import tarfile
import tracemalloc
import zlib

import cv2
import imagecodecs
import numpy as np
import pytest
from PIL import Image

from distill.core.files import file_sha256
from distill.data.photos import LIMIT
from distill.shards.codec import CODECS, decode_map, decode_sample, disagreements, encode_sample
from distill.shards.shards import read_manifest, verify, write_manifest
from tests.shards.samples import make_sample, write

SPAN = {"low": 0, "high": 1}


def png(width: int, height: int) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))]
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))


def jls(width: int, height: int) -> bytes:
    data = bytearray(imagecodecs.jpegls_encode(np.zeros((8, 8), np.uint16), level=7))
    at = data.find(b"\xff\xf7") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def oversize_jls() -> bytes:
    """Sides of four bytes, which stand in a segment of their own; the frame's own are 0."""
    data = jls(0, 0)
    at = data.find(b"\xff\xf7")
    return data[:at] + b"\xff\xf8" + struct.pack(">HBBII", 12, 4, 4, 1 << 20, 1 << 20) + data[at:]


def npy(shape: str) -> bytes:
    head = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head


CLAIMS = [
    ("png16", png(60_000, 60_000), "claims 60000 x 60000 pixels"),
    ("png16", cv2.imencode(".png", np.zeros((2, 2, 3), np.uint16))[1].tobytes(), "not a 16-bit map in png16"),
    ("png16", cv2.imencode(".tiff", np.zeros((2, 2), np.uint16))[1].tobytes(), "not a PNG"),
    ("jls", jls(65_535, 65_535), "claims 65535 x 65535 pixels"),
    ("jls", oversize_jls(), "claims 1048576 x 1048576 pixels"),
    ("zst", b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 36) + b"\1\0\0", "unpacks to 68719476736 bytes"),
    ("float16", gzip.compress(npy("(1048576, 1048576)")), "not a compressed npy"),
    ("float16", gzip.compress(npy("(" * 5000)), "not a compressed npy"),
    ("float16", gzip.compress(b"PK\3\4 an archive"), "other content"),
    ("float16", gzip.compress(npy("(8, 8)") + bytes(128))[:-9], "cut short"),
]


@pytest.mark.parametrize(("codec", "data", "told"), CLAIMS, ids=range(len(CLAIMS)))
def test_a_map_that_only_claims_its_size_takes_no_memory(codec, data, told):
    tracemalloc.start()
    try:
        with pytest.raises(OSError, match=rf"sa_1 is damaged: .*{told}"):
            decode_map(data, SPAN, codec=codec, where="sa_1")
        if codec != "float16":  # NumPy reserves address space, of which nothing is touched
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", list(CODECS))
def test_a_map_that_unpacks_to_more_than_a_photograph_is_refused_as_a_larger_limit_reads_it(codec, monkeypatch):
    data = CODECS[codec].write(np.full((300, 300), 3 * 4096, np.uint16))
    assert decode_map(data, SPAN, codec=codec)[0].shape == (300, 300)
    monkeypatch.setenv(LIMIT, "10000")
    with pytest.raises(OSError, match=r"pixels|bytes"):
        decode_map(data, SPAN, codec=codec)


def test_zstandard_without_its_size_is_read():
    plain = struct.pack("<II", 2, 3) + bytes(12)
    block = struct.pack("<I", len(plain) << 3 | 1)[:3]
    frame = b"\x28\xb5\x2f\xfd\x00\x58" + block + plain  # a window, no content size, one raw block
    assert decode_map(frame, SPAN, codec="zst")[0].shape == (2, 3)


def members() -> dict[str, bytes]:
    return {name.split(".", 1)[1]: data for name, data in encode_sample(make_sample(patches=1, teachers=("one",)))}


def places(value, path=()):
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = changed(value[path[0]], path[1:], new)
    return value


HOSTILE = [10**18, -1, 0, 10**400, float("inf"), True, "", "../x", "\x1b[2J", [], [[]], {"a": 1}, None]


def test_no_value_of_a_record_leads_to_a_traceback():
    whole = members()
    record = json.loads(whole["json"])
    del record["crc32"]
    for path in places(record):
        if path in ((), ("version",), ("codec",)):
            continue
        for value in HOSTILE:
            data = json.dumps(changed(record, path, value)).encode()
            try:
                list(disagreements(decode_sample({**whole, "json": data}, where="a.tar:sa_1")))
            except OSError as error:
                assert str(error).startswith("a.tar:sa_1") and len(str(error)) < 400, (path, value)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"version": ' + "9" * 5000 + "}", '{"version": 1, "codec": []}', "1"])
def test_a_record_that_is_none_is_told(text):
    with pytest.raises(OSError, match="a.tar:sa_1 is damaged: "):
        decode_sample({**members(), "json": text.encode()}, where="a.tar:sa_1")


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_region_that_is_not_rgb_is_told(mode):
    file, whole = io.BytesIO(), members()
    Image.new(mode, (16, 16)).save(file, "JPEG")
    record = {key: value for key, value in json.loads(whole["json"]).items() if key not in ("jpg", "crc32")}
    with pytest.raises(OSError, match="jpg is damaged: its pixels are not RGB"):
        decode_sample({**whole, "jpg": file.getvalue(), "json": json.dumps(record).encode()}, where="a")


@pytest.mark.parametrize(
    ("name", "kind"), [("../../.profile", b"0"), ("/etc/.x", b"0"), ("a-0.x", b"2"), ("a-0.y", b"1"), (".hid", b"0")]
)
def test_members_that_readers_pass_over_are_no_part_of_labels(tmp_path, name, kind):
    """They would be published with the others, and unpacked by someone else."""
    write(tmp_path, [make_sample("a-0")], sidecar=False)
    assert not [line for line in verify(tmp_path) if "plain file" in line]
    [tar] = tmp_path.glob("*.tar")
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd" if kind in b"12" else ""
    with tarfile.open(tar, "a") as out:
        out.addfile(info)
    manifest = read_manifest(tmp_path)
    manifest["shards"][0] |= {"sha256": file_sha256(tar), "bytes": tar.stat().st_size}
    write_manifest(tmp_path, manifest)
    assert [line for line in verify(tmp_path) if f"{name} in it is no plain file" in line]
