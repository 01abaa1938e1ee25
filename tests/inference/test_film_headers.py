"""What the first bytes of a film tell: how long it is, whether it is cut, and whether it is a film at all."""

from __future__ import annotations

import pytest

from distill.inference import video
from tests.inference.fake import film

MATROSKA, SEGMENT = b"\x1a\x45\xdf\xa3\x80", b"\x18\x53\x80\x67"
ASF = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365") + bytes(24)
FLV = b"FLV\1\5\0\0\0\x09" + bytes(4)


@pytest.mark.parametrize(
    ("data", "truncated"),
    [
        (MATROSKA + SEGMENT + b"\x8a" + bytes(10), False),
        (MATROSKA + SEGMENT + b"\x8a" + bytes(9), True),
        (MATROSKA + SEGMENT + b"\1" + b"\xff" * 7 + bytes(9), False),  # a live recording: of unknown length
        (b"RIFF" + (20).to_bytes(4, "little") + bytes(20), False),
        (b"RIFF" + (20).to_bytes(4, "little") + bytes(16), True),
        (bytes(30) + ASF + (90).to_bytes(8, "little") + bytes(12), False),
        (bytes(30) + ASF + (91).to_bytes(8, "little") + bytes(12), True),
        *((FLV + bytes([kind]) + bytes(14) + (15).to_bytes(4, "big"), kind == 7) for kind in (7, 8, 9, 18)),
        (FLV + bytes([9]) + bytes(4) + (5).to_bytes(4, "big"), True),  # shorter than any tag
        (b"\0\0\0\x08ftyp", False),
    ],
)
def test_a_header_tells_how_long_a_film_is(tmp_path, data, truncated):
    (tmp_path / "v").write_bytes(data)
    assert video._is_truncated(tmp_path / "v") is truncated


@pytest.mark.parametrize(
    ("data", "inside", "fragments"),
    [
        (b"\0\0\0\x09ftyp1\0\0\0\x09mdat1", None, False),
        (b"\0\0\0\x09ftyp1\0\0\0\x0amdat1", b"mdat", False),
        (b"\0\0\0\x09ftyp1\0\0\0\0mdat1", None, False),  # to the end, however long
        (b"\0\0\0\1mdat\0\0\0\0\0\0\0\x111", None, False),
        (b"\0\0\0\1mdat\0\0\0\0\0\0\0\x121", b"mdat", False),
        (b"\0\0\0\x99\xff\xfe\xfd\xfc", None, False),  # no box
        (b"\0\0\0\x09ftyp1\0\0\0\x08mo", b"", False),  # not even a box's name
        (b"\0\0\0\x09ftyp1\0\0\0\x09moof", b"moof", True),
        (b"\0\0\0\x09ftyp1\0\0\0\x08moof\0\0\0\x09mdat", b"mdat", True),
        (b"\0\0\0\x09ftyp1\0\0\0\x08moof\0\0\0\x09mdat1", None, False),
        (b"\0\0\0\x09ftyp1\0\0\0\x08moof\0\0\0\x09mfra", b"mfra", False),  # only the index is cut
    ],
)
def test_a_film_that_ends_inside_a_box_is_cut(tmp_path, data, inside, fragments):
    (tmp_path / "v").write_bytes(data)
    assert video._cut_box(tmp_path / "v") == inside
    assert video._is_truncated(tmp_path / "v") is fragments


def test_a_clock_is_seconds_and_a_raw_film_is_no_text(tmp_path):
    assert video._seconds("01:02:03.500000000") == 3723.5 and video._seconds("1 h") == 0
    (tmp_path / "a").write_bytes(b"YUV4MPEG2 W32 H24 F25:1\nFRAME\n")
    (tmp_path / "b").touch()
    assert video._other_format(tmp_path / "a") == "" and video._other_format(tmp_path / "b") == "empty"


def test_a_films_tags_may_be_of_any_encoding(tmp_path):
    """As cameras write them in Latin-1; the mkv's own name for its writer is of a known length."""
    path = film(tmp_path / "v.mkv", range(0, 200, 40))
    data = path.read_bytes()
    assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"\xe9\xe8vf"))
    assert len(list(video.Film(path))) == 5
