"""`distill predict`: every input becomes whole files or one line, whatever the others; a second call does the rest."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from distill.app import cli
from distill.core.depth import DepthMap, Kind
from distill.data.maps import decode_map
from distill.eval.reports.figures import INVALID
from distill.inference import outputs, predict
from distill.inference.pictures import within_jpeg
from tests.inference.fake import Fake, call, grey, names, shoot, silent, value


def test_inputs_are_folders_globs_and_files_once_each(photos, tmp_path):
    out = photos / "out"
    jobs = predict.survey([str(photos), str(photos / "*.png"), str(photos / "a.jpg")], out=out).jobs
    assert [(j.path.name, j.stem) for j in jobs] == [("a.jpg", "a"), ("a.png", "a_png"), ("b.png", "sub/b")]
    assert [j.stem for j in predict.survey([str(photos / "**" / "b.*")], out=out).jobs] == ["b"]
    grey(photos / "sub" / "A.png", 3)  # a file system that takes A for a must not lose one of them
    assert [j.stem for j in predict.survey([str(photos / "a.jpg"), str(photos / "sub" / "A.png")], out=out).jobs] == [
        "a",
        "A_png",
    ]
    with pytest.raises(FileNotFoundError, match=r"nope\*: matches no file"):
        predict.survey([str(photos / "nope*")], out=out)
    with pytest.raises(FileNotFoundError, match=r"nope.jpg: no such file or folder"):
        predict.survey([str(photos / "nope.jpg")], out=out)


def test_photos_of_one_name_are_numbered_without_trying_each_number_again(tmp_path, monkeypatch):
    tried, folder = [], outputs.Outputs(tmp_path / "out")
    real = outputs.Outputs._is_free
    monkeypatch.setattr(outputs.Outputs, "_is_free", lambda *given: tried.append(given) or real(*given))
    files = [tmp_path / str(scene) / "frame.jpg" for scene in range(100)]
    stems = [folder.stem(file, "frame") for file in files]
    assert stems == ["frame", "frame_jpg", *(f"frame_{number}" for number in range(2, 100))]
    assert len(tried) < 5 * len(files)


def test_all_formats_hold_the_prediction(photos, tmp_path):
    out, estimator = tmp_path / "out", Fake()
    jobs = predict.survey([str(photos / "a.png")], out=out).jobs
    done = predict.run(estimator, jobs, out=out, formats=list(outputs.FORMATS), report=silent)
    assert (done.written, done.present, done.problems) == (1, 0, [])
    assert names(out) == [
        *("a.glb", "a.npy", "a.ply", "a.png", "a_colour.png", "a_side.jpg", "a_view.html"),
        *("predict.json", "predict_sources.jsonl"),
    ]
    values = np.load(out / "a.npy")
    assert values.dtype == np.float32 and values.shape == (30, 40) and values.max() == 156
    with Image.open(out / "a.png") as picture:
        codes, said = np.asarray(picture).astype(np.float64), dict(picture.text)
    assert codes.min() == 0 and codes.max() == 65535 and said["kind"] == "affine_disparity"
    low, high = float(said["low"]), float(said["high"])
    np.testing.assert_allclose(low + codes / 65535 * (high - low), values, atol=(high - low) / 65535)
    with Image.open(out / "a_side.jpg") as side, Image.open(photos / "a.png") as photo:
        assert side.size == (80, 30)
        left = np.asarray(side).astype(int)[:, :40]
        assert np.abs(left - np.asarray(photo.convert("RGB"))).mean() < 6, "the photo, then its map"
    assert json.loads((out / "predict.json").read_text())["licence"] == "CC0"
    colour = np.asarray(Image.open(out / "a_colour.png")).astype(int).sum(-1)
    assert colour[0, -1] > colour[0, 0]  # near is bright


def test_a_bad_photo_is_one_line_and_a_second_call_does_the_rest(photos, tmp_path):
    out, estimator = tmp_path / "out", Fake()
    (photos / "cut.jpg").write_bytes((photos / "a.jpg").read_bytes()[:200])
    (photos / "text.png").write_text("hello")
    jobs = predict.survey([str(photos)], out=out).jobs
    done = predict.run(estimator, jobs, out=out, report=silent)
    assert done.written == 3 and len(done.problems) == 2 and estimator.calls == 3
    assert all(str(photos) in line and "\n" not in line for line in done.problems)
    (out / "sub" / "b_side.jpg").unlink()
    (photos / "text.png").write_bytes((photos / "a.png").read_bytes())
    again = predict.run(estimator, jobs, out=out, report=silent)
    assert (again.written, again.present, len(again.problems)) == (2, 2, 1) and estimator.calls == 5
    assert not [name for name in names(out) if ".partial" in name]


def test_another_student_does_not_mix_into_the_same_folder(photos, tmp_path):
    out, estimator = tmp_path / "out", Fake()
    jobs = predict.survey([str(photos)], out=out).jobs
    predict.run(estimator, jobs, out=out, report=silent)
    other = Fake()
    for key, changed in (("revision", {"revision": "r2"}), ("size", {"native_size": 65})):
        other.card = type("card", (Fake.card,), changed)
        with pytest.raises(ValueError, match=f"out: holds predictions with another {key} .fake.; give another --out"):
            predict.run(other, jobs, out=out, report=silent)


def test_a_model_in_metres_is_given_the_camera_and_its_maps_are_of_one(photos, tmp_path):
    class Metres(Fake):
        takes_focal, focal = True, None

        def predict(self, images, *, focal=None):
            self.focal = focal
            return super().predict(images)

    out, model = tmp_path / "out", Metres()
    jobs = predict.survey([str(photos / "a.png")], out=out).jobs
    predict.run(model, jobs, out=out, formats=["npy"], report=silent, lens=predict.Lens(fov=90))
    assert model.focal == pytest.approx(20), "half of the width of 40"
    with pytest.raises(ValueError, match="predictions with another camera"):
        predict.run(model, jobs, out=out, formats=["npy"], report=silent, lens=predict.Lens(fov=60))
    other = Fake()  # of the same revision: the folder still remembers the camera
    predict.run(other, jobs, out=out, formats=["npy"], report=silent)
    with pytest.raises(ValueError, match="predictions with another camera"):
        predict.run(model, jobs, out=out, formats=["npy"], report=silent, lens=predict.Lens(fov=60))


def test_a_teacher_without_weights_has_those_of_its_first_card(monkeypatch):
    class Teacher:
        card = None

        @staticmethod
        def load(weights, *, device="cpu"):
            return SimpleNamespace(card=weights)

    module = SimpleNamespace(Teacher=Teacher, CARDS=[SimpleNamespace(weights=name) for name in ("a/first", "a/last")])
    monkeypatch.setattr(predict, "find_plugin", lambda package, name: module)
    assert predict.load_teacher("any", device="cpu").card == "a/first"
    assert predict.load_teacher("any", "b/other", device="cpu").card == "b/other"


def test_what_is_coloured_is_nearness_between_two_percentiles():
    values = np.array([0.0, 1.0, 2.0, 4.0], np.float32)
    assert predict.nearness(values, "affine_disparity").tolist() == values.tolist()
    assert predict.nearness(values, "affine_depth").tolist() == (-values).tolist()
    for kind in ("metric_depth", "scale_depth"):
        assert predict.nearness(values, kind).tolist() == pytest.approx([1000, 1, 0.5, 0.25])
    assert predict._shown(np.array([*range(101), np.nan])) == (1, 99)


def test_the_verb_from_photo_to_files(photos, tmp_path, capsys):
    out = tmp_path / "maps"
    (photos / "text.png").write_text("hello")
    arguments = ["predict", str(photos / "a.png"), str(photos / "text.png"), "--out", str(out), "--device", "cpu"]
    assert cli.main([*arguments, "--size", "28", "--formats", "npy"]) == 1
    said = capsys.readouterr()
    assert "1 of 2 predicted, 1 could not be used" in said.out and "text.png: not an image" in said.err
    assert np.load(out / "a.npy").shape == (30, 40)
    assert cli.main(["predict", str(photos / "a.png"), "--student", "no/such", "--out", str(out)]) == 2
    assert "no/such: no such folder" in capsys.readouterr().err


def test_five_lines_give_a_depth_map(photos):
    depth = predict.load("pocket", device="cpu", size=28).predict(predict.read(photos / "a.png"), focal=30.0)
    assert isinstance(depth, DepthMap) and depth.values.shape == (1, 30, 40) and depth.kind == "affine_disparity"


# --- which input made which map ---------------------------------------------------------------------------------------


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
    # A cut line is ended before the next, or the note of what is begun would be part of it.
    assert len(record.read_text().splitlines()) == (4 if cut == 1 else 6)
    assert [value(out / "a.npy"), value(out / "b.npy")] == [10, 20] and len(list(out.glob("*.npy"))) == 2
    for line in filter(None, record.read_text().splitlines()[-1:]):
        assert json.loads(line)["formats"] == ["npy"]


def test_a_kill_between_two_maps_of_a_photo_costs_that_photo_alone(tmp_path, monkeypatch):
    out = tmp_path / "o"
    grey(tmp_path / "a.png", 10)
    written = predict.write_map

    def stop(path, name, *rest):
        if name == "side":
            raise KeyboardInterrupt
        written(path, name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(predict, "write_map", stop)
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


def test_what_a_model_leaves_out_is_no_fault_and_a_map_without_numbers_is_no_map(tmp_path):
    values, photo = torch.zeros(1, 4, 4), torch.arange(48).reshape(3, 4, 4)
    some = torch.arange(16).reshape(1, 4, 4) >= 4
    broken = torch.where(torch.arange(16).reshape(1, 4, 4) < 6, torch.nan, 1.0)
    with pytest.raises(predict.BadImageError, match=r"not finite \(62 % of it is\)"):
        predict._whole(DepthMap(broken, some, Kind.AFFINE_DISPARITY), photo)
    with pytest.raises(predict.BadImageError, match="leaves out every pixel"):
        predict._whole(DepthMap(values, some & False, Kind.AFFINE_DISPARITY), photo)
    for numbers in (torch.arange(16.0).reshape(1, 4, 4), torch.full((1, 4, 4), 3.0)):
        known = predict._whole(DepthMap(numbers, some, Kind.METRIC_DEPTH), photo * 0)
        assert np.isnan(known[0]).all() and np.array_equal(known[1:], numbers[0, 1:])
        for name in ("png", "npy", "colour", "side"):
            predict.write_map(tmp_path / name, name, known, np.zeros((4, 4, 3), np.uint8), "metric_depth")
        np.testing.assert_allclose(decode_map((tmp_path / "png").read_bytes(), "a.png"), known, atol=9e-5)
        np.testing.assert_array_equal(np.load(tmp_path / "npy"), known)
        assert (np.asarray(Image.open(tmp_path / "colour"))[0] == np.array(INVALID)).all()
    everywhere = DepthMap(values, torch.ones_like(some), Kind.AFFINE_DISPARITY)
    with pytest.raises(predict.BadImageError, match="is 0 everywhere: its training has collapsed"):
        predict._whole(everywhere, photo)
    assert predict._whole(everywhere, photo * 0).shape == (4, 4), "of a plain picture it may be"
    dot = DepthMap(values[:, :1, :1], torch.ones(1, 1, 1, dtype=torch.bool), Kind.AFFINE_DISPARITY)
    assert predict._whole(dot, photo[:, :1, :1]).shape == (1, 1)


def test_beside_a_panorama_that_no_jpeg_holds_the_picture_is_smaller(tmp_path):
    rgb, values = np.zeros((4, 33000, 3), np.uint8), np.zeros((4, 33000), np.float32)
    predict.write_map(tmp_path / "side.jpg", "side", values, rgb, "affine_disparity")
    with Image.open(tmp_path / "side.jpg") as side:
        assert side.size == (33000, 2)
    assert within_jpeg(np.zeros((1, 65500, 3), np.uint8)).shape == (1, 65500, 3), "what fits is kept"
