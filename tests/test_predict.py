"""`distill predict`: every input becomes whole files or one line, whatever the others; a second call does the rest."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from distill import cli, predict
from distill.depth import DepthMap, Kind


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


def silent(done, total):
    pass


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_inputs_are_folders_globs_and_files_once_each(photos, tmp_path):
    out = photos / "out"
    out.mkdir()
    Image.new("RGB", (4, 4)).save(out / "old.png")
    jobs = predict.find([str(photos), str(photos / "*.png"), str(photos / "a.jpg")], out=out)
    assert [(j.path.name, j.stem) for j in jobs] == [("a.jpg", "a"), ("a.png", "a_png"), ("b.png", "sub/b")]
    assert [j.stem for j in predict.find([str(photos / "**" / "b.*")], out=out)] == ["b"]
    with pytest.raises(FileNotFoundError, match="nope.*: no photo or video there"):
        predict.find([str(photos / "nope*")], out=out)


def test_all_formats_hold_the_prediction(photos, tmp_path):
    out, estimator = tmp_path / "out", Fake()
    jobs = predict.find([str(photos / "a.png")], out=out)
    done = predict.run(estimator, jobs, out=out, formats=list(predict.FORMATS), report=silent)
    assert (done.written, done.present, done.problems) == (1, 0, [])
    assert names(out) == ["a.npy", "a.png", "a_colour.png", "a_side.jpg", "predict.json"]
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


def film(path, frames, size=(40, 30)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, size)
    for i in range(frames):
        writer.write(np.full((size[1], size[0], 3), 40 * i, np.uint8) + np.arange(size[0], dtype=np.uint8)[:, None])
    writer.release()


def test_a_video_becomes_frames_and_films(tmp_path):
    out, estimator = tmp_path / "out", Fake()
    film(tmp_path / "v.mp4", 3)
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    jobs = predict.find([str(tmp_path / "*.mp4")], out=out)
    done = predict.run(estimator, jobs, out=out, formats=["png", "npy", "side"], report=silent)
    assert done.written == 1 and [line.split(": ")[0] for line in done.problems] == [str(tmp_path / "bad.mp4")]
    frames = [f"v/{i:06d}.{suffix}" for i in range(3) for suffix in ("npy", "png")]
    assert names(out) == ["predict.json", "v.json", *frames, "v_side.mp4"]
    shapes = [rgb.shape for rgb, _ in predict._frames(out / "v_side.mp4")]
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
