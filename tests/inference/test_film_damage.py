"""Films of which a part never arrived or is damaged are not taken for whole ones."""

from __future__ import annotations

import re

import pytest

from distill.data.photos import BadImageError
from distill.inference import video
from tests.inference.fake import film


@pytest.mark.parametrize("name", ["v.avi", "v.ts"])
def test_a_film_whose_end_never_arrived_is_not_whole(tmp_path, name):
    """Downloaders that reserve the whole file's room leave zeros where parts are missing."""
    path = film(tmp_path / name, range(0, 1200, 40), sides=(96, 64), codec="mpeg4")
    whole = video.Film(path)
    assert len(list(whole)) == 30 and not whole.problem
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    shown = video.Film(path)
    count = len(list(shown))
    assert 0 < count < 30 and re.match(f"stops at frame {count} of .*it ends in zeros", shown.problem)
    path.write_bytes(bytes(len(data)))
    with pytest.raises(BadImageError, match="zeros at its start, as of an unfinished download"):
        video.Film(path)


def test_black_pixels_at_the_end_are_no_lost_ones(tmp_path):
    """A frame of a grey film without compression is zeros where it is black."""
    frames = [bytes([level]) * (96 * 64) for level in (200, 100, 0)]
    header = b"YUV4MPEG2 W96 H64 F25:1 Ip A1:1 Cmono\n"
    (tmp_path / "v.y4m").write_bytes(header + b"".join(b"FRAME\n" + frame for frame in frames))
    shown = video.Film(tmp_path / "v.y4m")
    assert len(list(shown)) == 3 and not shown.problem


def test_fragments_that_never_arrived_are_told(tmp_path):
    """The header of a film in fragments does not say how many there are."""
    options = {"movflags": "frag_every_frame+empty_moov"}
    path = film(tmp_path / "v.mp4", range(0, 400, 40), options=options)
    data = path.read_bytes()
    assert len(list(shown := video.Film(path))) == 10 and not shown.problem
    starts = [match.start() - 4 for match in re.finditer(b"moof", data)]
    path.write_bytes(data[: starts[6] + 30])
    shown = video.Film(path)
    count = len(list(shown))
    assert 0 < count <= 6 and shown.problem == f"stops at frame {count} of more"


def test_frames_that_a_decoder_mended_are_counted_as_damaged(tmp_path):
    path = film(tmp_path / "v.avi", range(0, 1200, 40), sides=(96, 64), codec="mpeg4")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    path.write_bytes(data)
    shown = video.Film(path)
    count = len(list(shown))
    assert shown.problem == f"1 of its frames are damaged; {count} could be decoded"
