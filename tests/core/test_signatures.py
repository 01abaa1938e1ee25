"""One table of signatures: a kind that one reader knows is known to all of them, each with its own way out."""

import bz2
import gzip
import lzma

import numpy as np
import pytest

from distill.core.signatures import packer, sniff, text
from distill.core.weights import WeightsMismatchError, read_state
from distill.data.maps import BadMapError, decode_map
from distill.data.pairs import read_names
from distill.data.photos import BadImageError, decode

ZSTD = b"\x28\xb5\x2f\xfd" + bytes(range(40))
PACKED = {"gzip": gzip.compress(b"x" * 99), "bzip2": bz2.compress(b"x"), "xz": lzma.compress(b"x"), "zstd": ZSTD}


@pytest.mark.parametrize("name", PACKED)
def test_a_compressed_file_is_one_to_whoever_reads_it(tmp_path, name):
    data = PACKED[name]
    assert packer(data) == name and sniff(data) == f"compressed with {name}"
    asked = f"compressed with {name}.*: unpack it"
    with pytest.raises(BadImageError, match=asked):
        decode(data)
    with pytest.raises(BadMapError, match=asked):
        decode_map(data, "map.npy")
    file = tmp_path / "weights.pth"
    file.write_bytes(data)
    with pytest.raises(WeightsMismatchError, match=asked):
        read_state(file)
    with pytest.raises(ValueError, match=asked):
        read_names(file)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\0\0\0\x18ftypavis\0\0\0\0msf1miaf", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heicavif", "HEIC"),  # what follows the box is no brand
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "camera raw"),
        (b"\0\0\0\x18ftypqt  \0\0\0\0qt  qt  ", "a video (MP4)"),
        (b"MM\0+\0\x08\0\0", "TIFF"),
        (b"II+\0\x08\0\0\0", "TIFF"),
        (b"\x80\2}", "a Python pickle"),
        (b"\x80\5}", "a Python pickle"),
        (b"\x80\1}", ""),
    ],
)
def test_formats_that_differ_in_a_few_bytes(data, kind):
    assert sniff(data + bytes(99)) == kind


def test_text_is_text_where_its_beginning_ends_inside_a_letter():
    for number in range(3):
        assert text(b"x" * number + ("\u5317" * 300).encode()).startswith("text, beginning '"), number
    assert not text(bytes(range(128, 256)) * 4)


def test_weights_that_are_another_kind_of_file(tmp_path):
    for start, kind in ((b"II*\0" + bytes(30), "TIFF"), (b"%PDF-1.7" + b"\1" * 9, "a PDF"), (b"GGUF\3", "GGUF")):
        (tmp_path / "w.pth").write_bytes(start)
        with pytest.raises(WeightsMismatchError, match=f"is {kind}, not weights of a torch network"):
            read_state(tmp_path / "w.pth")


def test_a_list_that_is_a_picture_is_named_and_names_like_a_signature_are_read(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes(b"\xff\xd8\xff\xe0" + bytes(60))
    with pytest.raises(ValueError, match="not a text file but JPEG"):
        read_names(file)
    names = ["BM_001.jpg", "MATLAB/2.jpg", "OggS.png", "FLV.png"]
    file.write_text("\n".join(names))
    assert read_names(file) == names
    assert packer(np.arange(9, dtype=np.float32).tobytes()) == ""
