"""Videos become frames and films, whole or as far as they can be read."""

from __future__ import annotations

import json
import re
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition

from distill.data import hdr
from distill.data.photos import BadImageError
from distill.inference import predict, video
from tests.inference.fake import Fake, call, film, grey, names, shoot, silent


def test_a_video_becomes_frames_and_films(tmp_path, monkeypatch):
    out, estimator = tmp_path / "out", Fake()
    shoot(tmp_path / "v.mp4", 3)
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    jobs = predict.survey([str(tmp_path / "*.mp4")], out=out).jobs
    synced, sync = [], predict.files.sync_tree
    monkeypatch.setattr(
        predict.files, "sync_tree", lambda path: synced.append((path, (out / "v.json").exists())) or sync(path)
    )
    done = predict.run(estimator, jobs, out=out, formats=["png", "npy", "side"], report=silent)
    assert done.written == 1 and [line.split(": ")[0] for line in done.problems] == [str(tmp_path / "bad.mp4")]
    assert synced == [(out / "v", False)], "the frames are on the disk before the file that says so"
    frames = [f"v/{i:06d}.{suffix}" for i in range(3) for suffix in ("npy", "png")]
    assert names(out) == ["predict.json", "predict_sources.jsonl", "v.json", *frames, "v_side.mp4"]
    shown = video.Film(out / "v_side.mp4")
    assert [rgb.shape for rgb in shown] == [(30, 80, 3)] * 3 and shown.rate == 10.0
    assert predict.run(estimator, jobs, out=out, formats=["png", "npy", "side"], report=silent).present == 1
    assert estimator.calls == 3


# --- videos -----------------------------------------------------------------------------------------------------------


def test_a_damaged_video_keeps_its_frames_and_is_not_complete(tmp_path):
    out, path = tmp_path / "o", tmp_path / "v.avi"
    shoot(path, 12, size=(320, 240), codec="MJPG")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    count = len(list(video.Film(path)))
    assert 0 < count < 12
    for _ in range(2):
        done = call(Fake(), path, out=out, formats=["npy", "colour"])
        assert done == (0, 0, [f"{path}: stops at frame {count} of 12"])
        assert len(list((out / "v").glob("*.npy"))) == count and not (out / "v.json").exists()
        assert len(list(video.Film(out / "v_colour.mp4"))) == count
    path.write_bytes(whole)
    assert call(Fake(), path, out=out, formats=["npy"]) == (1, 0, [])
    assert len(list((out / "v").glob("*.npy"))) == 12 and not (out / "v_colour.mp4").exists()


def test_a_shorter_video_leaves_no_frame_of_the_longer_one(tmp_path):
    out, video = tmp_path / "o", tmp_path / "v.mp4"
    shoot(video, 4)
    call(Fake(), video, out=out)
    shoot(video, 2)
    assert call(Fake(), video, out=out) == (1, 0, [])
    assert names(out / "v") == ["000000.npy", "000001.npy"] and json.loads((out / "v.json").read_text())["frames"] == 2


def test_formats_of_a_video_add_up(tmp_path):
    out, estimator = tmp_path / "o", Fake()
    shoot(tmp_path / "v.mp4", 3)
    for formats, calls in ((["npy"], 3), (["colour"], 6), (["npy"], 6), (["colour", "npy"], 6)):
        call(estimator, tmp_path / "v.mp4", out=out, formats=formats)
        assert estimator.calls == calls
    assert json.loads((out / "v.json").read_text()) == {"frames": 3, "formats": ["colour", "npy"]}
    (out / "v" / "000001.npy").unlink()
    assert call(estimator, tmp_path / "v.mp4", out=out) == (1, 0, []) and estimator.calls == 7


def test_photos_that_are_called_as_frames_are_keep_apart_from_a_film_that_came_first(tmp_path):
    shoot(tmp_path / "v.mp4", 2)
    for i in range(2):
        grey(tmp_path / "photos" / "v" / f"{i:06d}.png", 10 * i)
    given = (tmp_path / "v.mp4", tmp_path / "photos")
    assert call(Fake(), *given, out=tmp_path / "o") == (3, 0, [])
    assert call(Fake(), *given, out=tmp_path / "o") == (0, 3, [])
    assert len([name for name in names(tmp_path / "o") if name.endswith(".npy")]) == 4


def test_a_film_keeps_apart_from_frames_that_were_not_made_here(tmp_path):
    shoot(tmp_path / "v.mp4", 2)
    (tmp_path / "o" / "v").mkdir(parents=True)
    (tmp_path / "o" / "v" / "000007.jpg").write_text("mine")
    assert call(Fake(), tmp_path / "v.mp4", out=tmp_path / "o") == (1, 0, [])
    made = [name for name in names(tmp_path / "o") if "/" in name]
    assert made == ["v/000007.jpg", "v_mp4/000000.npy", "v_mp4/000001.npy"]


def test_the_range_of_a_films_colours_moves_slowly(tmp_path, monkeypatch):
    shoot(tmp_path / "v.mp4", 3)
    seen, plain = [], predict.coloured
    monkeypatch.setattr(predict, "_shown", lambda near: (0.0, float(10 * (1 + len(seen) // 2))))
    monkeypatch.setattr(predict, "coloured", lambda near, span: (seen.append(span), plain(near, span))[1])
    call(Fake(), tmp_path / "v.mp4", out=tmp_path / "o", formats=("colour",))
    assert [span[1] for span in seen] == pytest.approx([10.0, 10.0, 11.0])  # a tenth of the way to 20


def test_a_video_tells_every_frame(tmp_path):
    shoot(tmp_path / "v.mp4", 3)
    told = []
    call(Fake(), tmp_path / "v.mp4", out=tmp_path / "o", report=lambda *at, **numbers: told.append((at, numbers)))
    frames = [((0, 1), {"frame": i, "frames": 3}) for i in range(3)]
    assert told == [((0, 1), {}), *frames, ((1, 1), {})]


def test_a_trimmed_film_is_what_players_show(tmp_path):
    shoot(tmp_path / "v.mp4", 12)
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    # An edit list of one entry: 0.6 s of 1.2, from the start on; it takes the place of the empty room in udta.
    trak, tkhd = data.index(b"trak") - 4, data.index(b"tkhd") - 4
    end = tkhd + int.from_bytes(data[tkhd : tkhd + 4], "big")
    old = data.index(b"elst") if b"elst" in data else None
    assert old is not None and trak < end
    length = int.from_bytes(data[old + 12 : old + 16], "big")
    data[old + 12 : old + 16] = (length // 2).to_bytes(4, "big")
    (tmp_path / "v.mp4").write_bytes(data)
    assert video.Film(tmp_path / "v.mp4").total == 6
    assert call(Fake(), tmp_path / "v.mp4", out=tmp_path / "o") == (1, 0, [])
    count = len(names(tmp_path / "o" / "v"))
    assert 6 <= count <= 7
    assert call(Fake(), tmp_path / "v.mp4", out=tmp_path / "o") == (0, 1, [])


def test_what_is_no_film_says_so_and_nothing_else_is_printed(tmp_path, capfd):
    (tmp_path / "v.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(500))
    (line,) = call(Fake(), tmp_path / "v.mp4", out=tmp_path / "o")[2]
    assert "not a video that can be opened" in line or "no video in it" in line
    assert capfd.readouterr() == ("", "")


def test_a_film_whose_index_is_cut_is_told_as_cut(tmp_path):
    shoot(tmp_path / "v.mp4", 3)
    data = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(data[: data.index(b"stsd") + 20])
    with pytest.raises(BadImageError, match="it is cut"):
        video.Film(tmp_path / "v.mp4")


UNEVEN = [0, 33, 66, 5000, 5033, 5066, 60000]


@pytest.mark.parametrize("name", ["v.mkv", "v.mp4", "v.flv"])
def test_a_whole_film_is_whole_at_any_rate_and_with_longer_sound(tmp_path, name):
    codec = "flv1" if name.endswith("flv") else "mpeg4"
    for times, sound in ((UNEVEN, 0.0), ([0, 100, 200], 6.0)):
        shown = video.Film(film(tmp_path / name, times, sound=0 if codec == "flv1" else sound, codec=codec))
        assert len(list(shown)) == len(times) and not shown.problem


@pytest.mark.parametrize("name", ["v.mkv", "v.mp4", "v.flv"])
def test_a_film_says_how_many_frames_to_expect(tmp_path, name):
    shown = video.Film(film(tmp_path / name, range(0, 400, 40), codec="flv1" if name.endswith("flv") else "mpeg4"))
    assert (shown.rate, shown.total, len(list(shown))) == (25.0, 10, 10)


def test_frames_that_are_damaged_are_counted_but_those_before_the_first_whole_one(tmp_path):
    shoot(tmp_path / "v.avi", 12, size=(320, 240), codec="MJPG")
    data = bytearray((tmp_path / "v.avi").read_bytes())
    starts = [match.start() for match in re.finditer(b"\xff\xd8\xff", data)]
    for damaged, said in (
        ((5, 7), "2 of its frames are damaged; 10 could be decoded"),
        ((0,), "2 of its frames are damaged; 9 could be decoded"),
    ):
        for i in damaged:
            data[starts[i] : starts[i] + 600] = bytes(600)
        (tmp_path / "v.avi").write_bytes(data)
        shown = video.Film(tmp_path / "v.avi")
        assert len(list(shown)) == 12 - len(damaged) - (2 if 0 in damaged else 0) and shown.problem == said


def test_the_cover_of_a_song_is_no_film(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as out:
        cover, audio = out.add_stream("mjpeg", rate=1), out.add_stream("aac", rate=8000)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 32, 24, "yuvj420p", Disposition.attached_pic
        out.mux([*cover.encode(av.VideoFrame(32, 24, "yuvj420p")), *cover.encode(None)])
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        out.mux([*audio.encode(silence), *audio.encode(None)])
    with pytest.raises(BadImageError, match="no video in it"):
        video.Film(tmp_path / "v.mp4")


@pytest.mark.parametrize("name", ["v.mkv", "v.flv"])
def test_a_cut_film_is_not_whole(tmp_path, name):
    path = film(tmp_path / name, range(0, 900, 100), codec="flv1" if name.endswith("flv") else "mpeg4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shown = video.Film(path)
    assert len(list(shown)) < 9 and shown.problem.startswith("stops at frame")


def test_a_film_that_is_cut_in_the_middle_of_a_frame_stops_there(tmp_path):
    path = film(tmp_path / "v.mp4", range(0, 900, 100), codec="libx264", options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shown = video.Film(path)
    count = len(list(shown))
    assert 0 < count < 9 and shown.problem == f"stops at frame {count} of 9"


@pytest.mark.parametrize("options", [{"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"}])
def test_a_film_that_is_cut_inside_its_first_frame_is_told_as_cut(tmp_path, options):
    path = film(tmp_path / "v.mp4", range(0, 900, 100), codec="libx264", options=options)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 40])
    shown = video.Film(path)
    assert list(shown) == [] and shown.problem == "it is cut short before the end of its first frame: copy it again"


def test_oblong_pixels_and_a_change_of_size_are_shown_as_players_do(tmp_path):
    for aspect, shape in ((Fraction(4, 3), (24, 43, 3)), (Fraction(3, 4), (32, 32, 3)), (Fraction(6), (24, 32, 3))):
        (shown,) = list(video.Film(film(tmp_path / "v.mp4", [0], aspect=aspect)))
        assert shown.shape == shape
    parts = [film(tmp_path / f"{w}.ts", [0, 40, 80], sides=(w, 32), codec="mpeg2video").read_bytes() for w in (32, 48)]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    assert {frame.shape for frame in video.Film(tmp_path / "both.ts")} == {(32, 32, 3)}


@pytest.mark.parametrize(("transfer", "code", "paper"), [(hdr.PQ, 0.5807, 244), (hdr.HLG, 0.75, 244), (2, 0.75, 191)])
def test_a_film_in_high_dynamic_range_is_shown_in_the_range_of_screens(tmp_path, transfer, code, paper):
    with av.open(str(tmp_path / "v.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv444p10le"
        stream.codec_context.color_trc, stream.codec_context.color_primaries = transfer, hdr.P3
        grey = np.full((24, 32, 3), round(code * 65535), np.uint16)
        grey[12:] = 40000, 25000, 15000
        frame = av.VideoFrame.from_ndarray(grey, format="rgb48le").reformat(format="yuv444p10le")
        frame.color_trc, frame.color_primaries = transfer, hdr.P3
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    (shown,) = list(video.Film(tmp_path / "v.mkv"))
    assert shown.dtype == np.uint8 and np.abs(shown[:11].astype(int) - paper).max() <= 2
    colour = hdr.to_srgb(grey[-1:, :1], transfer, primaries=hdr.P3) if transfer != 2 else grey[-1, 0] / 257
    assert np.abs(shown[-1] - np.asarray(colour, float)).max() <= 3


def test_a_film_without_its_index_is_told_as_cut_and_a_picture_as_one(tmp_path):
    shoot(tmp_path / "v.mp4", 12, size=(320, 240))
    data = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(data[: data.index(b"moov") - 40])
    with pytest.raises(BadImageError, match="it is cut"):
        video.Film(tmp_path / "v.mp4")
    (tmp_path / "p.mp4").write_bytes(b"\xff\xd8\xff" + bytes(50))
    picture = video.Film(tmp_path / "p.mp4")
    assert not list(picture) and picture.problem == "not a video: it is JPEG"


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html></html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"ffconcat version 1.0\nfile v.avi\n",
    ],
)
def test_a_page_in_a_films_place_is_named(tmp_path, data):
    (tmp_path / "v.mp4").write_bytes(data)
    shoot(tmp_path / "v.avi", 2, codec="MJPG")
    with pytest.raises(BadImageError, match="not a video: it is (text, beginning|a git-lfs)"):
        video.Film(tmp_path / "v.mp4")


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((0, 0, 0, 0), lambda rgb: rgb),  # of mp4box.js (its issue 284): no player turns such a film
        ((-1, 0, 0, 1), lambda rgb: rgb[:, ::-1]),  # mirrored, which PyAV's angle calls 180 degrees
        ((1, 0, 0, -1), lambda rgb: rgb[::-1]),
        ((-1, 0, 0, -1), lambda rgb: rgb[::-1, ::-1]),
        ((0, 1, -1, 0), lambda rgb: np.rot90(rgb, -1)),
        ((0, -1, 1, 0), np.rot90),
    ],
)
def test_a_film_is_shown_as_its_matrix_says(tmp_path, matrix, shown):
    with video.writer(tmp_path / "v.mp4") as write:
        write((np.arange(30 * 40 * 3).reshape(30, 40, 3) // 15).astype(np.uint8), 10)
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    plain = next(iter(video.Film(tmp_path / "v.mp4")))
    start = data.index(b"tkhd") + 44
    a, b, c, d = (entry << 16 for entry in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "v.mp4").write_bytes(data)
    assert np.array_equal(next(iter(video.Film(tmp_path / "v.mp4"))), shown(plain))


def test_frames_wider_than_the_format_are_written_smaller(tmp_path):
    with video.writer(tmp_path / "v.mp4") as write:
        write(np.full((8, 8200, 3), 90, np.uint8), 10)
    assert next(iter(video.Film(tmp_path / "v.mp4"))).shape == (4, 4100, 3)


def test_a_film_that_is_written_has_its_colours_and_even_sides(tmp_path, monkeypatch):
    with video.writer(tmp_path / "v.mp4") as write:
        write(np.full((31, 41, 3), (200, 60, 20), np.uint8), 10)
    shown = next(iter(video.Film(tmp_path / "v.mp4")))
    assert shown.shape == (32, 42, 3) and np.abs(shown.astype(int) - (200, 60, 20)).max() <= 8, "no black edge"

    class Closed:
        fourcc, release = staticmethod(lambda *_: 0), staticmethod(lambda: None)

        def __init__(self, *_):
            pass

        def isOpened(self):  # noqa: N802  (OpenCV's name)
            return False

    monkeypatch.setattr(video.cv2, "VideoWriter", Closed)
    with pytest.raises(OSError, match=r"cannot write .*w.mp4: OpenCV cannot write this video"):
        with video.writer(tmp_path / "w.mp4") as write:
            write(np.zeros((8, 8, 3), np.uint8), 10)
    assert not (tmp_path / "w.mp4").exists()


@pytest.mark.parametrize("turned", [0, 90])
def test_an_interlaced_film_has_no_combs(tmp_path, turned):
    with av.open(str(tmp_path / "v.mp4"), "w") as out:
        stream = out.add_stream("mpeg2video", rate=25, options={"flags": "+ildct+ilme"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 4_000_000
        if turned:
            stream.set_display_rotation(turned)
        for time in range(6):
            woven = np.zeros((64, 96, 3), np.uint8)
            for field in (0, 1):  # the second is of a moment later: the bar has moved on
                woven[field::2, 10 + 4 * (2 * time + field) :][:, :20] = 255
            frame = av.VideoFrame.from_ndarray(woven, format="rgb24")
            frame.pts = time
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    film = video.Film(tmp_path / "v.mp4")
    shown = list(film)
    assert len(shown) == 6 and not film.problem and shown[0].shape == ((96, 64, 3) if turned else (64, 96, 3))
    rows = np.rot90(shown[3], -1 if turned else 0)[1:-1].astype(int)
    assert np.abs(np.diff(rows, axis=0)).mean() < 1, "every second row is of another moment"


@pytest.mark.parametrize(
    ("profile", "compatible", "read"), [(5, 0, False), (8, 4, True), (10, 0, False), (10, 1, True)]
)
def test_dolby_vision_without_a_picture_for_others_is_refused(tmp_path, profile, compatible, read):
    record = bytes([1, 0, profile << 1, 0x35, compatible << 4])
    shoot(tmp_path / "v.mp4", 3)
    data = (tmp_path / "v.mp4").read_bytes()
    box = (32).to_bytes(4, "big") + b"dvcC" + record.ljust(24, b"\0")
    moov = data.index(b"moov") - 4
    size = int.from_bytes(data[moov : moov + 4], "big")
    data = data[:moov] + (size + 32).to_bytes(4, "big") + data[moov + 4 : moov + size] + box + data[moov + size :]
    (tmp_path / "v.mp4").write_bytes(data)
    if read:
        assert len(list(video.Film(tmp_path / "v.mp4"))) == 3
    else:
        with pytest.raises(BadImageError, match="Dolby Vision of profile 5.*convert it with"):
            video.Film(tmp_path / "v.mp4")
    named = b"\x41\xe7\x84dvcC\x41\xed\x98"
    (tmp_path / "v.mkv").write_bytes(b"\x1a\x45\xdf\xa3" + named + record.ljust(24, b"\0"))
    assert video._of_dolby(tmp_path / "v.mkv") is not read
