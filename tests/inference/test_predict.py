"""`distill predict`: every input becomes whole files or one line, whatever the others; a second call does the rest."""

from __future__ import annotations

import json
import os

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from distill.app import cli
from distill.core.depth import DepthMap, Kind
from distill.inference import outputs, predict, video
from distill.teachers.checkpoint import native_shape


class Fake:
    """Disparity = the red channel, counted."""

    class card:  # noqa: N801
        weights, revision, native_size, kind, licence = "fake", "r1", 64, Kind.AFFINE_DISPARITY, "CC0"

    def __init__(self):
        self.calls = 0

    def predict(self, images):
        self.calls += 1
        values = images[:, 0] if images.ndim == 4 else images[:1]
        values = values.float()
        return DepthMap(values, torch.ones_like(values, dtype=torch.bool), Kind.AFFINE_DISPARITY)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    ramp = np.tile(np.arange(0, 160, 4, dtype=np.uint8), (30, 1))
    for name in ("a.png", "a.jpg", "sub/b.png"):
        Image.fromarray(np.stack([ramp, ramp * 0, ramp * 0], -1)).save(folder / name)
    return folder


def silent(done, total, **numbers):
    pass


def call(estimator, *inputs, out, formats=("npy",), report=silent):
    """What the verb does, with a student of the test's."""
    jobs = predict.find([str(given) for given in inputs], out=out)
    done = predict.run(estimator, jobs, out=out, formats=list(formats), report=report)
    return done.written, done.present, done.problems


def grey(path, value, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_inputs_are_folders_globs_and_files_once_each(photos, tmp_path):
    out = photos / "out"
    jobs = predict.find([str(photos), str(photos / "*.png"), str(photos / "a.jpg")], out=out)
    assert [(j.path.name, j.stem) for j in jobs] == [("a.jpg", "a"), ("a.png", "a_png"), ("b.png", "sub/b")]
    assert [j.stem for j in predict.find([str(photos / "**" / "b.*")], out=out)] == ["b"]
    with pytest.raises(FileNotFoundError, match="nope.*: no photo or video there"):
        predict.find([str(photos / "nope*")], out=out)


def test_all_formats_hold_the_prediction(photos, tmp_path):
    out, estimator = tmp_path / "out", Fake()
    jobs = predict.find([str(photos / "a.png")], out=out)
    done = predict.run(estimator, jobs, out=out, formats=list(outputs.FORMATS), report=silent)
    assert (done.written, done.present, done.problems) == (1, 0, [])
    assert names(out) == ["a.npy", "a.png", "a_colour.png", "a_side.jpg", "predict.json", "predict_sources.jsonl"]
    values = np.load(out / "a.npy")
    assert values.dtype == np.float32 and values.shape == (30, 40) and values.max() == 156
    with Image.open(out / "a.png") as picture:
        codes, said = np.asarray(picture).astype(np.float64), dict(picture.text)
    assert codes.min() == 0 and codes.max() == 65535 and said["kind"] == "affine_disparity"
    low, high = float(said["low"]), float(said["high"])
    np.testing.assert_allclose(low + codes / 65535 * (high - low), values, atol=(high - low) / 65535)
    with Image.open(out / "a_side.jpg") as side:
        assert side.size == (80, 30)
    colour = np.asarray(Image.open(out / "a_colour.png")).astype(int).sum(-1)
    assert colour[0, -1] > colour[0, 0]  # near is bright


def test_a_bad_photo_is_one_line_and_a_second_call_does_the_rest(photos, tmp_path):
    out, estimator = tmp_path / "out", Fake()
    (photos / "cut.jpg").write_bytes((photos / "a.jpg").read_bytes()[:200])
    (photos / "text.png").write_text("hello")
    jobs = predict.find([str(photos)], out=out)
    done = predict.run(estimator, jobs, out=out, report=silent)
    assert done.written == 3 and len(done.problems) == 2 and estimator.calls == 3
    assert all(str(photos) in line and "\n" not in line for line in done.problems)
    (out / "sub" / "b_side.jpg").unlink()
    (photos / "text.png").write_bytes((photos / "a.png").read_bytes())
    again = predict.run(estimator, jobs, out=out, report=silent)
    assert (again.written, again.present, len(again.problems)) == (2, 2, 1) and estimator.calls == 5
    assert not [name for name in names(out) if ".new." in name]


def test_another_student_does_not_mix_into_the_same_folder(photos, tmp_path):
    out, estimator = tmp_path / "out", Fake()
    jobs = predict.find([str(photos)], out=out)
    predict.run(estimator, jobs, out=out, report=silent)
    other = Fake()
    other.card = type("card", (Fake.card,), {"revision": "r2"})
    with pytest.raises(ValueError, match="out: holds predictions with another revision .fake.; give another --out"):
        predict.run(other, jobs, out=out, report=silent)


def shoot(path, frames, size=(40, 30), codec="mp4v"):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 10, size)
    for i in range(frames):
        writer.write(np.full((size[1], size[0], 3), 20 * i, np.uint8) + np.arange(size[0], dtype=np.uint8)[:, None])
    writer.release()


def test_a_video_becomes_frames_and_films(tmp_path):
    out, estimator = tmp_path / "out", Fake()
    shoot(tmp_path / "v.mp4", 3)
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    jobs = predict.find([str(tmp_path / "*.mp4")], out=out)
    done = predict.run(estimator, jobs, out=out, formats=["png", "npy", "side"], report=silent)
    assert done.written == 1 and [line.split(": ")[0] for line in done.problems] == [str(tmp_path / "bad.mp4")]
    frames = [f"v/{i:06d}.{suffix}" for i in range(3) for suffix in ("npy", "png")]
    assert names(out) == ["predict.json", "predict_sources.jsonl", "v.json", *frames, "v_side.mp4"]
    shapes = [rgb.shape for rgb, *_ in video.frames(out / "v_side.mp4")]
    assert shapes == [(30, 80, 3)] * 3
    assert predict.run(estimator, jobs, out=out, formats=["png", "npy", "side"], report=silent).present == 1
    assert estimator.calls == 3


def test_the_verb_from_photo_to_files(photos, tmp_path, capsys):
    out = tmp_path / "maps"
    (photos / "text.png").write_text("hello")
    arguments = ["predict", str(photos / "a.png"), str(photos / "text.png"), "--out", str(out), "--device", "cpu"]
    assert cli.main([*arguments, "--size", "28", "--write", "npy"]) == 1
    said = capsys.readouterr()
    assert "1 of 2 predicted, 1 could not be used" in said.out and "text.png: not an image" in said.err
    assert np.load(out / "a.npy").shape == (30, 40)
    assert cli.main(["predict", str(photos / "a.png"), "--student", "no/such", "--out", str(out)]) == 2
    assert "no/such: no such folder" in capsys.readouterr().err


def test_five_lines_give_a_depth_map(photos):
    depth = predict.load("pocket", device="cpu", size=28).predict(predict.read(photos / "a.png"))
    assert isinstance(depth, DepthMap) and depth.values.shape == (1, 30, 40) and depth.kind == "affine_disparity"


# --- which input made which map ---------------------------------------------------------------------------------------


def value(path):
    return float(np.load(path).mean())


def test_equal_names_of_two_folders_never_share_a_map(tmp_path):
    out = tmp_path / "o"
    grey(tmp_path / "x" / "a.png", 10)
    grey(tmp_path / "y" / "a.png", 20)
    assert call(Fake(), tmp_path / "x" / "a.png", out=out) == (1, 0, [])
    assert call(Fake(), tmp_path / "y" / "a.png", out=out) == (1, 0, [])
    assert value(out / "a.npy") == 10 and value(out / "a_png.npy") == 20
    estimator = Fake()
    assert call(estimator, tmp_path / "y" / "a.png", tmp_path / "x" / "a.png", out=out) == (0, 2, [])
    assert estimator.calls == 0


def test_a_new_photo_does_not_take_the_name_of_an_older_one(tmp_path):
    out, folder = tmp_path / "o", tmp_path / "in"
    grey(folder / "a.png", 10)
    call(Fake(), folder, out=out)
    grey(folder / "a.jpg", 20)
    assert call(Fake(), folder, out=out) == (1, 1, [])
    assert value(out / "a.npy") == 10 and value(out / "a_jpg.npy") == 20


def test_a_photo_that_changed_is_done_again_and_its_old_maps_go(tmp_path):
    out, photo = tmp_path / "o", tmp_path / "a.png"
    grey(photo, 10)
    call(Fake(), photo, out=out, formats=["npy", "side"])
    grey(photo, 20)
    os.utime(photo, ns=(1, 1))
    assert call(Fake(), photo, out=out) == (1, 0, [])
    assert value(out / "a.npy") == 20 and not (out / "a_side.jpg").exists()
    assert call(Fake(), photo, out=out) == (0, 1, [])


@pytest.mark.parametrize("cut", [1, 20])
def test_a_cut_record_loses_one_step_and_no_map(tmp_path, cut):
    out = tmp_path / "o"
    for name, level in (("a", 10), ("b", 20)):
        grey(tmp_path / "in" / f"{name}.png", level)
    call(Fake(), tmp_path / "in", out=out)
    record = out / outputs.SOURCES
    record.write_bytes(record.read_bytes()[:-cut])
    estimator = Fake()
    written, present, problems = call(estimator, tmp_path / "in", out=out)
    assert (written, present, problems) == ((0, 2, []) if cut == 1 else (1, 1, []))
    assert call(Fake(), tmp_path / "in", out=out) == (0, 2, [])
    assert [value(out / "a.npy"), value(out / "b.npy")] == [10, 20] and len(list(out.glob("*.npy"))) == 2
    for line in filter(None, record.read_text().splitlines()[-1:]):
        assert json.loads(line)["formats"] == ["npy"]


def test_a_kill_between_two_maps_of_a_photo_costs_that_photo_alone(tmp_path, monkeypatch):
    out = tmp_path / "o"
    grey(tmp_path / "a.png", 10)
    written = predict._write

    def stop(path, name, *rest):
        if name == "side":
            raise KeyboardInterrupt
        written(path, name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(predict, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            call(Fake(), tmp_path / "a.png", out=out, formats=["npy", "side"])
    assert call(Fake(), tmp_path / "a.png", out=out, formats=["npy", "side"]) == (1, 0, [])
    assert sorted(path.name for path in out.glob("a*")) == ["a.npy", "a_side.jpg"]


def test_a_folder_without_a_record_is_refused(tmp_path):
    out = tmp_path / "o"
    grey(tmp_path / "a.png", 10)
    call(Fake(), tmp_path / "a.png", out=out)
    (out / outputs.SOURCES).unlink()
    with pytest.raises(ValueError, match="o: holds maps of an earlier version.*give another --out"):
        call(Fake(), tmp_path / "a.png", out=out)
    assert value(out / "a.npy") == 10


def test_names_that_any_job_could_make_are_reserved(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "o"
    for i, name in enumerate(["a.jpg", "a_colour.jpg", "a_side.jpg", "v/000001.png", "v/000002.png"]):
        grey(folder / name, 10 * i)
    shoot(folder / "v.mp4", 3)
    shoot(folder / "predict.mp4", 2)
    shoot(folder / "a_side.mp4", 2)
    formats = list(outputs.FORMATS)
    assert call(Fake(), folder, out=out, formats=formats) == (8, 0, [])
    before = {name: (out / name).read_bytes() for name in names(out)}
    again = Fake()
    assert call(again, folder, out=out, formats=formats) == (0, 8, []) and again.calls == 0
    assert before == {name: (out / name).read_bytes() for name in names(out)}
    assert len([name for name in before if name.endswith(".npy")]) == 5 + 3 + 2 + 2
    assert json.loads(before["predict.json"])["revision"] == "r1"


def test_maps_beside_the_photos_leave_the_photos_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["a.png", "b.jpg", "sub/c.jpg"]):
        grey(tmp_path / name, 10 * (i + 1))
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    formats = list(outputs.FORMATS)
    assert call(Fake(), ".", out=predict.Path("."), formats=formats) == (3, 0, [])
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    assert (tmp_path / "a_png.png").is_file() and (tmp_path / "b.png").is_file()
    assert call(Fake(), ".", out=predict.Path("."), formats=formats) == (0, 3, [])
    assert call(Fake(), "*", out=predict.Path("."), formats=formats)[2] == []
    with pytest.raises(FileNotFoundError, match="b_side.jpg: no photo or video there but what this command made in"):
        call(Fake(), "b_side.jpg", out=predict.Path("."))


def test_a_file_that_was_not_made_here_is_never_overwritten(tmp_path):
    out = tmp_path / "o"
    grey(tmp_path / "a.png", 10)
    call(Fake(), tmp_path / "a.png", out=out)
    (out / "a_side.jpg").write_text("mine")
    written, _, problems = call(Fake(), tmp_path / "a.png", out=out, formats=["side"])
    assert written == 0 and problems == [
        f"{out / 'a_side.jpg'}: is there, and was not made from this input (a map of {tmp_path / 'a.png'})"
    ]
    assert (out / "a_side.jpg").read_text() == "mine"


# --- one line, and the others go on -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA: no more"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 12 bytes"),
    ],
)
def test_a_photo_too_large_for_the_memory_is_one_line(tmp_path, error):
    class Small(Fake):
        def predict(self, images):
            if images.shape[-1] > 8:
                raise error
            return super().predict(images)

    grey(tmp_path / "in" / "a.png", 10, size=(9, 6))
    grey(tmp_path / "in" / "b.png", 10)
    written, _, problems = call(Small(), tmp_path / "in", out=tmp_path / "o")
    assert written == 1
    assert problems == [f"{tmp_path / 'in' / 'a.png'}: not enough memory; --size N or a smaller image"]


def test_a_fault_of_the_student_is_not_blamed_on_a_photo(tmp_path):
    class Broken(Fake):
        def predict(self, images):
            raise RuntimeError("shape '[2]' is invalid for input of size 3")

    grey(tmp_path / "a.png", 10)
    with pytest.raises(RuntimeError, match="invalid for input"):
        call(Broken(), tmp_path / "a.png", out=tmp_path / "o")


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    out = tmp_path / "o"
    grey(tmp_path / "in" / "a.png", 10)
    grey(tmp_path / "in" / "sub" / "b.png", 10)
    out.mkdir()
    (out / "sub").write_text("in the way")
    written, _, problems = call(Fake(), tmp_path / "in", out=out)
    assert written == 1 and len(problems) == 1
    assert problems[0].startswith(f"{out / 'sub'}: File exists (a map of ")


def test_a_full_disk_names_the_map(tmp_path, monkeypatch):
    def full(path, values):
        raise OSError("100 requested and 0 written")  # what NumPy says

    grey(tmp_path / "a.png", 10)
    monkeypatch.setattr(np, "save", full)
    problems = call(Fake(), tmp_path / "a.png", out=tmp_path / "o")[2]
    assert problems == [f"{tmp_path / 'o' / 'a.npy'}: 100 requested and 0 written (a map of {tmp_path / 'a.png'})"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"revision": '])
def test_a_damaged_settings_file_is_named(tmp_path, text):
    grey(tmp_path / "a.png", 10)
    call(Fake(), tmp_path / "a.png", out=tmp_path / "o")
    (tmp_path / "o" / "predict.json").write_text(text)
    with pytest.raises(ValueError, match=r"o.predict.json: damaged, .*; give another --out, or delete this file"):
        call(Fake(), tmp_path / "a.png", out=tmp_path / "o")


def test_an_out_that_is_a_file_or_below_one_is_named(tmp_path):
    grey(tmp_path / "a.png", 10)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="^[^[].*file: is a file, and the maps need a folder; give another"):
        call(Fake(), tmp_path / "a.png", out=tmp_path / "file")
    with pytest.raises(OSError, match=r"^[^[].*file.below: cannot be written .*; give another --out"):
        call(Fake(), tmp_path / "a.png", out=tmp_path / "file" / "below")


@pytest.mark.parametrize("given", ["", " "])
def test_an_empty_name_is_not_the_working_directory(tmp_path, given):
    with pytest.raises(ValueError, match="names no photo; give files, folders or globs"):
        predict.find([given], out=tmp_path)


def test_a_folder_with_brackets_and_gifs_are_found(tmp_path):
    for name in ("b [1]/x.jpg", "b [1]/y.gif", "b 1/z.jpg"):
        grey(tmp_path / name, 10)
    found = predict.find([str(tmp_path / "b [1]" / "*.jpg")], out=tmp_path / "o")
    assert [job.path.name for job in found] == ["x.jpg"]
    assert [job.path.name for job in predict.find([str(tmp_path / "b [1]")], out=tmp_path / "o")] == ["x.jpg", "y.gif"]
    assert call(Fake(), tmp_path / "b [1]", out=tmp_path / "o") == (2, 0, [])


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_one_line(photos, tmp_path, capsys, device):
    code = cli.main(["predict", str(photos / "a.png"), "--out", str(tmp_path / "o"), "--device", device])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and f"device '{device}' cannot be used here: " in lines[0]


@pytest.mark.parametrize(
    ("height", "width", "shape"),
    [
        (480, 640, (224, 294)),
        (160, 640, (224, 896)),
        (640, 160, (896, 224)),
        (100, 800, (224, 1792)),
        (1, 1000, (224, 1792)),
        (80, 1, (1792, 224)),
    ],
)
def test_a_strip_is_squashed_and_a_photo_is_not(height, width, shape):
    assert native_shape(height, width, 224, 14) == shape


# --- videos -----------------------------------------------------------------------------------------------------------


def test_a_damaged_video_keeps_its_frames_and_is_not_complete(tmp_path):
    out, path = tmp_path / "o", tmp_path / "v.avi"
    shoot(path, 12, size=(320, 240), codec="MJPG")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    count = len(list(video.frames(path)))
    assert 0 < count < 12
    for _ in range(2):
        done = call(Fake(), path, out=out, formats=["npy", "colour"])
        assert done == (0, 0, [f"{path}: stops at frame {count} of 12"])
        assert len(list((out / "v").glob("*.npy"))) == count and not (out / "v.json").exists()
        assert len(list(video.frames(out / "v_colour.mp4"))) == count
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


def test_a_video_tells_every_frame(tmp_path):
    shoot(tmp_path / "v.mp4", 3)
    told = []
    call(Fake(), tmp_path / "v.mp4", out=tmp_path / "o", report=lambda *at, **numbers: told.append((at, numbers)))
    frames = [((0, 1), {"frame": i, "frames": 3}) for i in range(3)]
    assert told == [((0, 1), {}), *frames, ((1, 1), {})]
